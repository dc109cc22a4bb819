"""`headwater sql` runs queries alone, of nothing but the index, and says in a line why not."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_index_sql import write_index

from headwater.index import IndexStoreError, sql


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("sql") / "it's [1]*?")


REFUSED = [
    ("licence = 'MIT'", "condition alone; write SELECT"),
    ("WHERE licence = 'MIT'", "condition alone; write SELECT"),
    ("licence IS NULL -- the free ones", "condition alone; write SELECT"),
    ("", "it holds 0 statements"),
    ("-- nothing", "it holds 0 statements"),
    ("SELEC * FROM items", "Parser Error"),
    ("SELECT nope FROM items", 'Referenced column "nope"'),
    ("SELECT * FROM hits", "there is no table hits; there are items (give a result: --hits"),
    ("SELECT * FROM other", "there is no table other"),
    ("SELECT 1; SELECT 2", "it holds 2 statements"),
    ("SELECT 1; DROP VIEW items", "only a query can run"),
    ("SELECT 1) ; COPY (SELECT 1", "Parser Error"),
    ("SELECT 1) UNION ALL (SELECT 2", "Parser Error"),
    ("SELECT CAST('x' AS INTEGER)", "Could not convert"),
    ("SELECT ?", "Invalid Input Error"),
    ("PRAGMA version", "only a query"),
    ("CALL pragma_version()", "only a query"),
    ("SET enable_external_access = true", "only a query"),
    ("SET allowed_directories = ['/']", "only a query"),
    ("RESET lock_configuration", "only a query"),
    ("ATTACH 'SECRET.db'", "only a query"),
    ("INSTALL httpfs", "only a query"),
    ("LOAD httpfs", "only a query"),
    ("COPY items TO 'LOOT'", "only a query"),
    ("COPY (SELECT 1) TO 'PART' (FORMAT csv, USE_TMP_FILE false)", "only a query"),
    ("EXPORT DATABASE 'LOOT'", "only a query"),
    ("CREATE TABLE t AS FROM items", "only a query"),
    ("INSERT INTO parts VALUES (1, 2)", "only a query"),
    ("EXPLAIN ANALYZE SELECT 1", "only a query"),
    ("WITH x AS (COPY (SELECT 1) TO 'PART' (FORMAT csv, USE_TMP_FILE false)) FROM x",
     "only a query can run here, not COPY"),
    ("WITH x AS (COPY (SELECT 1) TO 'LOOT') FROM x", "not COPY"),
    ("WITH x AS (INSERT INTO parts VALUES (1, 2) RETURNING *) FROM x", "not INSERT"),
    ("WITH x AS (DELETE FROM tombstones RETURNING *) FROM items", "not DELETE"),
    ("SELECT * FROM 'SECRET'", "there is no table"),
    ("SELECT * FROM 'PART'", "there is no table"),
    ('SELECT * FROM "/etc/passwd"', "there is no table /etc/passwd"),
    ("SELECT (SELECT count(*) FROM 'SECRET')", "there is no table"),
    ("SELECT * FROM items JOIN (FROM 'SECRET') ON true", "there is no table"),
    ("DESCRIBE 'SECRET'", "there is no table"),
    ("SUMMARIZE 'SECRET'", "there is no table"),
    ("WITH \"/etc/passwd\" AS (SELECT 1) FROM \"/etc/passwd\"", "other signs than letters"),
    ("FROM parts", "there is no table parts"),
    ("FROM tombstones", "there is no table tombstones"),
    ("FROM duckdb_settings", "there is no table"),
    ("FROM information_schema.tables", "there is no table information_schema.tables"),
    ("FROM memory.main.items", "there is no table memory.main.items"),
    ("FROM sqlite_master", "there is no table"),
    ("SHOW TABLES", "SHOW is not allowed"),
    ("SHOW ALL TABLES", "SHOW is not allowed"),
    *((f"FROM {name}('SECRET')", f"the table function {name} is not allowed")
      for name in ("read_csv", "read_text", "read_blob", "read_json", "glob", "sniff_csv",
                   "read_duckdb", "parquet_metadata", "query", "query_table")),
    *((f"FROM {name}('PART')", f"the table function {name} is not allowed")
      for name in ("read_parquet", "parquet_scan", "parquet_schema", "read_blob")),
    ("FROM query('FROM read_text(''SECRET'')')", "query is not allowed"),
    ("FROM duckdb_settings()", "duckdb_settings is not allowed"),
    ("FROM enable_logging(storage_path = 'LOOT')", "enable_logging is not allowed"),
    ("FROM enable_profiling()", "enable_profiling is not allowed"),
    ("SELECT getenv('HOME')", "getenv"),
    ("SELECT current_setting('allowed_paths')", "current_setting is not allowed"),
    ("SELECT pg_sleep(9)", "sleep_ms is not allowed"),
    ("SELECT write_log('x')", "write_log is not allowed"),
    ("SELECT list_transform([1], lambda x: (SELECT content FROM read_text('SECRET')))",
     "read_text is not allowed"),
    ("SELECT " + "NOT " * 900 + "true", "nested too deeply"),
]  # fmt: skip


def named(query: str, index: Path) -> str:
    """The query with the places that stand for files."""
    part = next((index / "items").iterdir())
    outside = index.parent
    return (
        query.replace("SECRET", str(outside / "secret.parquet").replace("'", "''"))
        .replace("PART", str(part).replace("'", "''"))
        .replace("LOOT", str(outside / "loot").replace("'", "''"))
    )


@pytest.fixture
def besieged(index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An index beside a secret; afterwards nothing may have changed or appeared anywhere near."""
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"content": ["a red cat"]}), index.parent / "secret.parquet")

    def state() -> dict[Path, bytes]:
        near = [*index.parent.rglob("*"), *tmp_path.rglob("*")]
        return {path: path.read_bytes() for path in near if path.is_file()}

    before = state()
    yield index
    assert state() == before


@pytest.mark.parametrize(
    "name", ["duckdb_tables", "PG_TABLES", "sqlite_master", "parts", "tombstones"]
)
def test_a_with_name_does_not_open_the_catalog(index: Path, name: str) -> None:
    query = f"SELECT * FROM (WITH {name} AS (SELECT 1 AS a) FROM {name}) AS y, {name}"
    with pytest.raises(IndexStoreError, match="is that of an internal table"):
        sql(index, query)


@pytest.mark.parametrize(("query", "reason"), REFUSED)
def test_everything_else_is_refused_in_one_line(
    besieged: Path, query: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.getrecursionlimit", lambda: 1000)
    with pytest.raises(IndexStoreError) as caught:
        sql(besieged, named(query, besieged))
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    assert "columns of items: position, item_id, caption" in message


@pytest.mark.parametrize(
    "query",
    [
        "COPY items TO 'LOOT'",
        "WITH x AS (COPY (SELECT 1) TO 'LOOT') FROM x",
        "WITH x AS (COPY (SELECT 1) TO 'PART' (FORMAT csv, USE_TMP_FILE false)) FROM x",
        "WITH x AS (INSERT INTO parts VALUES (1, 2) RETURNING *) FROM x",
        "COPY (SELECT 1) TO 'PART' (FORMAT csv, USE_TMP_FILE false)",
        "SELECT 1); COPY (SELECT 1) TO 'PART' (FORMAT csv, USE_TMP_FILE false); (SELECT 1",
        "FROM 'SECRET'",
        "FROM read_parquet('SECRET')",
        "FROM read_text('/etc/passwd')",
        "FROM glob('/etc/*')",
        "ATTACH 'LOOT'",
        "LOAD httpfs",
        "SELECT 1); SET allowed_directories = ['/']; (SELECT 1",
        "SELECT 1); SET threads = 1; (SELECT 1",
    ],
)
def test_the_second_wall_holds_alone(
    besieged: Path, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("headwater.index.sql"), "_check", lambda text, views: None)
    reasons = "disabled|top level|Parser Error|more than one|LOAD does not exist"
    with pytest.raises(IndexStoreError, match=reasons):
        sql(besieged, named(query, besieged))


def test_local_variables_are_no_tables(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("headwater.index.sql"), "_check", lambda text, views: None)
    for name in ("table", "columns", "connection"):
        with pytest.raises(IndexStoreError, match=r"does not exist|syntax error"):
            sql(index, f"SELECT * FROM {name}")
