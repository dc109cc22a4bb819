"""`headwater bench sql` runs from end to end, on a small index that it makes."""

from __future__ import annotations

from pathlib import Path

from conftest import Command

from headwater.benchmarks.sql_bench import HITS, QUERIES, WHERE
from headwater.index import Catalog, StoredIndex, verify


def test_the_benchmark_makes_an_index_and_times_every_query(
    headwater: Command, tmp_path: Path
) -> None:
    code, out, err = headwater("bench", "sql", "--items", 3000, "--in", tmp_path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    for name in QUERIES:
        (line,) = [line for line in lines if line.startswith(name)]
        cold, warm = (float(number) for number in line.removeprefix(name).split())
        assert min(cold, warm) > 0
    index = tmp_path / "items-3000"
    assert verify(index).whole
    assert StoredIndex.open(index).manifest.rows == 3000 > HITS
    assert 0 < len(Catalog(StoredIndex.open(index)).select(WHERE)) < 3000
