"""The ingest job: a source and a model become an index."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headwater.attribution import (
    Engine,
    Execution,
    Model,
    Recipe,
    differences,
    feature_space,
    feature_space_id,
)
from headwater.index import DuplicateCounts, IndexStoreError, IndexWriter, Outlier, StoredIndex

from .columns import ColumnNames
from .devices import kind_of, open_devices
from .errors import SourceError
from .held import Held, check_columns
from .journal import Journal
from .plan import SHARD_ITEMS, Job, check_same, read_job, write_job
from .progress import Progress, ProgressCallback
from .ranges import Worker, Workers
from .ray_engine import RayCluster, RayWorkers, Task
from .seal import seal
from .signature import difference
from .sources import Source, open_source

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
    duplicates: DuplicateCounts | None = None  # in the whole index; None: not looked for
    # {id: reason} of unchanged items whose record is unusable now: what the index held stays.
    kept: Mapping[str, str] = field(default_factory=dict)


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
    cluster: RayCluster | None = None,
    deterministic: bool = True,
    compile: bool | None = None,
    low_memory: bool = False,
    id_prefix: str = "",
    restart: bool = False,
    progress: ProgressCallback | None = None,
) -> IngestSummary:
    """Compute one row for every image of `source` and write them as an index to `out`.

    Where an index is, it is added to: a record that it holds unchanged costs nothing, one that has
    changed takes the place of the older, unless it is unusable. Nothing is seen of an ingest before
    its end; one that was cut short goes on where it was when it is run again, and ends in the same
    bytes.

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
        cluster: workers on a Ray cluster compute instead, on `devices[0]`'s kind of device or else
            the model's, and give the same rows. Every machine must see source and `out` under the
            same path.
        deterministic: the same rows to the bit at every run with the same batch size.
        compile: run the denoiser as one fused graph; None: on a GPU, if there are images enough
            for it to pay (COMPILE_FROM).
        low_memory: recompute activations in the backward pass.
        id_prefix: put before every item's id, to keep corpora apart whose ids may be the same.
        restart: discard an unfinished ingest into `out` and begin anew.
        progress: called after every batch.

    Raises:
        SourceError: nothing to read, or nothing usable in it; the ingest is then discarded. Or the
            ingest that was cut short is another one, or the source changed meanwhile.
        ModelError, IndexStoreError: the recipe or the output folder cannot be used.
        DeviceError: a device cannot go on, or workers of the cluster were lost again and again.
        ClusterError: no Ray, no cluster, or no room in it.
    """
    if cluster is not None:
        source = _absolute(source)
        devices = [kind_of(devices[0]) if devices else model.device.type]
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
            id=secrets.token_hex(8) if begun is None else begun.id,
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
        with _opened_workers(
            *(items, engine, execution, devices, cluster, before, out, Path(source)),
            choose=begun is None and batch_size is None,
        ) as workers:
            width = asked.width or batch_size or workers.batch_size()
            batch_size = batch_size or width
            journal = Journal(out, replace(asked, width=width), items.extra_schema)
            resumed = _run(workers, journal, len(items), batch_size, progress)
        _check_unchanged(out, journal.job, items)
        sealed = seal(
            writer,
            before,
            journal,
            {
                "batch_size": width,
                "devices": list(workers.devices),
                "execution": asdict(execution),
                "resumed": resumed,
            },
            content_keyed=items.content_keyed,
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
            duplicates=sealed.duplicates,
            kept=sealed.kept,
        )


def _check_unchanged(folder: Path, job: Job, items: Source) -> None:
    """Refuse to finish if the source is no longer what it was at the beginning."""
    before = dict(job.signature)
    now = items.signature(before)
    for name, was in before["files"].items():
        if was is not None and now["files"].get(name) is None:
            # What was computed of it is right; another state of it would show at the next attempt.
            raise SourceError(
                f"{name} of {job.label} can no longer be read; run the ingest again when it can"
            )
    if reason := difference(before, now):
        # Even put back as it was: rows of what it was meanwhile cannot be told from the others.
        spoilt = replace(job, spoilt=reason)
        write_job(folder, spoilt)
        check_same(folder, spoilt, job)


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


def _absolute(source: str | Path) -> str | Path:
    """A path that means the same on another machine; a URL does."""
    return source if "://" in str(source) else Path(source).absolute()


@contextmanager
def _opened_workers(
    items: Source,
    engine: Engine,
    execution: Execution,
    devices: Sequence[str] | None,
    cluster: RayCluster | None,
    before: StoredIndex | None,
    folder: Path,
    path: Path,
    *,
    choose: bool,
) -> Iterator[Workers]:
    """Who computes: this process with its devices, or the workers of a cluster."""
    if cluster is None:
        with open_devices(engine, execution, devices, choose=choose) as ready:
            names = list(devices or [str(engine.model.device)])
            yield Worker(items, ready, Held(before, content_keyed=items.content_keyed), names)
        return
    (kind,) = devices or ()
    task = Task(
        recipe=engine.recipe,
        execution=execution,
        kind=kind,
        threads=torch.get_num_threads(),
        source=items,
        source_path=path if path.exists() else None,  # a URL lies nowhere
        folder=folder.absolute(),
        manifest=None if before is None else before.manifest,
    )
    with RayWorkers(cluster, engine.model, task) as workers:
        yield workers


def _run(
    workers: Workers,
    journal: Journal,
    total: int,
    batch_size: int,
    progress: ProgressCallback | None,
) -> int:
    """Do what is left of every range; how many of the `total` records were done before."""
    journal.tidy()
    resumed, quarantined = journal.progress()
    bytes_read = 0
    todo = journal.todo()
    reached = {part.number: part.start for part in todo}
    done = resumed
    for part in todo:
        if part.start == part.stop:
            journal.merge(part.number)
    left = [part for part in todo if part.start < part.stop]
    with (
        # While a range becomes a part, the next one is computed.
        ThreadPoolExecutor(1) as merging,
        closing(workers.run(journal, left, batch_size)) as batches,
    ):
        started = time.monotonic()
        merged: Future[None] | None = None
        for batch in batches:
            number, stop = batch.span.number, batch.span.stop
            quarantined.update(batch.reasons)
            # A worker that was lost may have kept a batch of which it could not tell.
            done += stop - reached[number]
            reached[number] = stop
            bytes_read += batch.bytes_read
            if stop == journal.job.span(number)[1]:
                if merged is not None:
                    merged.result()
                merged = merging.submit(journal.merge, number)
            if progress is not None:
                elapsed = time.monotonic() - started
                progress(Progress(done, total, quarantined.total(), bytes_read, elapsed, resumed))
        if merged is not None:
            merged.result()
    return resumed
