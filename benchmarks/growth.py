"""Measures whether an ingest slows down or grows in memory with the rows already written.

    python benchmarks/growth.py --corpus CORPUS.parquet --model MODEL_DIR --rows 100000 \\
        --devices cuda:0 --batch 1024 --out growth.md

The corpus is repeated under new ids until there are rows enough. One ingest; its rate is that
between two sizes, its memory the resident set of the process that collects and writes the rows.
The processor's time is that of this process: beside other work it says more than the rate.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from headwater import Model, Recipe, build_index
from headwater.ingest import Progress, devices_named, kind_of

MARKS = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000)
CHUNK = 1_000  # rows of a row group of the repeated corpus


def main() -> None:
    """Ingest once and say what each decade of rows cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--timesteps", type=int, default=10, help="fewer leave more to the writing")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    names = devices_named(args.devices)
    kind = kind_of(names[0]) if names else "cpu"
    dtype = "bfloat16" if kind == "cuda" else "float32"
    model = Model.from_pretrained(args.model, device="cpu", dtype=dtype)
    points: list[Point] = []

    def note(step: Progress) -> None:
        points.append(Point(step.done, step.elapsed, time.process_time(), resident()))
        if step.done // 10_000 != (step.done - args.batch) // 10_000:
            print(f"{step.done:,} rows after {step.elapsed:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.parquet"
        repeat(args.corpus, corpus, args.rows)
        started = time.perf_counter()
        build_index(
            corpus,
            model,
            Path(folder) / "index",
            recipe=Recipe(timesteps=args.timesteps),
            batch_size=args.batch,
            devices=names,
            compile=False,
            progress=note,
        )
        whole = time.perf_counter() - started
    machine = torch.cuda.get_device_name() if kind == "cuda" else kind
    text = "\n".join(
        [
            f"{machine}, {args.devices}, torch {torch.__version__}, {args.rows:,} images, batch "
            f"{args.batch}, {args.timesteps} noise levels, {whole:.0f} s in all\n",
            "| rows | img/s since the line before | CPU s per 1,000 rows | resident, MiB |",
            "|---|---|---|---|",
            *lines(points),
        ]
    )
    print(text)
    args.out.write_text(text + "\n")


@dataclass(frozen=True)
class Point:
    """Where an ingest was after a batch."""

    done: int
    elapsed: float  # seconds
    processor: float  # seconds
    memory: float  # MiB


def lines(points: list[Point]) -> list[str]:
    """One line a mark: rate since the mark before, memory there; the first batch warms up."""
    found, before = [], points[0]
    for mark in (*MARKS, points[-1].done):
        here = next((point for point in points if point.done >= mark), None)
        if here is None or here.done <= before.done:
            continue
        rows = here.done - before.done
        rate = rows / (here.elapsed - before.elapsed)
        cost = (here.processor - before.processor) / rows * 1000
        found.append(f"| {here.done:,} | {rate:.0f} | {cost:.2f} | {here.memory:,.0f} |")
        before = here
    return found


def repeat(source: Path, target: Path, rows: int) -> None:
    """Write `rows` rows: the source's again and again, its `image_id` numbered by the round."""
    table = pq.read_table(source)
    identity = table.schema.get_field_index("image_id")
    ids = table["image_id"].to_pylist()
    with pq.ParquetWriter(target, table.schema) as writer:
        for first in range(0, rows, CHUNK):
            numbers = np.arange(first, min(first + CHUNK, rows))
            places = numbers % len(table)
            named = [f"{ids[p]}~{n // len(table)}" for p, n in zip(places, numbers, strict=True)]
            chunk = table.take(pa.array(places))
            writer.write_table(chunk.set_column(identity, "image_id", pa.array(named)))


def resident() -> float:
    """MiB of this process now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


if __name__ == "__main__":
    main()
