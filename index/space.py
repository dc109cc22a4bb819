"""The space in which an index's codes are made, kept under `faiss/`: its whitening and its cells.

One folder for each metric holds them, with the codes and the calibration made in that space.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import derived
from .cells import Cells
from .metrics import Metric
from .reader import StoredIndex
from .rows import Float32
from .whitening import Whitening

WHITENING, CELLS, CALIBRATION = "whitening.npz", "cells.npy", "calibration.json"


def folder_of(index: StoredIndex, metric: Metric) -> Path:
    """Where what is made for this metric lies."""
    words = [metric.similarity, metric.preconditioning]
    if metric.preconditioning != "none":
        words.append(f"{metric.damping:g}")
    return index.folder / derived.FOLDER / index.caches / "-".join(words)


def kept_space(index: StoredIndex, folder: Path) -> tuple[Whitening | None, Cells | None]:
    """What is there of both, whole; OSError when one is a link."""
    whitening = Whitening.kept(index, folder / WHITENING)
    return whitening, None if whitening is None else Cells.kept(index, whitening, folder / CELLS)


def space(
    index: StoredIndex, scale: Float32, metric: Metric, folder: Path, *, with_cells: bool
) -> tuple[Whitening, Cells | None]:
    """Both as they are kept; what is missing is made and kept, cells only `with_cells`.

    Raises OSError when it cannot be kept. To be called under `only_builder`.
    """
    whitening, cells = kept_space(index, folder)
    if whitening is None:
        whitening = Whitening.of(index, metric)
        whitening.keep(index.folder, folder / WHITENING)
        cells = Cells.kept(index, whitening, folder / CELLS)
    if cells is None and with_cells:
        cells = Cells.of_index(index, whitening, scale)
        cells.keep(index.folder, folder / CELLS)
    return whitening, cells


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; BlockingIOError, an OSError, while another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    # Neither through a link nor emptied: a folder from elsewhere must not reach other files.
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
