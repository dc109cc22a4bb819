"""The ingest job: a source and a model become an index."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from headwater.attribution import (
    Engine,
    Execution,
    Model,
    Recipe,
    differences,
    feature_space,
    feature_space_id,
)
from headwater.index import IndexStoreError, IndexWriter, Outlier, StoredIndex

from .columns import ColumnNames
from .devices import BatchRows, Devices, Pictures, kind_of, open_devices
from .errors import SourceError
from .held import Held, check_columns
from .journal import Journal
from .plan import SHARD_ITEMS, Job, check_same, chunks, read_job
from .prepare import PreparedBatch, prepared_batches
from .progress import Progress, ProgressCallback
from .seal import seal
from .sources import Source, open_source
from .tables import joined

# Compiling takes some two minutes and saves a fifth of the time after them: it pays from so many
# images x parameters of the denoiser on, which are 9,300 images of SD-1.4 (measured on an H200).
COMPILE_FROM = 8e12


@dataclass(frozen=True)
class IngestSummary:
    """What an ingest did."""

    folder: Path
    feature_space_id: str
    items: int  # selected records of the source
    rows: int  # written, without those in quarantine
    quarantined: dict[str, int]  # reason -> items, most frequent first
    outliers: tuple[Outlier, ...]  # unusual gradient norms, furthest first; they stay searchable
    unchanged: int = 0  # records that the index held as they are
    replaced: tuple[str, ...] = ()  # ids that now stand for other bytes, captions or columns


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
    id_prefix: str = "",
    restart: bool = False,
    progress: ProgressCallback | None = None,
) -> IngestSummary:
    """Compute one row for every image of `source` and write them as an index to `out`.

    Where an index is, it is added to: a record that it holds unchanged costs nothing, one that has
    changed takes the place of the older. Nothing is seen of an ingest before its end; one that was
    cut short goes on where it was when it is run again, and ends in the same bytes.

    Args:
        source: Parquet file, folder of Parquet files, or folder of images with captions.
        model: the model that was trained on these images.
        out: folder of the index; one of the same feature space, an empty one, or none yet.
        recipe: how rows are computed; the default is the measured best.
        columns: which source columns hold what, where convention does not find them.
        where: DuckDB expression over the source's own columns; only matching items are read.
        limit: at most so many items.
        batch_size: images per forward pass, and after how many the work is kept; changes speed
            and memory, results only in rounding. None: what suits the memory of the device. An
            ingest that goes on has the passes it began with.
        devices: torch devices, `["cuda:0", "cuda:1"]` for instance: a process for each, with its
            own copy of the model, and the same rows as from one. A script that gives them needs
            `if __name__ == "__main__":`. None: this process, where the model is.
        deterministic: the same rows to the bit at every run with the same batch size.
        compile: run the denoiser as one fused graph; None: on a GPU, if there are images enough
            for it to pay (COMPILE_FROM).
        low_memory: recompute activations in the backward pass.
        id_prefix: put before every item's id, to keep corpora apart whose ids may be the same.
        restart: discard an unfinished ingest into `out` and begin anew.
        progress: called after every batch.

    Raises:
        SourceError: nothing to read, or nothing usable in it; the ingest is then discarded. Or the
            ingest that was cut short is another one.
        ModelError, IndexStoreError: the recipe or the output folder cannot be used.
        DeviceError: a device cannot go on.
    """
    items, engine, execution = opened(
        source, model, recipe, columns, where, limit, batch_size, devices,
        deterministic=deterministic, compile=compile, low_memory=low_memory,
    )  # fmt: skip
    out = Path(out)
    space = json.loads(json.dumps(feature_space(engine.recipe, model.fingerprint)))
    with _opened_writer(out, space, engine.projector.dim) as writer:
        before = None if writer.new else StoredIndex(out, writer.manifest)
        if restart:
            writer.discard_job()
        begun = read_job(out)
        if before is not None:
            _check_space(before, space)
            if before.manifest.rows:
                check_columns(before, items.extra_schema)
        asked = Job(
            label=items.label,
            signature=items.signature(None if begun is None else dict(begun.signature)),
            where=where,
            limit=limit,
            id_prefix=id_prefix,
            space=space,
            execution=asdict(execution),
            device=kind_of(devices[0]) if devices else model.device.type,
            width=0 if begun is None else begun.width,
            items=len(items),
            range_items=SHARD_ITEMS if begun is None else begun.range_items,
            first_part=writer.manifest.next_part,
        )
        if begun is not None:
            check_same(out, begun, asked)
        with open_devices(
            engine, execution, devices, choose=begun is None and batch_size is None
        ) as ready:
            width = asked.width or batch_size or ready.batch_size()
            batch_size = batch_size or width
            journal = Journal(out, replace(asked, width=width), items.extra_schema)
            resumed = _run(items, ready, journal, Held(before), batch_size, progress)
        sealed = seal(
            writer,
            before,
            journal,
            {
                "batch_size": width,
                "devices": list(devices or [str(model.device)]),
                "execution": asdict(execution),
                "resumed": resumed,
            },
        )
        return IngestSummary(
            folder=out,
            feature_space_id=writer.manifest.feature_space_id,
            items=len(items),
            rows=sealed.written - sealed.reasons.total(),
            quarantined=dict(sealed.reasons.most_common()),
            outliers=sealed.outliers,
            unchanged=sealed.unchanged,
            replaced=sealed.replaced,
        )


def _opened_writer(out: Path, space: Mapping[str, Any], dim: int) -> IndexWriter:
    if (out / "manifest.json").exists():
        return IndexWriter.open(out)
    return IndexWriter.create(out, feature_space_id=feature_space_id(space), recipe=space, dim=dim)


def _check_space(stored: StoredIndex, space: Mapping[str, Any]) -> None:
    """Refuse rows that could not be compared with those that the index holds."""
    if found := differences(space, stored.manifest.recipe):
        raise IndexStoreError(
            f"{stored.folder} holds rows of another feature space; different: {', '.join(found)}; "
            "use the model and recipe it was made with, or choose another --out"
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
    batches: Iterator[PreparedBatch], devices: Devices, width: int
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
            places = [batch.span.taken + position for position in batch.usable]
            yield Pictures(batch.pixels, captions, keys, places, width)

    for found in devices.rows(pictures()):
        yield under_way.popleft(), found


def _run(
    source: Source,
    devices: Devices,
    journal: Journal,
    held: Held,
    batch_size: int,
    progress: ProgressCallback | None,
) -> int:
    """Do what is left of every range; how many records were done before."""
    journal.tidy()
    resumed, quarantined = journal.progress()
    done, bytes_read = resumed, 0
    todo = journal.todo()
    for part in todo:
        if part.start == part.stop:
            journal.merge(part.number)
    with (
        # While a range becomes a part, the next one is computed.
        ThreadPoolExecutor(1) as merging,
        prepared_batches(
            chunks(source, todo, batch_size, held.unchanged, journal.job.id_prefix),
            devices.engine.model.image_size,
            refuses=devices.engine.model.refuses,
            processes=devices.image_processes,
        ) as batches,
    ):
        started = time.monotonic()
        merged: Future[None] | None = None
        for batch, found in computed(batches, devices, journal.job.width):
            reasons = _keep(batch, found, journal, held)
            quarantined.update(reasons)
            done += batch.span.stop - batch.span.start
            bytes_read += batch.bytes_read
            if batch.span.stop == journal.job.span(batch.span.number)[1]:
                if merged is not None:
                    merged.result()
                merged = merging.submit(journal.merge, batch.span.number)
            if progress is not None:
                elapsed = time.monotonic() - started
                total = quarantined.total()
                progress(Progress(done, len(source), total, bytes_read, elapsed, resumed))
        if merged is not None:
            merged.result()
    return resumed


def _keep(batch: PreparedBatch, found: BatchRows, journal: Journal, held: Held) -> Iterator[str]:
    """Journal a batch without what turned out as the index holds it; the reasons of quarantine."""
    rows, columns = joined(batch, found)
    positions = [held.still_quarantined(known) for known in columns]
    new = [place for place, position in enumerate(positions) if position is None]
    held_ones = (position for position in positions if position is not None)
    span = replace(batch.span, unchanged=(*batch.span.unchanged, *held_ones))
    columns = [columns[place] for place in new]
    journal.commit(span, rows[new], columns, [batch.previews[place] for place in new])
    return (known["error"] for known in columns if known["error"])
