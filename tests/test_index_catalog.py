"""`--where`: the filters people write work, everything else is refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from headwater.index import (
    Catalog,
    IndexStoreError,
    IndexWriter,
    StoredIndex,
    filter_positions,
)

ITEMS = pa.table(
    {
        "item_id": ["a", "b", "c", "d"],
        "caption": ["a red cat", "a dog; asleep", "Cat's cradle", "cat"],
        "licence": ["CC0-1.0", "MIT", None, "MIT"],
        "group": ["animals", "animals", "toys", "animals"],
        "width": [64, 128, 64, 32],
        "tags": [["x"], ["x", "y"], None, []],
        "half": pa.array([1.0, 2.0, 3.0, 4.0], pa.float16()),
        "status": ["ok", "ok", "ok", "quarantined"],
        "error": pa.array([None, None, None, "empty file"]),
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("caption ILIKE '%cat%'", [0, 2, 3]),
        ("licence = 'MIT'", [1, 3]),
        ("licence <> 'MIT'", [0]),  # NULL is not true
        ("licence IS NULL OR width >= 128", [1, 2]),
        ("\"group\" IN ('toys')", [2]),
        ("caption LIKE '%;%'", [1]),
        ("caption = 'Cat''s cradle'", [2]),
        ("length(caption) BETWEEN 1 AND 3 -- a comment", [3]),
        ("list_contains(tags, 'y')", [1]),
        ("len(list_filter(tags, lambda t: t = 'x')) = 2 - 1", [0, 1]),
        ("regexp_matches(upper(caption), '^CAT')", [2, 3]),
        ("CASE WHEN width > 100 THEN true ELSE false END", [1]),
        ("half > 2.5", [2, 3]),
        ("false", []),
        ("true) OR (false", [0, 1, 2, 3]),  # odd, but one expression
    ],
)
def test_filters(where: str, expected: list[int]) -> None:
    found = filter_positions(ITEMS, where)
    assert found.dtype == np.int64
    assert found.tolist() == expected


def test_order_is_the_tables_even_over_many_rows() -> None:
    table = pa.table({"n": np.arange(300_000), "position": np.arange(300_000) % 7})
    found = filter_positions(table, "position = 3")
    np.testing.assert_array_equal(found, np.arange(3, 300_000, 7))


@pytest.fixture
def _usual_recursion_limit() -> Iterator[None]:
    """As Python starts with: compiling a model, in another test, raises it for good."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("_usual_recursion_limit")
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("nope = 1", 'Referenced column "nope"'),
        ("group = 'toys'", "Parser Error"),
        ("caption =", "Parser Error"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("caption = 'a", "Parser Error"),
        ("caption", "VARCHAR, not true or false"),
        ("width", "not true or false"),
        ("width > 'abc'", "Could not convert"),
        ("item_id = ?", "Error"),
        ("error('boo')", "error is not allowed"),
        ("count(*) > 1", "Error"),
        ("row_number() OVER () = 1", "Error"),
        ("true; DROP VIEW items", "Parser Error"),
        ("true); DROP VIEW items; SELECT (true", "Only SELECT"),
        ("true); SELECT (true", "not one expression"),
        ("true), (true", "not one expression"),
        ("true) FROM items WHERE (true", "not one expression"),
        ("true) ORDER BY (true", "not one expression"),
        ("true) UNION SELECT (true", "not one expression"),
        ("ATTACH 'x.db'", "Catalog Error"),
        ("COPY items TO 'x.csv'", "Parser Error"),
        ("PRAGMA version", "Parser Error"),
        ("caption IN (SELECT caption FROM items)", "subqueries are not allowed"),
        ("caption IN (SELECT content FROM read_text('SECRET'))", "subqueries"),
        ("EXISTS (FROM read_csv('SECRET'))", "subqueries"),
        ("EXISTS (FROM read_parquet('SECRET'))", "subqueries"),
        ("EXISTS (FROM 'SECRET')", "subqueries"),
        ("EXISTS (FROM glob('*'))", "subqueries"),
        ("EXISTS (FROM arrow_scan(1, 2, 3))", "subqueries"),
        ("len(list_transform([1], lambda x: (SELECT 1))) = 1", "subqueries"),
        ("(WITH x AS (SELECT 1) FROM x) = 1", "subqueries"),
        ("getenv('HOME') = 'x'", "getenv"),
        ("current_setting('threads') = '1'", "current_setting is not allowed"),
        ("NOT " * 900 + "true", "nested too deeply"),
        ("random() < 0.5", "random is not allowed"),
        ("pg_sleep(9) IS NULL", "sleep_ms is not allowed"),
        ("write_log('x') IS NULL", "write_log is not allowed"),
    ],
)
def test_refused(where: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"content": ["a red cat"]}), "SECRET")
    with pytest.raises(IndexStoreError) as caught:
        filter_positions(ITEMS, where)
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert message.startswith("--where ")
    assert message.endswith("columns: " + ", ".join(ITEMS.column_names))
    assert [path.name for path in tmp_path.iterdir()] == ["SECRET"]


@pytest.mark.parametrize("function", ["read_text", "read_csv", "read_parquet", "glob", "read_blob"])
def test_the_connection_itself_has_no_files(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second wall: should the walk over the expression ever miss something."""
    monkeypatch.setattr("headwater.index.catalog._check_expression", lambda where: None)
    secret = tmp_path / "secret.parquet"
    pq.write_table(pa.table({"content": ["a red cat"]}), secret)
    with pytest.raises(IndexStoreError, match="disabled by configuration"):
        filter_positions(ITEMS, f"EXISTS (FROM {function}('{secret}'))")


def test_the_connection_cannot_be_unlocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.index.catalog._check_expression", lambda where: None)
    with pytest.raises(IndexStoreError, match="locked"):
        filter_positions(ITEMS, "true); SET threads = 1; SELECT (true")


def test_local_variables_are_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwater.index.catalog._check_expression", lambda where: None)
    for name in ("scanned", "table"):  # as the code under test calls them
        with pytest.raises(IndexStoreError, match=f"{name} does not exist|disabled|syntax error"):
            filter_positions(ITEMS, f"caption IN (SELECT caption FROM {name})")


@pytest.fixture(params=[(4,), (1, 3)], ids=["one part", "two parts"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Catalog:
    """ITEMS as an index, in one part or in two."""
    folder = tmp_path / "licence=GPL [x]*"  # nothing in a path means something to DuckDB
    with IndexWriter.create(folder, feature_space_id="x", recipe={}, dim=2) as writer:
        for start, count in zip((0, *request.param), request.param, strict=False):
            items = ITEMS.slice(start, count)
            thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": []})
            writer.add_shard(items, np.ones((count, 2), np.float32), thumbs)
        writer.finish()
    return Catalog(StoredIndex.open(folder))


def test_catalog_selects_only_ok_items(catalog: Catalog) -> None:
    assert catalog.select().tolist() == [0, 1, 2]
    assert catalog.select("licence = 'MIT'").tolist() == [1]
    assert catalog.select("half > 1.5").tolist() == [1, 2]
    assert catalog.select("position = 2 OR width = 128").tolist() == [1, 2]
    assert catalog.select("false").tolist() == []
    found = catalog.select("true")
    assert found.dtype == np.int64
    assert found.tolist() == [0, 1, 2]
    with pytest.raises(IndexStoreError, match=r"--where 'nope = 1': .*; columns: item_id, caption"):
        catalog.select("nope = 1")


def test_catalog_rows_keep_order_and_every_column(catalog: Catalog) -> None:
    rows = catalog.rows([2, 0, 2])
    assert [row["item_id"] for row in rows] == ["c", "a", "c"]
    assert [row["group"] for row in rows] == ["toys", "animals", "toys"]
    assert list(rows[0]) == [*ITEMS.column_names, "row_norm", "row_weight"]
    assert catalog.rows([]) == []
    for outside in (-1, 4):
        with pytest.raises(IndexStoreError, match="rows 0 to 3"):
            catalog.rows([outside])


def test_catalog_summary(catalog: Catalog) -> None:
    summary = catalog.summary()
    assert (summary.rows, summary.ok, summary.quarantined) == (4, 3, 1)
    assert summary.reasons == {"empty file": 1}
    assert summary.columns["width"] == "int64"


def test_a_column_with_a_name_of_the_scan_is_refused_not_misread(tmp_path: Path) -> None:
    items = pa.table({"item_id": ["a"], "status": ["ok"], "error": pa.array([None], pa.string()),
                      "File_Index": [7]})  # fmt: skip
    with IndexWriter.create(tmp_path / "i", feature_space_id="x", recipe={}, dim=2) as writer:
        thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": []})
        writer.add_shard(items, np.ones((1, 2), np.float32), thumbs)
        writer.finish()
    with pytest.raises(IndexStoreError, match=r"'File_Index' .* renamed"):
        Catalog(StoredIndex.open(tmp_path / "i")).select("true")
