"""A table of results as a file: CSV, JSON or Parquet."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

_ROWS_AT_ONCE = 10_000


def write_csv(table: pa.Table, path: str | Path) -> None:
    """Write CSV with a header; NULL is an empty field, an empty text `""`, a list `[1, 2]`.

    Raises OSError when the file cannot be written.
    """
    # Told outright: by itself DuckDB compresses what is called .gz, and we do for no format.
    _copy(table, Path(path), "FORMAT csv, HEADER, COMPRESSION none")


def write_parquet(table: pa.Table, path: str | Path) -> None:
    """Write Parquet (zstd). Raises OSError when the file cannot be written."""
    _copy(table, Path(path), "FORMAT parquet, COMPRESSION zstd")


def write_json_rows(table: pa.Table, path: str | Path) -> None:
    """Write one JSON array, an object and a line for each row; values as `plain_json` has them.

    Raises OSError when the file cannot be written.
    """
    with Path(path).open("w", encoding="utf-8") as file:
        separator = "[\n"
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
            for row in batch.to_pylist():
                text = json.dumps(plain_json(row), ensure_ascii=False, allow_nan=False)
                file.write(separator + text)
                separator = ",\n"
        file.write("\n]\n" if separator == ",\n" else "[]\n")


def plain_json(value: Any) -> Any:
    """Return `value` as JSON has it: dates as text, bytes as hex, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):  # DuckDB's sum of whole numbers is one
        return int(value) if value == value.to_integral_value() else float(value)
    if value is None or isinstance(value, str | int):
        return value
    return value.hex() if isinstance(value, bytes) else str(value)


def _copy(table: pa.Table, path: Path, options: str) -> None:
    path.open("wb").close()  # the system's own words, when it cannot be written
    target = str(path.absolute()).replace("'", "''")
    with duckdb.connect(":memory:") as connection:
        connection.register("result", table)
        try:
            connection.execute(f"COPY result TO '{target}' ({options}, USE_TMP_FILE false)")
        except duckdb.IOException as error:
            raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
