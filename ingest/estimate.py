"""What an ingest would take, measured on a few batches of the corpus; writes nothing."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from headwater.attribution import Model, Recipe
from headwater.index import stored_size

from .columns import ColumnNames
from .devices import open_devices
from .errors import SourceError
from .job import opened
from .plan import SHARD_ITEMS, chunks, everything
from .prepare import prepared_batches
from .ranges import computed
from .tables import items_table, joined, previews_table


@dataclass(frozen=True)
class Estimate:
    """What an ingest would take."""

    items: int
    batch_size: int
    images_per_second: float
    seconds: float  # for every row; loading the model and the curvature at the end come on top
    peak_memory: int  # bytes, of one device's process: reserved on a GPU, else resident
    disk_bytes: int
    sampled: int  # items that the figures rest on
    quarantined: dict[str, int]  # reason -> items of the sample, most frequent first


def estimate(
    source: str | Path,
    model: Model,
    *,
    recipe: Recipe | None = None,
    columns: ColumnNames | None = None,
    where: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    devices: Sequence[str] | None = None,
    deterministic: bool = True,
    compile: bool | None = None,
    low_memory: bool = False,
    batches: int = 3,
) -> Estimate:
    """Ingest the first images of `source` as `build_index` would, time them, and keep nothing.

    Each device computes one batch that is not counted, then `batches` that are; a corpus that has
    no more than the former is timed on those. Other arguments and errors as of `build_index`.
    """
    if batches < 1:
        raise SourceError(f"batches is {batches}; give at least one to be timed")
    items, engine, execution = opened(
        source, model, recipe, columns, where, limit, batch_size, devices,
        deterministic=deterministic, compile=compile, low_memory=low_memory,
    )  # fmt: skip
    workers = len(devices or [""])
    with open_devices(engine, execution, devices, choose=batch_size is None) as ready:
        batch_size = batch_size or ready.batch_size()
        sample = replace(items, positions=items.positions[: batch_size * workers * (1 + batches)])
        with prepared_batches(
            chunks(sample, everything(sample), batch_size, lambda _: None),
            model.image_size,
            refuses=model.refuses,
            processes=ready.image_processes,
        ) as prepared:
            started = time.monotonic()
            timed = all_found = list(computed(islice(prepared, workers), ready, batch_size))
            warmed = time.monotonic()
            if further := list(computed(prepared, ready, batch_size)):
                started, timed, all_found = warmed, further, all_found + further
            elapsed = time.monotonic() - started
    known: list[dict[str, Any]] = []
    for batch, found in all_found:
        known += joined(batch, found)[1]
    previews = [preview for batch, _ in all_found for preview in batch.previews]
    reasons = Counter(columns["error"] for columns in known if columns["error"])
    rate = sum(len(batch.columns) for batch, _ in timed) / elapsed
    usable = round(len(items) * (1 - reasons.total() / len(known)))
    return Estimate(
        items=len(items),
        batch_size=batch_size,
        images_per_second=rate,
        seconds=len(items) / rate,
        peak_memory=max(found.peak_memory for _, found in all_found),
        disk_bytes=_extrapolated(items_table(known, items.extra_schema), len(items))
        + _extrapolated(previews_table([item["item_id"] for item in known], previews), usable)
        + _arrays(len(items), usable, engine.projector.dim),
        sampled=len(known),
        quarantined=dict(reasons.most_common()),
    )


def _extrapolated(table: pa.Table, rows: int) -> int:
    """Bytes on disk of `rows` rows like those of `table`, cut into shards."""
    first = stored_size(table.slice(0, 1))
    further = (stored_size(table) - first) / max(1, table.num_rows - 1)
    shards = math.ceil(rows / SHARD_ITEMS)
    return int(shards * first + (rows - shards) * further)


def _arrays(items: int, usable: int, dim: int) -> int:
    """Bytes of the rows, of the eigenpairs and, in the primal form, of the Gram matrix."""
    eigenvectors = dim * min(usable, dim)
    gram = dim * dim if items >= dim else 0
    return 2 * items * dim + 8 * (eigenvectors + gram)  # float16, float64
