"""`headwater bench index`: search measured on rows as gradients are, in numbers a laptop holds.

Rows are generated from real ones (`gradient_rows`); a tenth of the real rows is held out for the
queries, which are differences of two, solved with the curvature of the index as a contrast is.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headwater.benchmarks.gradient_rows import Generator, compare
from headwater.index import IndexStoreError, IndexWriter, StoredIndex, gpu, search
from headwater.index.accelerator import Accelerator, candidates_for
from headwater.index.cells import cell_count
from headwater.index.exact import rescored
from headwater.index.gpu_cells import codes_bytes
from headwater.index.metrics import prepare
from headwater.queries import Asking
from headwater.queries.concept import MOST

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
METRIC = Asking(damping=MOST).metric  # of a question about a concept in a large index, unasked
SHARD_ROWS = 2048
GRAM_ROWS = 16_384  # of which the curvature is estimated
QUERIES = 100
EXACT_TIMED = 20  # queries timed alone by the exact search, which reads every row each time
CANDIDATES = (200, 500, 1000, 2000, 5000, 10_000, 20_000)
VISITED = (64, 32, 16, 8, 4, 2)  # one cell in so many, where codes stand in cells


def run(
    features: Path,
    rows: int,
    out: Path | None,
    folder: Path | None,
    say: Callable[[str], None],
    gpu_memory: int | None = None,
) -> None:
    """Measure, say the tables, and write `out`.md and `out`.jsonl.

    features    an index, or a .npy file of effective rows [n, dim]
    folder      where the generated index is written for the time of the run: rows x dim x 2 bytes
    gpu_memory  leave out the processor's codes, and measure those that a GPU with so many bytes
                free holds in the place of rows

    Raises:
        IndexStoreError: too few real rows, or a file that holds no rows; no GPU to measure, or a
            `gpu_memory` that holds the rows or not even codes.
    """
    if gpu_memory is not None and not gpu.available():
        raise IndexStoreError("--gpu-memory: there is no GPU, or this FAISS is built without it")
    real = read_real(features)
    if gpu_memory is not None:
        check_memory(gpu_memory, rows, real.shape[1])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=folder, prefix="headwater-bench-") as temporary:
        lines = measure(real, rows, Path(temporary) / "index", records, gpu_memory)
    option = "" if gpu_memory is None else f" --gpu-memory {gpu_memory}"
    command = f"headwater bench index --features {features} --rows {rows}{option}"
    text = "\n".join([command, "", *lines])
    say(text)
    if out is not None:
        out.with_name(f"{out.name}.md").write_text(text + "\n")
        out.with_name(f"{out.name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )


def check_memory(memory: int, rows: int, dim: int) -> None:
    """IndexStoreError when so many bytes of a GPU hold all rows, or not even their codes."""
    least, enough = codes_bytes(rows, dim, cell_count(rows), METRIC), gpu.rows_bytes(rows, dim)
    if not least <= memory < enough:
        raise IndexStoreError(
            f"--gpu-memory {memory}: a GPU holds the codes and not the rows of this index from "
            f"{least:,} bytes to {enough:,}"
        )


def read_real(features: Path) -> Float32:
    """Effective rows [n, dim] in random order, of mean length 1."""
    if features.is_dir():
        real = np.concatenate([rows for _, rows in StoredIndex.open(features).blocks()])
    else:
        try:
            real = np.load(features, allow_pickle=False).astype(np.float32)
        except (OSError, ValueError, EOFError) as error:
            raise IndexStoreError(
                f"--features {features}: {error}; give an index or a .npy"
            ) from error
    if real.ndim != 2 or len(real) < 40:
        raise IndexStoreError(
            f"{features} holds {real.shape}; at least 40 real rows [n, dim] are needed"
        )
    real /= np.linalg.norm(real, axis=1).mean()
    order = np.random.default_rng(0).permutation(len(real))
    found: Float32 = real[order]
    return found


def measure(
    real: Float32,
    rows: int,
    folder: Path,
    records: list[dict[str, Any]],
    gpu_memory: int | None = None,
) -> list[str]:
    """All lines of the report; what was measured is added to `records`."""
    held = len(real) // 10
    kept = real[2 * held :]
    asked: Float64 = (real[:held] - real[held : 2 * held])[:QUERIES].astype(np.float64)
    generator = Generator.fit(kept)
    made = np.concatenate(list(generator.blocks(len(kept), seed=1)))
    table = compare(kept, made, asked)
    records += [{"figure": name, "real": r, "made": m} for name, (r, m) in table.items()]
    lines = [
        f"{rows:,} rows x {real.shape[1]:,}, {len(asked)} queries, {platform.machine()}, "
        f"{faiss.omp_get_max_threads()} threads, {os.cpu_count()} cores, "
        f"FAISS {faiss.__version__}, ranked by {METRIC.similarity} at damping {METRIC.damping:g}",
        "",
        f"| rows generated from {len(kept):,} | real | made |",
        "|---|---|---|",
        *(f"| {name} | {r:.4g} | {m:.4g} |" for name, (r, m) in table.items()),
        "",
    ]
    seconds, _ = timed(lambda: write_index(generator, rows, folder))
    index = StoredIndex.open(folder)
    note(records, lines, "generate and write", seconds=seconds)
    seconds, _ = timed(lambda: prepare(index, asked[:1], METRIC))
    note(records, lines, "lengths of all rows, once", seconds=seconds)
    truth = exact(index, asked, records, lines)
    if gpu_memory is None:
        accelerated(index, asked, truth, records, lines)
    room = gpu.room() if gpu.available() else 0
    if room is None or gpu.rows_bytes(rows, real.shape[1]) <= room:
        on_gpu(index, asked, truth, records, lines)
    if gpu_memory is not None:
        codes_on_gpu(index, asked, truth, gpu_memory, records, lines)
    return lines


def write_index(generator: Generator, rows: int, folder: Path) -> None:
    """An index of generated rows, with the curvature that its first rows have."""
    dim = generator.basis.shape[1]
    writer = IndexWriter.create(folder, feature_space_id="generated", recipe={}, dim=dim)
    no_thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    gram, seen, done = np.zeros((dim, dim)), 0, 0
    for block in generator.blocks(rows):
        numbers = range(done, done + len(block))
        items = pa.table(
            {
                "item_id": [str(i) for i in numbers],
                "status": ["ok"] * len(block),
                "error": pa.nulls(len(block), pa.string()),
            }
        )
        stored = writer.add_shard(items, block, no_thumbs)
        done += len(block)
        if seen < GRAM_ROWS:
            gram += stored.T.astype(np.float64) @ stored
            seen += len(block)
    values, vectors = np.linalg.eigh(gram * (rows / seen))
    solid = values > values[-1] * 1e-12
    writer.write_curvature(
        {
            "eigenvalues": values[solid][::-1],
            "eigenvectors": np.ascontiguousarray(vectors[:, solid][:, ::-1]),
            "rows": np.array(rows),
        }
    )
    writer.finish()


def exact(index: StoredIndex, asked: Float64, records: list[Any], lines: list[str]) -> Int64:
    """The 100 best of every query, and what finding them costs."""
    top = min(100, index.manifest.rows)
    _, truth = search(index, asked, top, metric=METRIC, exact=True)
    one = [
        timed(partial(search, index, q[None], 10, metric=METRIC, exact=True))[0]
        for q in asked[:EXACT_TIMED]
    ]
    nine, _ = timed(lambda: search(index, asked[:9], 10, metric=METRIC, exact=True))
    note(records, lines, "exact, a query", p50=quantile(one, 0.5), p99=quantile(one, 0.99))
    note(records, lines, "exact, 9 queries together", seconds=nine)
    return truth


def accelerated(
    index: StoredIndex,
    asked: Float64,
    truth: Int64,
    records: list[Any],
    lines: list[str],
) -> None:
    """Build, size, recall and latency by number of candidates."""
    rows, dim = index.manifest.rows, index.manifest.dim
    _, scale = prepare(index, asked[:1], METRIC)
    with peak_memory() as peak:
        seconds, built = timed(lambda: Accelerator.ready(index, scale, METRIC))
    files = list((index.folder / "faiss").rglob("*.*"))
    codes = sum(f.stat().st_size for f in files if f.suffix in (".codes", ".layout"))
    shared = sum(f.stat().st_size for f in files if f.suffix in (".npz", ".npy"))
    note(
        records, lines, "build accelerator", seconds=seconds, peak_mib=peak[0] / 2**20,
        code_bytes_a_row=codes / rows, whitening_mib=shared / 2**20, disk_bytes_a_row=dim * 2,
    )  # fmt: skip
    if built.calibration is not None:
        records.append({"what": "cells", **asdict(built.calibration)})
        lines += [f"- {line}" for line in built.calibration.told()]
    lines += [
        "",
        "| candidates | cells | codes scanned | recall@10 | recall@100 | p50 ms | p99 ms |",
        "|---|---|---|---|---|---|---|",
    ]
    jobs: list[tuple[int, int | None]] = [(c, None) for c in CANDIDATES if 2 * c <= rows]
    if built.cells is not None:
        count = candidates_for(rows, 10)
        jobs += [(count, built.cells.count // part) for part in VISITED if built.cells.count > part]
    times, hits10, hits100 = (np.empty((len(jobs), len(asked))) for _ in range(3))
    for turn in range(len(asked)):  # all jobs in turn: what else runs slows them alike
        for job, (count, visit) in enumerate(jobs):
            number = (turn + 13 * job) % len(asked)  # not the rows that the job before has read
            best = truth[number]
            call = partial(proposed_best, index, built, asked[number], count, visit)
            times[job, number], found = timed(call)
            hits10[job, number] = np.isin(best[:10], found[:10]).mean()
            hits100[job, number] = np.isin(best, found).mean()
    vectors, _ = prepare(index, asked, METRIC)
    for job, (count, visit) in enumerate(jobs):
        record: dict[str, Any] = {
            "what": "accelerated", "rows": rows, "dim": dim, "candidates": count,
            "visit": visit, "share": built.share(vectors.astype(np.float32), count, visit),
            "recall10": float(hits10[job].mean()), "recall100": float(hits100[job].mean()),
            "p50": quantile(times[job], 0.5), "p99": quantile(times[job], 0.99),
        }  # fmt: skip
        records.append(record)
        lines.append(
            f"| {count:,} | {'all' if visit is None else format(visit, ',')} "
            f"| {record['share']:.0%} | {record['recall10']:.4f} | {record['recall100']:.4f} "
            f"| {record['p50'] * 1e3:.1f} | {record['p99'] * 1e3:.1f} |"
        )


def proposed_best(
    index: StoredIndex, built: Accelerator, query: Float64, count: int, visit: int | None
) -> Int64:
    """The 100 best of the candidates for one query [dim]."""
    vectors, scale = prepare(index, query[None], METRIC)
    single = np.ascontiguousarray(vectors, dtype=np.float32)
    proposed = built.candidates(single, count, index.ok_positions, visit)
    found: Int64 = rescored(index, single, scale, proposed, min(100, count))[1][0]
    return found


def on_gpu(
    index: StoredIndex,
    asked: Float64,
    truth: Int64,
    records: list[Any],
    lines: list[str],
) -> None:
    """Exact on a GPU: its own time, and the whole search with scores from the processor."""
    vectors, scale = prepare(index, asked, METRIC)
    seconds, resident = timed(lambda: gpu.Resident(index, scale, METRIC))
    note(records, lines, "copy rows to the GPU", seconds=seconds)
    everything = index.ok_positions

    def propose(query: Float32, top: int) -> list[Int64]:
        return resident.candidates(query, min(2 * top + 64, len(everything)), everything) or []

    figures = proposals(index, vectors.astype(np.float32), scale, truth, propose)
    note(records, lines, "GPU, a query", **figures, selectors=gpu.honours_selectors())


def codes_on_gpu(
    index: StoredIndex,
    asked: Float64,
    truth: Int64,
    memory: int,
    records: list[Any],
    lines: list[str],
) -> None:
    """Codes in a GPU's memory, scanned in all cells and in some, with scores from the processor."""
    vectors, scale = prepare(index, asked, METRIC)
    before = gpu.room()
    seconds, held = timed(lambda: gpu.hold(index, scale, METRIC, memory))
    if held is None:
        raise IndexStoreError(f"--gpu-memory {memory}: the GPU has less free")
    after = gpu.room()
    taken = (
        {}
        if before is None or after is None
        else {"bytes_a_row": (before - after) / index.manifest.rows}
    )
    note(records, lines, "make codes on the GPU", seconds=seconds, **taken)
    everything = index.ok_positions
    for visit in (None, *(cell_count(index.manifest.rows) // part for part in (2, 4, 8))):

        def propose(query: Float32, top: int, visit: int | None = visit) -> list[Int64]:
            return held.candidates(query, top, everything, visit) or []

        figures = proposals(index, vectors.astype(np.float32), scale, truth, propose)
        cells = "all" if visit is None else f"{visit:,}"
        note(records, lines, f"codes on the GPU, {cells} cells, a query", **figures)


def proposals(
    index: StoredIndex,
    queries: Float32,
    scale: Float32,
    truth: Int64,
    propose: Callable[[Float32, int], list[Int64]],
) -> dict[str, float]:
    """Times to propose the 10 best, without and with their exact scores, and what is found."""
    own, whole, hits10, hits100 = [], [], [], []
    for query, best in zip(queries, truth, strict=True):
        seconds, proposed = timed(partial(propose, query[None], 10))
        more, found = timed(partial(rescored, index, query[None], scale, proposed, 10))
        own.append(seconds)
        whole.append(seconds + more)
        hits10.append(np.isin(best[:10], found[1]).mean())
        _, found = rescored(index, query[None], scale, propose(query[None], 100), 100)
        hits100.append(np.isin(best, found).mean())
    first = len(own) // 10  # the first queries warm up
    return {
        "p50": quantile(own[first:], 0.5),
        "p99": quantile(own[first:], 0.99),
        "with_scores_p50": quantile(whole[first:], 0.5),
        "with_scores_p99": quantile(whole[first:], 0.99),
        "recall10": float(np.mean(hits10)),
        "recall100": float(np.mean(hits100)),
    }


def note(records: list[Any], lines: list[str], what: str, **values: float) -> None:
    """Add a measurement to both outputs."""
    records.append({"what": what, **values})
    lines.append(f"- {what}: " + ", ".join(f"{n} {v:.4g}" for n, v in values.items()))


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call took, and what it gave."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def quantile(values: list[float] | Float64, q: float) -> float:
    return float(np.quantile(values, q))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes by which this process's own memory (mapped files left out) rose at most."""
    peak, stop = [0], threading.Event()
    with suppress(AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before would hide what is taken now
    before = _own_memory()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], _own_memory() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def _own_memory() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
