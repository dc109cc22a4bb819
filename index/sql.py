"""`headwater sql`: one query over the items of an index and the hits of a result, read-only.

The text may come from strangers. Two walls let it read the views `items`, `duplicates` and `hits`
and do nothing else. The parsed text is walked before it runs: one query, of query nodes only
(DuckDB takes COPY and INSERT as the body of a WITH), from these views and what the text itself
defines, through no table function that reaches further. And it runs as a subquery, in which DuckDB
binds no statement that writes, on a connection that can read the index's own items parts alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from .duck import (
    Forbidden,
    check_call,
    connect,
    connect_items,
    lock,
    nodes,
    parse,
    parse_expression,
    position_name,
)
from .errors import IndexStoreError
from .reader import StoredIndex

_QUERY_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
_TABLE_FUNCTIONS = {"generate_series", "json_each", "json_tree", "range", "unnest"}
# Of the functions that are more than their arguments: those that draw or tell the time.
_HARMLESS = {
    *("random", "setseed", "uuid", "uuidv4", "uuidv7", "gen_random_uuid", "error"),
    *("current_date", "get_current_time", "get_current_timestamp", "now", "today"),
    "transaction_timestamp",
}
_HIT_COLUMNS = {"rank": pa.int64(), "item_id": pa.string(), "score": pa.float64()}


def sql(
    index: StoredIndex | str | Path,
    query: str,
    *,
    hits: str | Path | None = None,
    limit: int | None = None,
) -> pa.Table:
    """Run one DuckDB query over the items of an index; return its rows.

    index  an index, or its folder
    query  reads the view `items`: `position`, then every item column, without deleted rows and
           with quarantined ones (`status`); the view `duplicates`: `item_id`, `duplicate_of`,
           `near_duplicate_of` and `near_distance` of the items that repeat an earlier one, if the
           index was looked through; and the view `hits`, if there is one
    hits   a result as `headwater query --json` writes it: `rank`, `item_id`, `score` and whatever
           else it says about a hit that is no column of the item
    limit  at most so many rows

    Only the columns and row groups that the query needs are read, from the Parquet files
    themselves; rows come in no order but that of ORDER BY. Of result columns with one name, the
    later ones get `_1`, `_2`.
    Raises IndexStoreError, one line, for a text that is not one query or reads anything else.

    >>> sql("idx/", "SELECT licence, count(*) AS n FROM items GROUP BY licence ORDER BY n DESC")
    """
    if not isinstance(index, StoredIndex):
        index = StoredIndex.open(index)
    if limit is not None and limit < 0:
        raise IndexStoreError(f"limit is {limit}; give the number of rows wanted, from 0 on")
    columns = index.item_schema.names
    views = {"items": [position_name(columns), *columns]}
    tables = {}
    if (repeats := index.duplicates()) is not None:
        tables["duplicates"] = repeats
    if hits is not None:
        tables["hits"] = _hits(Path(hits), columns)
    views |= {name: table.column_names for name, table in tables.items()}
    text = query.strip().rstrip(";")
    try:
        _check(text, frozenset(views))
        with connect_items(index, deleted=False) as connection:
            for name, table in tables.items():
                connection.register(name, table)
            lock(connection)
            # The newline ends a comment in the text, which would swallow the bracket.
            bounded = f"SELECT * FROM ({text}\n)" + (f" LIMIT {limit}" if limit is not None else "")
            if len(connection.extract_statements(bounded)) != 1:
                raise Forbidden("it holds more than one statement; give one query")
            return _distinctly_named(connection.sql(bounded).to_arrow_table())
    except duckdb.Error as error:
        raise _refused(query, str(error).splitlines()[0], views) from error
    except Forbidden as error:
        raise _refused(query, str(error), views) from error
    except RecursionError as error:
        raise _refused(query, "it is nested too deeply", views) from error


def _refused(query: str, reason: str, views: dict[str, list[str]]) -> IndexStoreError:
    if "hits" not in views and re.search(r"\bhits\b", reason):
        reason += " (give a result: --hits RESULT.json)"
    if "duplicates" not in views and re.search(r"\bduplicates\b", reason):
        reason += " (this index was not looked through for them; the next ingest that adds does)"
    columns = "; ".join(f"columns of {name}: {', '.join(names)}" for name, names in views.items())
    return IndexStoreError(f"sql {' '.join(query.split())!r}: {reason}; {columns}")


def _check(text: str, views: frozenset[str]) -> None:
    """Raise Forbidden unless `text` is one query over `views` and nothing else."""
    with connect() as connection:
        try:
            trees = parse(connection, text)
        except Forbidden as error:
            if "Only SELECT" in str(error):
                raise Forbidden("only a query can run here: SELECT ...") from error
            if _is_condition(connection, text):
                raise Forbidden(
                    "that is a condition alone; write SELECT * FROM items WHERE ..."
                ) from error
            raise
        if len(trees) != 1:
            raise Forbidden(
                f"it holds {len(trees)} statements; give one query: SELECT ... FROM items"
            )
        _check_tree(connection, trees[0], views)


def _is_condition(connection: duckdb.DuckDBPyConnection, text: str) -> bool:
    """Whether `text` would do after WHERE."""
    try:
        parse_expression(connection, re.sub(r"^where\b", "", text, flags=re.IGNORECASE))
    except Forbidden:
        return False
    return True


def _check_tree(connection: duckdb.DuckDBPyConnection, tree: Any, views: frozenset[str]) -> None:
    everything = list(nodes(tree))
    defined = {
        str(entry["key"])
        for node in everything
        if isinstance(common := node.get("cte_map"), dict)
        for entry in common["map"]
    }
    reserved = {"parts", "tombstones"}
    if defined:
        known = "SELECT view_name FROM duckdb_views() UNION SELECT table_name FROM duckdb_tables()"
        reserved |= {str(name).lower() for (name,) in connection.execute(known).fetchall()}
    for name in sorted(defined):
        if not re.fullmatch(r"\w+", name):
            # Outside of its WITH, such a name could be taken for that of a file.
            raise Forbidden(f"the WITH name {name!r} has other signs than letters, digits and _")
        if name.lower() in reserved:
            # Outside of its WITH, it would be the table of that name in DuckDB's catalog or ours.
            raise Forbidden(f"the WITH name {name!r} is that of an internal table; choose another")
    tables = {name.lower() for name in defined} | views
    for node in everything:
        _check_node(connection, node, tables)


def _check_node(
    connection: duckdb.DuckDBPyConnection, node: dict[str, Any], tables: set[str] | frozenset[str]
) -> None:
    kind = node.get("type")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _QUERY_NODES:
        raise Forbidden(f"only a query can run here, not {kind.split('_')[0]}")
    if kind == "BASE_TABLE":
        name = ".".join(
            part
            for key in ("catalog_name", "schema_name", "table_name")
            if (part := str(node.get(key) or ""))
        )
        if name.lower() not in tables:
            raise Forbidden(f"there is no table {name}; there are {' and '.join(sorted(tables))}")
    elif kind == "SHOW_REF" and node.get("show_type") == "SHOW_SPECIAL":
        raise Forbidden("SHOW is not allowed; DESCRIBE items lists columns")
    elif kind == "TABLE_FUNCTION":
        name = str(node["function"].get("function_name", "")).lower()
        if name not in _TABLE_FUNCTIONS:
            raise Forbidden(f"the table function {name} is not allowed; read from items")
    inside = partial(_check_node, connection, tables=frozenset())
    check_call(connection, node, inside, _HARMLESS)


def _hits(path: Path, columns: Sequence[str]) -> pa.Table:
    """The hits of a result file; of each, what is not a column of its item."""
    try:
        hits = json.loads(path.read_bytes())["hits"]
        plain = [{k: v for k, v in hit.items() if k in _HIT_COLUMNS or k not in columns}
                 for hit in hits]  # fmt: skip
        for hit in plain:
            for name, kind in _HIT_COLUMNS.items():
                pa.scalar(hit[name], kind)
        table = pa.Table.from_pylist(plain) if plain else pa.table({})
        for place, (name, kind) in enumerate(_HIT_COLUMNS.items()):
            column = table[name].cast(kind) if plain else pa.array([], kind)
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.add_column(place, name, column)
    except FileNotFoundError:
        raise IndexStoreError(
            f"there is no file {path}; give the one that `headwater query --json` wrote"
        ) from None
    except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise IndexStoreError(
            f"{path} is no result of `headwater query --json` ({reason}); write it again"
        ) from error
    return table


def _distinctly_named(table: pa.Table) -> pa.Table:
    names: list[str] = []
    taken = set(table.column_names)
    for name in table.column_names:
        new, number = name, 0
        while new in names or (number and new in taken):
            number += 1
            new = f"{name}_{number}"
        names.append(new)
    return table.rename_columns(names)
