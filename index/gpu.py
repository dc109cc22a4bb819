"""Candidates of an index whose rows lie in the memory of a GPU, by a FAISS built for one.

Rows are kept in half precision with their scale folded in, so a score there is good to a part in a
hundred of the largest: a few more rows than asked for are looked at again on the processor, which
gives the same scores as a search without a GPU.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import faiss as _faiss
import numpy as np

from .metrics import Metric
from .products import selector
from .reader import Int64, StoredIndex
from .rows import Float32, decode_rows

faiss: Any = _faiss  # its stubs lack half of what is used here
_log = logging.getLogger(__name__)
FROM_ROWS = 100_000  # below, copying the rows takes longer than many questions to the processor
# Copying a million rows took as long as 160 queries of them to two accelerated cores (8 s, 49 ms):
# the one question of a command is answered sooner without.
FROM_QUERIES = 100  # asked of an index in this process, a question's seeds each for itself
MOST_RESULTS = 2048  # of a search on a GPU, by FAISS
_BLOCK_ROWS = 8192


def candidates(
    index: StoredIndex,
    queries: Float32,
    scale: Float32,
    top: int,
    wanted: Int64,
    metric: Metric,
    proposers: set[str] | None = None,
) -> list[Int64] | None:
    """Return, for each query [Q, dim], ascending positions among `wanted` that hold its best.

    None without a GPU or a FAISS for it, for a small index, for the first queries of a process,
    when rows or results are too many for it, and for a part of the rows when this FAISS ignores
    selectors. Otherwise `proposers` is told `gpu`.
    """
    count = min(2 * top + 64, len(wanted))
    if index.manifest.rows < FROM_ROWS or count > MOST_RESULTS or not available():
        return None
    _ASKED[index] = _ASKED.get(index, 0) + len(queries)
    if _ASKED[index] < FROM_QUERIES or index in _TOO_LARGE:
        return None
    resident = _RESIDENT.get(index)
    if resident is None or resident.metric != metric:
        _RESIDENT.pop(index, None)
        try:
            resident = Resident(index, scale, metric)
        except RuntimeError as error:  # out of memory
            _log.warning("%s is searched by the processor: %s", index.folder, _line(error))
            _TOO_LARGE.add(index)
            return None
        _RESIDENT[index] = resident
    proposed = resident.candidates(queries, count, wanted)
    if proposed is not None and proposers is not None:
        proposers.add("gpu")
    return proposed


class Resident:
    """The searchable rows of one index in the memory of a GPU."""

    def __init__(self, index: StoredIndex, scale: Float32, metric: Metric) -> None:
        """Copy them; RuntimeError when the memory does not hold them."""
        self.metric = metric
        self._positions = index.ok_positions
        self._rows = _flat(index.manifest.dim)
        self._largest = np.float32(np.abs(scale).max() or 1)
        factor = scale / self._largest
        for block, units in index.unit_blocks(self._positions, _BLOCK_ROWS):
            self._rows.add(decode_rows(units, factor[block]))

    def scores(
        self, queries: Float32, count: int, wanted: Int64 | None = None
    ) -> tuple[Float32, Int64] | None:
        """The `count` best scores and positions [Q, count], to a part in a hundred of the largest.

        `wanted` limits them to some positions. None when this FAISS ignores selectors, and when
        fewer than `count` scores are finite.
        """
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        scaled = queries / np.where(lengths > 0, lengths, 1)  # half precision holds no extremes
        how = None
        if wanted is not None and len(wanted) < len(self._positions):
            if not honours_selectors():
                _log.warning(
                    "this FAISS for GPUs ignores selectors: the processor searches a part of the "
                    "rows (faiss-gpu-cuvs honours them)"
                )
                return None
            chosen = np.isin(self._positions, wanted, assume_unique=True)
            how = faiss.SearchParameters(sel=selector(chosen))
        values, found = self._rows.search(scaled, count, params=how)
        if (found < 0).any():  # what half precision cannot hold has no rank
            return None
        return values * (lengths * self._largest), self._positions[found]

    def candidates(self, queries: Float32, count: int, wanted: Int64) -> list[Int64] | None:
        """The `count` best positions among `wanted` for each query, ascending."""
        found = self.scores(queries, count, wanted)
        return None if found is None else [np.sort(row) for row in found[1]]


_RESIDENT: WeakKeyDictionary[StoredIndex, Resident] = WeakKeyDictionary()
_ASKED: WeakKeyDictionary[StoredIndex, int] = WeakKeyDictionary()  # queries so far
_TOO_LARGE: WeakSet[StoredIndex] = WeakSet()


@cache
def available() -> bool:
    """Whether FAISS was built for a GPU and finds one."""
    return hasattr(faiss, "GpuIndexFlatIP") and faiss.get_num_gpus() > 0


@cache
def honours_selectors() -> bool:
    """Try it: the classic GPU build of FAISS takes a selector and searches everything."""
    rows = _flat(32)
    rows.add(np.array([[1.0] * 32, [0.5] * 32], np.float32))
    only_second = faiss.SearchParameters(sel=selector(np.array([False, True])))
    try:
        _, found = rows.search(np.ones((1, 32), np.float32), 1, params=only_second)
    except RuntimeError:
        return False
    return bool(found[0, 0] == 1)


def _flat(dim: int) -> Any:
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    config.use_cuvs = faiss.get_compile_options().find("NVIDIA_CUVS") >= 0  # honours selectors
    return faiss.GpuIndexFlatIP(_resources(), dim, config)


@cache
def _resources() -> Any:
    return faiss.StandardGpuResources()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
