"""`--where` expressions over item columns, run in a locked DuckDB.

The text of a filter comes from strangers (a shared command, the web page of a report), so it may
be one boolean expression over the columns of its row and nothing else. Two walls hold that: the
parsed expression is walked before it runs (no subquery, hence no other table or file, and only
functions of their arguments), and the connection that runs it has no access to the outside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .errors import IndexStoreError

Int64 = npt.NDArray[np.int64]
_LOCKED: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "allow_community_extensions": "false",
    "python_enable_replacements": "false",
}


@dataclass(frozen=True)
class Summary:
    """Counts over the items of an index."""

    rows: int
    ok: int
    quarantined: int
    reasons: dict[str, int]  # error -> number of quarantined items, most frequent first
    columns: dict[str, str]  # column name -> Arrow type


class Catalog:
    """SQL filters and rows over an items table, `StoredIndex.items()` for instance."""

    def __init__(self, items: pa.Table) -> None:
        """Look at `items`, which needs the columns `status` and `error`."""
        self._items = items

    def select(self, where: str | None = None) -> Int64:
        """Return the ascending positions of the 'ok' items that satisfy `where`: int64 [n].

        Raises IndexStoreError when `where` is not one boolean expression over the columns.
        """
        ok: npt.NDArray[np.bool_] = pc.equal(self._items["status"], "ok").to_numpy()
        if where is None:
            return np.flatnonzero(ok).astype(np.int64)
        positions = filter_positions(self._items, where)
        return positions[ok[positions]]

    def rows(self, positions: npt.ArrayLike) -> list[dict[str, Any]]:
        """Return the items at `positions`, in that order, every column by its name."""
        taken = self._items.take(pa.array(np.asarray(positions, dtype=np.int64)))
        rows: list[dict[str, Any]] = taken.to_pylist()
        return rows

    def summary(self) -> Summary:
        """Return counts of items and quarantine reasons, and the columns with their types."""
        statuses = Counter(self._items["status"].to_pylist())
        reasons = Counter(error for error in self._items["error"].to_pylist() if error is not None)
        return Summary(
            rows=self._items.num_rows,
            ok=statuses["ok"],
            quarantined=statuses["quarantined"],
            reasons=dict(reasons.most_common()),
            columns={field.name: str(field.type) for field in self._items.schema},
        )


def filter_positions(table: pa.Table, where: str) -> Int64:
    """Return the ascending row numbers of `table` at which `where` is true: int64 [n].

    `where` is one boolean DuckDB expression over the columns; rows where it is NULL do not count.
    Raises IndexStoreError, one line, for anything else: SQL errors, unknown columns, subqueries,
    statements, and functions that read more than their arguments.

    >>> filter_positions(pa.table({"group": ["food", "animals"]}), "\\"group\\" = 'food'")
    array([0])
    """
    try:
        _check_expression(where)
        found = _run(table, where)
    except duckdb.Error as error:
        raise _refused(where, str(error).splitlines()[0], table.column_names) from error
    except _Forbidden as error:
        raise _refused(where, str(error), table.column_names) from error
    except RecursionError as error:
        raise _refused(where, "it is nested too deeply", table.column_names) from error
    return np.sort(found).astype(np.int64)


class _Forbidden(Exception):
    """What an expression must not contain, in words."""


def _refused(where: str, reason: str, columns: Sequence[str]) -> IndexStoreError:
    text = " ".join(where.split())
    return IndexStoreError(f"--where {text!r}: {reason}; columns: {', '.join(columns)}")


def _connect() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(":memory:", config=_LOCKED)


def _run(table: pa.Table, where: str) -> npt.NDArray[Any]:
    position = "position"
    while position in {name.lower() for name in table.column_names}:
        position = f"_{position}"
    scanned = _scannable(table).append_column(position, pa.array(np.arange(table.num_rows)))
    with _connect() as connection:
        connection.register("items", scanned)
        connection.execute("SET lock_configuration = true")
        # The newline ends a comment in `where`, which would swallow the bracket.
        kind = connection.execute(f"SELECT ({where}\n) FROM items LIMIT 0").description
        if str(kind[0][1]) != "BOOLEAN":
            raise _Forbidden(f"its value is {kind[0][1]}, not true or false; compare it")
        sql = f'SELECT "{position}" FROM items WHERE ({where}\n)'
        numbers: npt.NDArray[Any] = connection.execute(sql).fetchnumpy()[position]
        return numbers


def _scannable(table: pa.Table) -> pa.Table:
    """Widen half precision, which DuckDB cannot scan from Arrow, to single."""
    fields = [
        field.with_type(pa.float32()) if pa.types.is_float16(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _check_expression(where: str) -> None:
    """Raise _Forbidden unless `where` parses as one expression that looks at its row only."""
    if not where.strip():
        raise _Forbidden("it is empty; leave the option away to take every row")
    with _connect() as connection:
        frame = _parse(connection, "true")
        parsed = _parse(connection, where)
        expressions = parsed.pop("select_list", [])
        del frame["select_list"]
        # A text like `true) FROM t WHERE (true` would close our bracket and go on.
        if parsed != frame or len(expressions) != 1:
            raise _Forbidden("it is not one expression")
        for node in _nodes(expressions):
            _check_node(connection, node)


def _check_node(connection: duckdb.DuckDBPyConnection, node: dict[str, Any]) -> None:
    if node.get("class") == "SUBQUERY":
        raise _Forbidden("subqueries are not allowed; compare the columns of one row")
    if node.get("class") != "FUNCTION":
        return
    name = str(node["function_name"]).lower()
    if name in _impure_functions():
        raise _Forbidden(f"the function {name} is not allowed: it reads more than its arguments")
    for definition in _macros().get(name, ()):
        for inner in _nodes(_parse(connection, definition)["select_list"]):
            _check_node(connection, inner)


def _parse(connection: duckdb.DuckDBPyConnection, expression: str) -> dict[str, Any]:
    """Return the syntax tree of `SELECT (expression)`."""
    text = f"SELECT ({expression}\n)"
    row = connection.execute("SELECT json_serialize_sql(?)", [text]).fetchone()
    tree = json.loads(row[0] if row else "{}")
    if tree.get("error", True):
        raise _Forbidden(f"Parser Error: {tree.get('error_message', 'no expression')}")
    if len(tree["statements"]) != 1:
        raise _Forbidden("it is not one expression")
    node: dict[str, Any] = tree["statements"][0]["node"]
    return node


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for child in tree:
            yield from _nodes(child)


@cache
def _impure_functions() -> frozenset[str]:
    """Names of DuckDB functions whose value depends on more than their arguments."""
    with _connect() as connection:
        rows = connection.execute(
            "SELECT DISTINCT lower(function_name) FROM duckdb_functions() "
            "WHERE function_type = 'scalar' AND stability <> 'CONSISTENT'"
        ).fetchall()
    return frozenset(name for (name,) in rows)


@cache
def _macros() -> dict[str, tuple[str, ...]]:
    """DuckDB's own macros with their definitions, in which a forbidden function might hide."""
    with _connect() as connection:
        rows = connection.execute(
            "SELECT lower(function_name), list(macro_definition) FROM duckdb_functions() "
            "WHERE function_type = 'macro' AND macro_definition IS NOT NULL GROUP BY 1"
        ).fetchall()
    return {name: tuple(definitions) for name, definitions in rows}
