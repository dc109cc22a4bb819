"""Locked DuckDB connections: they read the items of one index, or one table, and nothing else.

The text that runs in them comes from strangers, so nothing of the outside is reachable: no file
but the index's own items parts, no network, no extension, no setting. DuckDB would still let a
text *write* to the files it may read; who runs whole statements must therefore run them as a
subquery, in which DuckDB binds no statement that writes (`sql.py`).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from .errors import IndexStoreError
from .reader import StoredIndex

_LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}
# Columns that DuckDB itself gives to a Parquet file, on which the position rests.
_OF_THE_SCAN = ("file_index", "file_row_number")


class Forbidden(Exception):
    """What a text must not contain, in words."""


def connect(files: Sequence[str] = ()) -> duckdb.DuckDBPyConnection:
    """Open a database in memory that can read `files` and has no other access to the outside."""
    connection = duckdb.connect(":memory:", config=_LOCKED)
    # Large sorts may spill: DuckDB makes this folder when it must, and removes it when it closes.
    spill = os.path.join(tempfile.gettempdir(), f"headwater-{uuid.uuid4().hex}")
    connection.execute("SET temp_directory = ?", [spill])
    connection.execute("SET allowed_paths = ?", [list(files)])
    connection.execute("SET enable_external_access = false")
    return connection


def lock(connection: duckdb.DuckDBPyConnection) -> None:
    """Let no later statement change a setting."""
    connection.execute("SET lock_configuration = true")


def connect_items(index: StoredIndex, *, deleted: bool) -> duckdb.DuckDBPyConnection:
    """Open a connection with the view `items` over the items parts of an index, not locked yet.

    The view has a column `position_name(...)`, then every item column; rows with a tombstone only
    with `deleted`. A query reads the columns and row groups it needs, from the files themselves.
    """
    schema, uniform = index.item_schema, index.uniform_items
    for name in schema.names:
        if name.lower() in _OF_THE_SCAN:
            raise IndexStoreError(
                f"column {name!r} of {index.folder} has a name that DuckDB gives to its own; "
                "ingest with that column renamed to filter or to query the items"
            )
    folder = index.folder.resolve()
    files = [str(folder / "items" / f"{shard.name}.parquet") for shard in index.manifest.shards]
    # Both forms are looked at: the pattern when it is expanded, the name when it is opened.
    patterns = [_literal(file) for file in files]
    connection = connect([*files, *patterns])
    counts = [shard.items for shard in index.manifest.shards]
    parts = pa.table(
        {
            "number": pa.array(np.arange(len(counts), dtype=np.uint64)),
            "first": pa.array(np.cumsum([0, *counts[:-1]], dtype=np.int64)),
        }
    )
    _make_table(connection, "parts", parts)
    where = ""
    if not deleted and len(index.deleted_positions):
        _make_table(
            connection, "tombstones", pa.table({"position": pa.array(index.deleted_positions)})
        )
        where = f"WHERE {_POSITION} NOT IN (SELECT position FROM tombstones)"
    connection.execute(
        f"CREATE VIEW items AS SELECT {_POSITION} AS {position_name(schema.names)}, item.* "
        f"FROM read_parquet([{', '.join(map(_quoted, patterns))}], "
        # A folder of the path may look like `licence=MIT`, which would become a column.
        f"hive_partitioning = false, union_by_name = {not uniform}) AS item "
        f"LEFT JOIN parts ON item.file_index = parts.number {where}"
    )
    return connection


_POSITION = "(parts.first + item.file_row_number)"


def position_name(columns: Sequence[str]) -> str:
    """The name of the column of positions: `position`, with `_` before it while that is taken."""
    taken = {name.lower() for name in columns}
    name = "position"
    while name in taken:
        name = f"_{name}"
    return name


def scannable(table: pa.Table) -> pa.Table:
    """Widen half precision, which DuckDB cannot scan from Arrow, to single."""
    fields = [
        field.with_type(pa.float32()) if pa.types.is_float16(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def parse(connection: duckdb.DuckDBPyConnection, text: str) -> list[dict[str, Any]]:
    """Return the syntax trees of the queries in `text`.

    Raises Forbidden when it does not parse, or holds a statement that is no query.
    """
    row = connection.execute("SELECT json_serialize_sql(?)", [text]).fetchone()
    tree = json.loads(row[0] if row else "{}")
    if tree.get("error", True):
        raise Forbidden(f"Parser Error: {tree.get('error_message', 'no expression')}")
    return [statement["node"] for statement in tree["statements"]]


def parse_expression(connection: duckdb.DuckDBPyConnection, expression: str) -> dict[str, Any]:
    """Return the syntax tree of one expression; raises Forbidden when the text is not just that."""
    # The newline ends a comment in `expression`, which would swallow the bracket.
    (frame,) = parse(connection, "SELECT (true\n)")
    trees = parse(connection, f"SELECT ({expression}\n)")
    found = trees[0].pop("select_list", []) if len(trees) == 1 else []
    del frame["select_list"]
    # A text like `true) FROM t WHERE (true` would close our bracket and go on.
    if len(found) != 1 or trees[0] != frame:
        raise Forbidden("it is not one expression")
    tree: dict[str, Any] = found[0]
    return tree


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every node of a syntax tree."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            yield from nodes(child)


def check_call(
    connection: duckdb.DuckDBPyConnection,
    node: dict[str, Any],
    check: Callable[[dict[str, Any]], None],
    harmless: Collection[str] = (),
) -> None:
    """Let `node` call no function whose value depends on more than its arguments.

    `check` is given every node of a macro of DuckDB's own that it calls, in which such a function
    might hide; `harmless` ones may be called all the same. Raises Forbidden.
    """
    if node.get("class") != "FUNCTION":
        return
    name = str(node["function_name"]).lower()
    impure, macros = _functions()
    if name in impure and name not in harmless:
        raise Forbidden(f"the function {name} is not allowed: it reads more than its arguments")
    for definition in macros.get(name, ()):
        for inner in nodes(parse_expression(connection, definition)):
            check(inner)


@cache
def _functions() -> tuple[frozenset[str], dict[str, list[str]]]:
    """Names of DuckDB's impure functions, and its macros with their definitions."""
    with connect() as connection:
        rows = connection.execute(
            "SELECT lower(function_name), macro_definition FROM duckdb_functions() "
            "WHERE (function_type = 'scalar' AND stability <> 'CONSISTENT') "
            "OR (function_type = 'macro' AND macro_definition IS NOT NULL)"
        ).fetchall()
    definitions: dict[str, list[str]] = {}
    for name, definition in rows:
        if definition is not None:
            definitions.setdefault(name, []).append(definition)
    return frozenset(name for name, definition in rows if definition is None), definitions


def _make_table(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.register("incoming", table)
    connection.execute(f"CREATE TABLE {name} AS FROM incoming")
    connection.unregister("incoming")


def _literal(path: str) -> str:
    """The pattern that only the file `path` matches: folders may have names like `a[1]`."""
    return re.sub(r"[*?\[]", r"[\g<0>]", path)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
