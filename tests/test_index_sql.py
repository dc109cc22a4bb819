"""`headwater sql`: queries answer as a plain loop does, and read nothing but the index."""

from __future__ import annotations

import csv
import io
import json
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command

import headwater as hw
from headwater.index import (
    IndexStoreError,
    IndexWriter,
    StoredIndex,
    sql,
    verify,
    write_csv,
    write_json_rows,
    write_parquet,
)

COUNT = 40
DELETED = (3, 17, 18)
LICENCES = ("MIT", "CC0-1.0", None)


def items(start: int, stop: int, **extra: Any) -> pa.Table:
    numbers = range(start, stop)
    return pa.table(
        {
            "item_id": [f"id{n}" for n in numbers],
            "caption": [f"a {'cat' if n % 2 else 'dog'}; number {n}" for n in numbers],
            "licence": pa.array([LICENCES[n % 3] for n in numbers], pa.string()),
            "width": pa.array([100 * n for n in numbers], pa.int32()),
            "half": pa.array([n / 2 for n in numbers], pa.float16()),
            "tags": [[f"t{n % 4}", "all"] for n in numbers],
            "filename": [f"{n}.png" for n in numbers],  # a name that DuckDB uses itself
            "status": ["quarantined" if n % 10 == 9 else "ok" for n in numbers],
            "error": pa.array(["broken" if n % 10 == 9 else None for n in numbers], pa.string()),
            **extra,
        }
    )


def no_thumbs() -> pa.Table:
    return pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})


def write_index(folder: Path, parts: tuple[int, ...] = (0, 7, 8, 25, COUNT)) -> Path:
    with IndexWriter.create(folder, feature_space_id="x", recipe={}, dim=2) as writer:
        for start, stop in pairwise(parts):
            rows = np.ones((stop - start, 2), np.float32)
            writer.add_shard(items(start, stop), rows, no_thumbs())
        writer.write_tombstones(np.array(DELETED))
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Nothing in the path may mean something to DuckDB: hive partitions, patterns, quotes.
    return write_index(tmp_path_factory.mktemp("sql") / "licence=GPL" / "it's [1]*?")


@pytest.fixture(scope="module")
def reference() -> list[dict[str, Any]]:
    rows = [{"position": n} | row for n, row in enumerate(items(0, COUNT).to_pylist())]
    return [row for row in rows if row["position"] not in DELETED]


def result_file(folder: Path, hits: Any) -> Path:
    path = folder / "result.json"
    path.write_text(json.dumps({"hits": hits}))
    return path


def test_every_column_and_row_as_written(index: Path, reference: list[dict[str, Any]]) -> None:
    table = sql(index, "SELECT * EXCLUDE (row_norm, row_weight) FROM items ORDER BY position")
    assert table.column_names == list(reference[0])
    assert table.to_pylist() == reference
    assert sql(str(index), "FROM items").num_rows == len(reference)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT count(*) FROM items", lambda r: [(len(r),)]),
        ("select item_id from items where licence='MIT' and width > 1500 order by 1;",
         lambda r: sorted((x["item_id"],) for x in r
                          if x["licence"] == "MIT" and x["width"] > 1500)),
        ("SELECT position FROM items WHERE width >= 2600 ORDER BY 1",  # skips whole parts
         lambda r: [(x["position"],) for x in r if x["width"] >= 2600]),
        ("SELECT position, filename FROM items WHERE filename = '26.png' -- one",
         lambda r: [(26, "26.png")]),
        ("SELECT status, count(*) FROM items GROUP BY ALL ORDER BY ALL",
         lambda r: [(s, sum(x["status"] == s for x in r)) for s in ("ok", "quarantined")]),
        ("SELECT max(half) FROM items", lambda r: [(max(x["half"] for x in r),)]),
        ("WITH cats AS (FROM items WHERE caption LIKE '%cat%') SELECT count(*) FROM cats",
         lambda r: [(sum("cat" in x["caption"] for x in r),)]),
        ("SELECT DISTINCT tag FROM items, unnest(tags) AS t(tag) ORDER BY 1",
         lambda r: sorted({(t,) for x in r for t in x["tags"]})),
        ("SELECT (SELECT count(*) FROM items), 1 UNION ALL VALUES (2, 3) ORDER BY 2",
         lambda r: [(len(r), 1), (2, 3)]),
        ("SELECT item_id FROM items ORDER BY position DESC LIMIT 2",
         lambda r: [("id39",), ("id38",)]),
        ("PIVOT items ON status IN ('ok') USING count(*) GROUP BY licence ORDER BY ALL LIMIT 1",
         lambda r: [("CC0-1.0", sum(x["licence"] == "CC0-1.0" and x["status"] == "ok"
                                    for x in r))]),
        ("WITH RECURSIVE n AS (SELECT 1 AS a UNION ALL SELECT a + 1 FROM n WHERE a < 3) FROM n",
         lambda r: [(1,), (2,), (3,)]),
        ("SELECT count(*) FROM items WHERE random() < 2 AND current_date > DATE '2020-01-01'",
         lambda r: [(len(r),)]),
        ("SELECT column_name FROM (DESCRIBE items) LIMIT 2",
         lambda r: [("position",), ("item_id",)]),
    ],
)  # fmt: skip
def test_answers_equal_a_plain_loop(
    index: Path, reference: list[dict[str, Any]], query: str, expected: Any
) -> None:
    rows = [tuple(row.values()) for row in sql(index, query).to_pylist()]
    assert rows == expected(reference)


def test_parts_with_other_columns_are_laid_end_to_end(tmp_path: Path) -> None:
    with IndexWriter.create(tmp_path / "i", feature_space_id="x", recipe={}, dim=2) as writer:
        writer.add_shard(items(0, 3), np.ones((3, 2), np.float32), no_thumbs())
        wide = items(3, 5, position=pa.array([70, 80]))
        writer.add_shard(wide, np.ones((2, 2), np.float32), no_thumbs())
        writer.finish()
    found = sql(tmp_path / "i", "SELECT _position, position, item_id FROM items ORDER BY ALL")
    assert found["_position"].to_pylist() == [0, 1, 2, 3, 4]
    assert found["position"].to_pylist() == [None, None, None, 70, 80]
    stored = StoredIndex.open(tmp_path / "i")
    assert stored.items_at([4, 0]).to_pylist() == stored.items().take([4, 0]).to_pylist()


def test_a_folder_named_like_a_pattern_is_not_its_neighbour(tmp_path: Path) -> None:
    write_index(tmp_path / "g1", (0, 5))
    for name in ("g[1]", "g*"):
        write_index(tmp_path / name)
        found = sql(tmp_path / name, "SELECT item_id FROM items WHERE position > 30 ORDER BY ALL")
        assert found["item_id"].to_pylist() == [f"id{n}" for n in range(31, COUNT)]
        assert verify(tmp_path / name).whole


def test_hits_of_a_result_are_a_view(index: Path, tmp_path: Path) -> None:
    given = [
        {"rank": k, "item_id": f"id{n}", "score": -0.5 * k, "p_value": p, "caption": "x"}
        for k, (n, p) in enumerate([(30, 0.5), (17, None), (4, 0.25)], start=1)
    ]
    path = result_file(tmp_path, given)
    hits = sql(index, "FROM hits", hits=path)
    assert hits.column_names == ["rank", "item_id", "score", "p_value"]  # no column of the item
    joined = sql(
        index, "SELECT rank, caption, score FROM hits JOIN items USING (item_id) ORDER BY rank",
        hits=path,
    )  # fmt: skip
    assert joined.to_pylist() == [  # 17 is deleted
        {"rank": 1, "caption": "a dog; number 30", "score": -0.5},
        {"rank": 3, "caption": "a dog; number 4", "score": -1.5},
    ]
    both = sql(index, "SELECT * FROM hits h JOIN items i USING (item_id) WHERE rank=1", hits=path)
    assert both["caption"].to_pylist() == ["a dog; number 30"]
    twice = sql(index, "SELECT i.item_id, h.item_id FROM items i, hits h LIMIT 1", hits=path)
    assert twice.column_names == ["item_id", "item_id_1"]
    assert sql(index, "FROM hits", hits=result_file(tmp_path, [])).num_rows == 0


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "nonsense", '{"hits": 3}', '{"hits": [{"rank": 1}]}', '{"hits": [3]}', "\xff",
     '{"hits": [{"rank": "x", "item_id": "a", "score": 1}]}',
     '{"hits": [{"rank": 1, "item_id": 5, "score": 1}]}'],
)  # fmt: skip
def test_what_is_no_result_is_refused(index: Path, tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(IndexStoreError, match=r"r\.json is no result of `headwater query --json`"):
        sql(index, "FROM hits", hits=path)
    with pytest.raises(IndexStoreError, match="there is no file"):
        sql(index, "FROM hits", hits=tmp_path / "none.json")


AWKWARD = """SELECT 1 AS a, 'nan'::DOUBLE AS n, DATE '2020-01-02' AS d, sum(width) AS s, NULL AS e,
    '\\xff'::BLOB AS b, {'x': [1, 2]} AS t, 'a,"b' AS q, 1.25::DECIMAL(5, 2) AS m FROM items"""


def test_results_as_files(index: Path, tmp_path: Path) -> None:
    table = sql(index, AWKWARD)
    total = sum(100 * n for n in range(COUNT) if n not in DELETED)
    write_json_rows(table, tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == [
        {"a": 1, "n": None, "d": "2020-01-02", "s": total, "e": None, "b": "ff",
         "t": {"x": [1, 2]}, "q": 'a,"b', "m": 1.25}
    ]  # fmt: skip
    write_csv(table, tmp_path / "it's.csv.gz")
    with (tmp_path / "it's.csv.gz").open() as file:
        assert list(csv.DictReader(file)) == [
            {"a": "1", "n": "nan", "d": "2020-01-02", "s": str(total), "e": "", "b": "\\xFF",
             "t": "{'x': [1, 2]}", "q": 'a,"b', "m": "1.25"}
        ]  # fmt: skip
    write_parquet(table, tmp_path / "r.parquet")
    row = pq.read_table(tmp_path / "r.parquet").to_pylist()[0]
    assert (row["d"], row["s"], row["b"]) == (date(2020, 1, 2), total, b"\xff")
    for write in (write_json_rows, write_csv, write_parquet):
        empty = sql(index, "SELECT item_id, tags FROM items WHERE false")
        write(empty, tmp_path / "empty")
        with pytest.raises(OSError, match="folder"):
            write(empty, tmp_path / "no folder" / "x")
    write_json_rows(empty, tmp_path / "empty")
    assert json.loads((tmp_path / "empty").read_text()) == []


def test_the_command_prints_a_table_and_says_when_it_is_cut(
    index: Path, headwater: Command, tmp_path: Path
) -> None:
    ordered = "SELECT item_id, width, licence FROM items ORDER BY position LIMIT 3"
    code, out, err = headwater("sql", index, ordered)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        ["item_id", "width", "licence"], ["id0", "0", "MIT"], ["id1", "100", "CC0-1.0"],
        ["id2", "200", "-"], ["3", "rows"],
    ]  # fmt: skip
    everything = "FROM items, range(3) SELECT item_id"
    _, out, _ = headwater("sql", index, everything)
    assert "the first 50 rows; there are more" in out
    _, out, _ = headwater("sql", index, "SELECT item_id FROM items", "--limit", 2)
    assert "the first 2 rows; there are more" in out
    _, out, _ = headwater("sql", index, "SELECT item_id FROM items", "--limit", COUNT)
    assert f"{COUNT - len(DELETED)} rows" in out
    code, out, err = headwater("sql", index, "SELECT '[bold]' AS \"[red]\"")
    assert "[bold]" in out
    assert "[red]" in out


def test_the_command_writes_files_and_standard_output(
    index: Path, headwater: Command, tmp_path: Path
) -> None:
    query = "SELECT rank, item_id FROM hits JOIN items USING (item_id) ORDER BY rank"
    hits = [{"rank": k, "item_id": f"id{k}", "score": 1.0} for k in (1, 2)]
    path = result_file(tmp_path, hits)
    code, out, _ = headwater("sql", index, query, "--hits", path, "--csv", "-")
    assert code == 0
    assert list(csv.reader(io.StringIO(out))) == [["rank", "item_id"], ["1", "id1"], ["2", "id2"]]
    _, out, _ = headwater("sql", index, query, "--hits", path, "--json", "-")
    assert json.loads(out) == [{"rank": 1, "item_id": "id1"}, {"rank": 2, "item_id": "id2"}]
    files = [tmp_path / name for name in ("o.csv", "o.json", "o.parquet")]
    code, out, err = headwater(
        "sql", index, "SELECT position FROM items, range(9)", "--csv", files[0], "--json", files[1],
        "--parquet", files[2],
    )  # fmt: skip
    count = 9 * (COUNT - len(DELETED))  # more than fit on the screen
    assert (code, out) == (0, "")
    assert err.count(f"{count} rows in ") == 3
    assert len(files[0].read_text().splitlines()) == count + 1
    assert len(json.loads(files[1].read_text())) == count
    assert pq.read_table(files[2]).num_rows == count
    headwater("sql", index, "FROM items", "--limit", 5, "--parquet", files[2])
    assert pq.read_table(files[2]).num_rows == 5


def test_the_command_fails_in_one_line(index: Path, headwater: Command, tmp_path: Path) -> None:
    for words, reason in [
        (("licence = 'MIT'",), "write SELECT * FROM items WHERE"),
        (("FROM items", "--csv", tmp_path / "none" / "x.csv"), "No such file or directory"),
        (("FROM items", "--hits", tmp_path / "none.json"), "there is no file"),
    ]:
        code, out, err = headwater("sql", index, *words)
        assert (code, out) == (2, "")
        assert reason in err
        assert len(err.splitlines()) == 1
    for words in (("--csv", "-", "--json", "-"), ("--parquet", "-")):
        assert headwater("sql", index, "FROM items", *words)[0] == 2


def test_a_missing_or_broken_part_is_named(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "i")
    part = folder / "items" / "part-00002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    with pytest.raises(IndexStoreError, match=r"part-00002\.parquet cannot be read"):
        sql(folder, "FROM items")
    part.unlink()
    with pytest.raises(IndexStoreError, match=r"part-00002\.parquet cannot be read"):
        sql(folder, "FROM items")


def test_the_public_name(index: Path) -> None:
    assert hw.sql(index, "SELECT 1 AS one").to_pylist() == [{"one": 1}]
    with pytest.raises(IndexStoreError, match="limit is -1"):
        hw.sql(index, "FROM items", limit=-1)
    assert hw.sql(index, "FROM items ORDER BY position", limit=2)["position"].to_pylist() == [0, 1]
