"""`--where` expressions over item columns, run in a locked DuckDB.

The text of a filter comes from strangers (a shared command, the web page of a report), so it may
be one boolean expression over the columns of its row and nothing else. Two walls hold that: the
parsed expression is walked before it runs (no subquery, hence no other table or file, and only
functions of their arguments), and the connection that runs it has no access to the outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .duck import (
    Forbidden,
    check_call,
    connect,
    connect_items,
    lock,
    nodes,
    parse_expression,
    position_name,
    scannable,
)
from .errors import IndexStoreError
from .reader import StoredIndex

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Summary:
    """Counts over the items of an index, without deleted ones."""

    rows: int
    ok: int
    quarantined: int
    reasons: dict[str, int]  # error -> number of quarantined items, most frequent first
    columns: dict[str, str]  # column name -> Arrow type


class Catalog:
    """SQL filters and rows over the items of an index; reads the columns and parts it needs."""

    def __init__(self, index: StoredIndex) -> None:
        """Look at the items of `index`."""
        self._index = index

    def select(self, where: str | None = None) -> Int64:
        """Return the ascending positions of the searchable items that satisfy `where`: int64 [n].

        Raises IndexStoreError when `where` is not one boolean expression over the columns.
        """
        if where is None:
            return self._index.ok_positions
        columns = self._index.item_schema.names
        with _refusals(where, columns):
            _check_expression(where)
            with connect_items(self._index, deleted=True) as connection:
                found = _run(connection, where, position_name(columns))
        return self._index.searchable(found)

    def rows(self, positions: npt.ArrayLike) -> list[dict[str, Any]]:
        """Return the items at `positions`, in that order, every column by its name."""
        rows: list[dict[str, Any]] = self._index.items_at(positions).to_pylist()
        return rows

    def summary(self) -> Summary:
        """Return counts of items and quarantine reasons, and the columns with their types."""
        items = self._index.items(["status", "error"]).take(pa.array(self._index.live_positions))
        statuses = Counter(items["status"].to_pylist())
        reasons = Counter(error for error in items["error"].to_pylist() if error is not None)
        return Summary(
            rows=items.num_rows,
            ok=statuses["ok"],
            quarantined=statuses["quarantined"],
            reasons=dict(reasons.most_common()),
            columns={field.name: str(field.type) for field in self._index.item_schema},
        )


def filter_positions(table: pa.Table, where: str, first: int = 0) -> Int64:
    """Return the ascending row numbers of `table` at which `where` is true: int64 [n].

    Rows are numbered from `first` on, also as the column `position` that `where` may look at.
    `where` is one boolean DuckDB expression over the columns; rows where it is NULL do not count.
    Raises IndexStoreError, one line, for anything else: SQL errors, unknown columns, subqueries,
    statements, and functions that read more than their arguments.

    >>> filter_positions(pa.table({"group": ["food", "animals"]}), "\\"group\\" = 'food'")
    array([0])
    """
    position = position_name(table.column_names)
    with _refusals(where, table.column_names):
        _check_expression(where)
        numbers = pa.array(np.arange(first, first + table.num_rows))
        numbered = scannable(table).append_column(position, numbers)
        with connect() as connection:
            connection.register("items", numbered)
            found = _run(connection, where, position)
    return np.sort(found).astype(np.int64)


@contextmanager
def _refusals(where: str, columns: Sequence[str]) -> Iterator[None]:
    """Turn whatever is wrong with `where` into one line that names the columns."""
    try:
        yield
    except duckdb.Error as error:
        raise _refused(where, str(error).splitlines()[0], columns) from error
    except Forbidden as error:
        raise _refused(where, str(error), columns) from error
    except RecursionError as error:
        raise _refused(where, "it is nested too deeply", columns) from error


def _refused(where: str, reason: str, columns: Sequence[str]) -> IndexStoreError:
    text = " ".join(where.split())
    return IndexStoreError(f"--where {text!r}: {reason}; columns: {', '.join(columns)}")


def _run(connection: duckdb.DuckDBPyConnection, where: str, position: str) -> npt.NDArray[Any]:
    lock(connection)
    # The newline ends a comment in `where`, which would swallow the bracket.
    kind = connection.execute(f"SELECT ({where}\n) FROM items LIMIT 0").description
    if str(kind[0][1]) != "BOOLEAN":
        raise Forbidden(f"its value is {kind[0][1]}, not true or false; compare it")
    sql = f'SELECT "{position}" FROM items WHERE ({where}\n)'
    numbers: npt.NDArray[Any] = connection.execute(sql).fetchnumpy()[position]
    return numbers


def _check_expression(where: str) -> None:
    """Raise Forbidden unless `where` parses as one expression that looks at its row only."""
    if not where.strip():
        raise Forbidden("it is empty; leave the option away to take every row")
    with connect() as connection:
        for node in nodes(parse_expression(connection, where)):
            _check_node(connection, node)


def _check_node(connection: duckdb.DuckDBPyConnection, node: dict[str, Any]) -> None:
    if node.get("class") == "SUBQUERY":
        raise Forbidden("subqueries are not allowed; compare the columns of one row")
    check_call(connection, node, partial(_check_node, connection))
