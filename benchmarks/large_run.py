"""What an ingest of very many images takes: time, money, disk and memory from measured constants.

    python -m headwater.benchmarks.large_run --images 1e8 --gpus 64 --gpu-hour 3.50

prints the tables of docs/hundred-million-images.md. Every constant here was measured, it says
where; what was not is a parameter.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

RANGE = 2048  # images of a range; headwater.ingest.plan.SHARD_ITEMS
# Images a second of one H200, SD-1.4-sized, compiled: benchmarks/results/speed.md
RATES = {"default (dtrak, 10 noise levels)": 17.99, "published (dps on inversion)": 3.49}

# On two cores that other work shared, 2026-11-22: a quiet machine is faster.
GRAM_ROWS = 3300  # rows a second and core added to a 2,048 x 2,048 float64 Gram matrix
MERGE_SECONDS = 0.20  # a range of 2,048 rows: read from the journal, three files written, fsynced
ASSIGN_SECONDS = 0.05  # a range handed to a worker: Ray, first batch read, last one waited for
SEARCH_ROWS = 195_000  # rows a second and core, one query, 2,048 wide, exact, file in memory
START_SECONDS = 100  # a worker until its first batch: processes, model, compiling (speed.md)

ITEM_BYTES = 138  # items file, 400 emoji with 23 columns, zstd
THUMB_BYTES = 3438  # WebP preview of a photograph of 512 x 600; of an emoji 1,109
LISTING_BYTES = 342  # a record of the source in memory, 18,453 emoji without their images
ID_BYTES = 207  # an item while the ingest ends: its id of 21 letters in records and sets
ITEMS_BYTES = 444  # a row of the items table in memory, 23 columns


@dataclass(frozen=True)
class Run:
    """What is asked about."""

    images: float
    gpus: int
    gpu_hour: float  # money
    dim: int
    image_bytes: float  # of an encoded image
    cores: int  # of the machine that drives
    disk: float  # bytes a second that it reads
    actors: int  # cores that search


def ingest_table(run: Run) -> list[tuple[str, ...]]:
    """Time and money of computing the rows, for each measured rate."""
    rows: list[tuple[str, ...]] = [("recipe", "GPU-hours", f"hours on {run.gpus} GPUs", "money")]
    ranges = run.images / RANGE
    for name, rate in RATES.items():
        seconds = run.images / rate + ranges * ASSIGN_SECONDS + run.gpus * START_SECONDS
        hours = seconds / 3600
        rows.append(
            (name, f"{hours:,.0f}", f"{hours / run.gpus:,.1f}", f"{hours * run.gpu_hour:,.0f}")
        )
    return rows


def end_table(run: Run) -> list[tuple[str, ...]]:
    """What one process does: merging beside the workers, then the curvature."""
    ranges = run.images / RANGE
    fastest = run.gpus * max(RATES.values())
    read = run.images * 2 * run.dim
    width = run.dim / 2048
    gram = run.images / (GRAM_ROWS / width**2 * run.cores)
    return [
        ("what the driver does", "how much", "takes"),
        ("merge ranges", f"{ranges:,.0f}", f"{MERGE_SECONDS * fastest / RANGE:.0%} of its time"),
        ("read the rows", gigabytes(read), f"{read / run.disk / 60:,.0f} min"),
        ("Gram matrix", f"{run.images:.0e} rows", f"{gram / 60:,.0f} min on {run.cores} cores"),
    ]


def space_table(run: Run) -> list[tuple[str, ...]]:
    """Bytes on disk and in memory."""
    features = 2 * run.dim
    return [
        ("what", "bytes an image", "in all"),
        *(
            (name, f"{each:,.0f}", gigabytes(each * run.images))
            for name, each in (
                ("source images", run.image_bytes),
                ("features", features),
                ("previews", THUMB_BYTES),
                ("items", ITEM_BYTES),
                ("index", features + THUMB_BYTES + ITEM_BYTES),
                ("memory: the source's listing, once a machine", LISTING_BYTES),
                ("memory: ids, in the driver at the end", ID_BYTES),
                ("memory: items table, adding to such an index", ITEMS_BYTES),
            )
        ),
    ]


def search_table(run: Run) -> list[tuple[str, ...]]:
    """One exact query over all rows."""
    width = run.dim / 2048
    memory = run.images * 2 * run.dim
    seconds = run.images * width / (SEARCH_ROWS * run.actors)
    return [
        ("exact search", ""),
        ("rows, in the memory of the actors' machines", gigabytes(memory)),
        (f"one query on {run.actors} cores", f"{seconds:.1f} s"),
        (
            "the same from disk, for each machine at its rate",
            f"{memory / run.disk:,.0f} s / machines",
        ),
    ]


def gigabytes(size: float) -> str:
    """Bytes as GB or TB."""
    return f"{size / 1e12:,.2f} TB" if size >= 1e12 else f"{size / 1e9:,.0f} GB"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=float, default=1e8)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--gpu-hour", type=float, default=3.5, help="price; an assumption")
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--image-bytes", type=float, default=61_000, help="an assumption")
    parser.add_argument("--cores", type=int, default=32, help="of the driver's machine")
    parser.add_argument("--disk", type=float, default=1e9, help="bytes a second; an assumption")
    parser.add_argument("--actors", type=int, default=256, help="cores that search")
    run = Run(**vars(parser.parse_args()))
    for table in (ingest_table, end_table, space_table, search_table):
        print(markdown(table(run)), end="\n\n")


if __name__ == "__main__":
    main()
