"""The ingest job: a source and a model become an index."""

from __future__ import annotations

import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from headwater.attribution import (
    Engine,
    Execution,
    Gram,
    Model,
    Recipe,
    dual_curvature,
    feature_space,
    feature_space_id,
)
from headwater.index import IndexWriter, Outlier, norm_outliers

from .columns import ColumnNames
from .devices import BatchRows, Devices, Pictures, kind_of, open_devices
from .errors import SourceError
from .prepare import SHARD_ITEMS, PreparedBatch, prepared_batches
from .progress import Progress, ProgressCallback
from .sources import Source, open_source
from .tables import items_table, joined, previews_table

# Compiling takes some two minutes and saves a fifth of the time after them: it pays from so many
# images x parameters of the denoiser on, which are 9,300 images of SD-1.4 (measured on an H200).
COMPILE_FROM = 8e12


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did."""

    folder: Path
    feature_space_id: str
    items: int
    rows: int
    quarantined: dict[str, int]  # reason -> items, most frequent first
    outliers: tuple[Outlier, ...]  # unusual gradient norms, furthest first; they stay searchable


def build_index(
    source: str | Path,
    model: Model,
    out: str | Path,
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
    progress: ProgressCallback | None = None,
) -> IngestSummary:
    """Compute one row for every image of `source` and write them as an index to `out`.

    Args:
        source: Parquet file, folder of Parquet files, or folder of images with captions.
        model: the model that was trained on these images.
        out: folder of the new index; must not exist or be empty.
        recipe: how rows are computed; the default is the measured best.
        columns: which source columns hold what, where convention does not find them.
        where: DuckDB expression over the source's own columns; only matching items are read.
        limit: at most so many items.
        batch_size: images per forward pass; changes speed and memory, not results. None: what
            suits the memory of the device.
        devices: torch devices, `["cuda:0", "cuda:1"]` for instance: a process for each, with its
            own copy of the model, and the same rows as from one. A script that gives them needs
            `if __name__ == "__main__":`. None: this process, where the model is.
        deterministic: the same rows to the bit at every run with the same batch size.
        compile: run the denoiser as one fused graph; None: on a GPU, if there are images enough
            for it to pay (COMPILE_FROM).
        low_memory: recompute activations in the backward pass.
        progress: called after every batch.

    Raises:
        SourceError: nothing to read, or nothing usable in it. `out` is then not left behind.
        ModelError, IndexStoreError: the recipe or the output folder cannot be used.
        DeviceError: a device cannot go on.
    """
    items, engine, execution = opened(
        source, model, recipe, columns, where, limit, batch_size, devices,
        deterministic=deterministic, compile=compile, low_memory=low_memory,
    )  # fmt: skip
    out = Path(out)
    space = feature_space(engine.recipe, model.fingerprint)
    existed = out.exists()
    writer = IndexWriter.create(
        out, feature_space_id=feature_space_id(space), recipe=space, dim=engine.projector.dim
    )
    try:
        with open_devices(engine, execution, devices, choose=batch_size is None) as ready:
            batch_size = batch_size or ready.batch_size()
            shards = _Shards(writer, items, engine.projector.dim)
            quarantined = _write_items(items, ready, shards, batch_size, progress)
        manifest = writer.manifest
        if manifest.rows == manifest.quarantined:
            reason, count = quarantined.most_common(1)[0]
            raise SourceError(
                f"no usable image in {items.label}: {manifest.rows} items, "
                f"of which {count} with: {reason}; check the image column and the files"
            )
        shards.write_curvature()
        writer.finish(
            {
                "batch_size": batch_size,
                "devices": list(devices or [str(model.device)]),
                "execution": asdict(execution),
            }
        )
    except BaseException:
        # An unfinished index cannot be opened; leaving it would only block the next attempt.
        # A folder that was there before stays (it may be a link or a mount point), emptied.
        for path in out.iterdir() if existed else [out]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
    return IngestSummary(
        out,
        manifest.feature_space_id,
        manifest.rows,
        manifest.rows - manifest.quarantined,
        dict(quarantined.most_common()),
        tuple(shards.outliers()),
    )


def opened(
    source: str | Path,
    model: Model,
    recipe: Recipe | None,
    columns: ColumnNames | None,
    where: str | None,
    limit: int | None,
    batch_size: int | None,
    devices: Sequence[str] | None,
    *,
    deterministic: bool,
    compile: bool | None,
    low_memory: bool,
) -> tuple[Source, Engine, Execution]:
    """The source, the engine of this process and how rows are to be computed."""
    if batch_size is not None and batch_size < 1:
        raise SourceError(f"--batch-size {batch_size} is not positive")
    items = open_source(
        source,
        columns=columns or ColumnNames(),
        where=where,
        limit=limit,
        captions_required=model.conditional,
    )
    if compile is None:
        # By all images, not those of one device: two devices must compute what one does.
        kind = kind_of(devices[0]) if devices else model.device.type
        parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
        compile = kind == "cuda" and not low_memory and len(items) * parameters >= COMPILE_FROM
    execution = Execution(compile=compile, checkpointing=low_memory, deterministic=deterministic)
    # Where others compute, this process's engine is never run: nothing to compile.
    engine = Engine(model, recipe or Recipe(), execution if devices is None else None)
    return items, engine, execution


def computed(
    batches: Iterator[PreparedBatch], devices: Devices, batch_size: int
) -> Iterator[tuple[PreparedBatch, BatchRows]]:
    """Every batch with its rows, in order; the devices take the next ones meanwhile."""
    conditional = devices.engine.model.conditional
    under_way: deque[PreparedBatch] = deque()

    def pictures() -> Iterator[Pictures]:
        for batch in batches:
            under_way.append(batch)
            chosen = [batch.columns[position] for position in batch.usable]
            captions = [columns["caption"] if conditional else "" for columns in chosen]
            keys = [batch.keys[position] for position in batch.usable]
            yield Pictures(batch.pixels, captions, keys, batch_size)

    for found in devices.rows(pictures()):
        yield under_way.popleft(), found


def _write_items(
    items: Source,
    devices: Devices,
    shards: _Shards,
    batch_size: int,
    progress: ProgressCallback | None,
) -> Counter[str]:
    """Write every shard; the reasons of quarantine, counted."""
    quarantined: Counter[str] = Counter()
    done = bytes_read = 0
    with (
        # While one shard is written, the next one is computed; two are in memory at most.
        ThreadPoolExecutor(1) as writing,
        prepared_batches(
            items,
            devices.engine.model.image_size,
            batch_size,
            refuses=devices.engine.model.refuses,
            processes=devices.image_processes,
        ) as batches,
    ):
        started = time.monotonic()
        written: Future[None] | None = None
        pending = _Pending()
        for batch, found in computed(batches, devices, batch_size):
            pending.add(batch, found)
            reasons = (columns["error"] for columns in pending.columns[-len(batch.columns) :])
            quarantined.update(reason for reason in reasons if reason)
            done += len(batch.columns)
            bytes_read += batch.bytes_read
            if len(pending.columns) == SHARD_ITEMS:
                if written is not None:
                    written.result()
                written = writing.submit(shards.write, pending)
                pending = _Pending()
            if progress is not None:
                elapsed = time.monotonic() - started
                progress(Progress(done, len(items), quarantined.total(), bytes_read, elapsed))
        if written is not None:
            written.result()
        if pending.columns:
            shards.write(pending)
    return quarantined


class _Pending:
    """The batches of a shard that is not written yet."""

    def __init__(self) -> None:
        self.columns: list[dict[str, Any]] = []
        self.previews: list[bytes | None] = []
        self.rows: list[npt.NDArray[np.float32]] = []

    def add(self, batch: PreparedBatch, found: BatchRows) -> None:
        rows, columns = joined(batch, found)
        self.rows.append(rows)
        self.columns += columns
        self.previews += batch.previews


class _Shards:
    """Writes shards, and keeps of them what belongs to the whole index."""

    def __init__(self, writer: IndexWriter, items: Source, dim: int) -> None:
        self._writer = writer
        self._extra = items.extra_schema
        # With fewer rows than dimensions the N x N form is smaller, and the rows fit in memory.
        self._gram = Gram(dim) if len(items) >= dim else None
        self._effective: list[npt.NDArray[np.float32]] = []
        self._norms: list[pa.Table] = []

    def write(self, pending: _Pending) -> None:
        table = items_table(pending.columns, self._extra)
        previews = previews_table(pending.columns, pending.previews)
        stored = self._writer.add_shard(table, np.concatenate(pending.rows), previews)
        usable = stored[[columns["status"] == "ok" for columns in pending.columns]]
        if self._gram is None:
            self._effective.append(usable)
        else:
            self._gram.add(torch.from_numpy(usable))
        self._norms.append(table.select(["item_id", "status", "gradient_norm"]))

    def write_curvature(self) -> None:
        if self._gram is not None:
            arrays = {"gram": self._gram.matrix.numpy()} | self._gram.curvature().arrays()
        else:
            rows = torch.from_numpy(np.concatenate(self._effective))
            arrays = dual_curvature(rows).arrays()
        self._writer.write_curvature(arrays)

    def outliers(self) -> list[Outlier]:
        return norm_outliers(pa.concat_tables(self._norms))
