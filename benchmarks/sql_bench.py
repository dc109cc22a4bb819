"""`headwater bench sql`: filters and joins over the items of a large index, cold and warm.

An index of N items as wide as real ones is written (its feature rows are one number: they are not
read here), with as many hits as asked for. Each query runs as `headwater sql` runs it: the index
is opened, its footers read, the text checked, a new connection made. `cold`: the first time in a
process of its own, imports not counted; files may lie in the system's cache. `warm`: the median of
RUNS in this process.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from headwater.index import Catalog, IndexWriter, StoredIndex, part_name, sql
from headwater.index.parts import encode_items, write_part

RUNS = 20
PART_ITEMS = 2048
HITS = 1000
QUERIES = {
    "filter and join with hits": (
        "SELECT rank, score, item_id, caption, rights_holder, position FROM hits "
        "JOIN items USING (item_id) WHERE licence <> 'proprietary' AND width >= 512 ORDER BY rank"
    ),
    "roll-up of hits": (
        "SELECT rights_holder, licence, count(*) AS n, sum(score) AS score FROM hits "
        "JOIN items USING (item_id) GROUP BY ALL ORDER BY n DESC LIMIT 20"
    ),
    "filter by text, count": "SELECT count(*) FROM items WHERE caption ILIKE '%red house%'",
    "group all items": "SELECT licence, count(*) FROM items GROUP BY ALL",
}
WHERE = "licence = 'MIT' AND caption ILIKE '%cat%'"
WORDS = (
    *("a", "the", "of", "cat", "dog", "red", "house", "painting", "photo", "by", "studio", "sky"),
    *("old", "bright", "river", "stone", "city", "woman", "man", "portrait", "wide", "detailed"),
)


def run(count: int, folder: Path | None, say: Callable[[str], None]) -> None:
    """Measure on an index of `count` items, made in `folder` or for the time of the measurement."""
    with tempfile.TemporaryDirectory() as temporary:
        index = (folder or Path(temporary)) / f"items-{count}"
        if not index.exists():
            started = time.perf_counter()
            _write_index(index, count)
            say(f"{count:,} items written in {time.perf_counter() - started:.0f} s")
        hits = Path(temporary) / "result.json"
        _write_hits(hits, count)
        size = sum(path.stat().st_size for path in (index / "items").iterdir())
        say(f"{platform.processor() or platform.machine()}, {size / count:.0f} bytes per item")
        say(f"{'':28} cold s  warm s (median of {RUNS})")
        for name, query in QUERIES.items():
            cold, warm = _cold(index, hits, name), _warm(_asks(index, query, hits))
            say(f"{name:28} {cold:6.3f}  {warm:6.3f}")
        say(f"{'--where, first of a process':28} {_cold(index, hits, ''):6.3f}")
        stored = StoredIndex.open(index)
        later = _warm(lambda: Catalog(stored).select(WHERE))
        say(f"{'--where, later ones':28} {'':6}  {later:6.3f}")


def _asks(index: Path, query: str, hits: Path) -> Callable[[], object]:
    return lambda: sql(index, query, hits=hits)


def _warm(work: Callable[[], object]) -> float:
    work()
    return float(np.median([_seconds(work) for _ in range(RUNS)]))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _cold(index: Path, hits: Path, name: str) -> float:
    command = [sys.executable, "-m", "headwater.benchmarks.sql_bench", str(index), str(hits), name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _first(index: Path, hits: Path, name: str) -> float:
    pa.array([1])  # Arrow imports pandas, where it is there, for its first array
    if name:
        return _seconds(_asks(index, QUERIES[name], hits))
    return _seconds(lambda: Catalog(StoredIndex.open(index)).select(WHERE))


def _write_index(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    with IndexWriter.create(folder, feature_space_id="none", recipe={}, dim=1) as writer:
        shards = []
        no_thumbs = pa.table(
            {"item_id": pa.array([], pa.string()), "image": pa.array([], "binary")}
        )
        for number, items in enumerate(_items(count, rng)):
            name = part_name(number)
            rows = np.ones((items.num_rows, 1), np.float32)
            shards.append(write_part(folder, name, encode_items(name, items, rows, 1), no_thumbs))
        writer.add_parts(shards, len(shards))
        writer.finish()


def _items(count: int, rng: np.random.Generator) -> Iterator[pa.Table]:
    licences = np.array(["CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "MIT", "proprietary"])
    for first in range(0, count, PART_ITEMS):
        n = min(PART_ITEMS, count - first)
        digests = [rng.bytes(32).hex() for _ in range(n)]
        lengths = rng.integers(5, 25, n)
        yield pa.table(
            {
                "item_id": [f"corpus-{first + i:09d}" for i in range(n)],
                "sha256": digests,
                "phash": [digest[:16] for digest in digests],
                "uri": [f"https://images.example.org/{d[:2]}/{d[2:20]}.jpg" for d in digests],
                "caption": [" ".join(rng.choice(WORDS, length)) for length in lengths],
                "licence": licences[rng.integers(0, 5, n)],
                "rights_holder": [f"holder {k}" for k in rng.zipf(1.3, n) % 5000],
                "source": np.array(["one", "two", "own"])[rng.integers(0, 3, n)],
                "width": pa.array(rng.integers(256, 2048, n), pa.int32()),
                "height": pa.array(rng.integers(256, 2048, n), pa.int32()),
                "aesthetic": pa.array(rng.normal(5, 1, n), pa.float32()),
                "similarity": pa.array(rng.random(n).astype(np.float16)),
                "tags": [[f"tag {t}" for t in rng.integers(0, 100, 3)] for _ in range(n)],
                "status": ["ok"] * n,
                "error": pa.nulls(n, pa.string()),
                "gradient_norm": pa.array(rng.lognormal(size=n), pa.float32()),
            }
        )


def _write_hits(path: Path, count: int) -> None:
    rng = np.random.default_rng(1)
    chosen = rng.choice(count, min(HITS, count), replace=False)
    hits = [
        {"rank": rank, "item_id": f"corpus-{place:09d}", "score": 1 / rank}
        for rank, place in enumerate(chosen.tolist(), start=1)
    ]
    path.write_text(json.dumps({"hits": hits}))


if __name__ == "__main__":
    print(_first(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
