"""Parquet files as a corpus: one, a folder of them, or a Hugging Face repository's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .columns import ColumnNames, find_columns, holds_binary
from .errors import SourceError
from .hub_layout import with_splits
from .listing import Int64, Listing, required_image, sharded_listing
from .places import Place, relative_name

_BATCH_ROWS = 32  # image cells read at once: full-size photographs stay below a few hundred MiB
_BUFFER = 1 << 22  # bytes a request to a remote file asks for


def parquet_listing(root: Place, paths: list[Place], asked: ColumnNames) -> Listing:
    """List the rows of Parquet files; `root` is where their names start.

    Files are opened one at a time and again when their images are read, however many there are.
    """
    schemas, parts = zip(*map(_records, paths), strict=True)
    names = [relative_name(path, root) for path in paths]
    schema = unified(schemas, root, "Parquet")
    tables, schema = with_splits(names, list(parts), schema)
    roles = find_columns(schema, asked, str(root))
    image = required_image(roles, schema, root)

    def read(number: int, rows: Int64) -> Iterator[Any]:
        path = paths[number]
        try:
            yield from _cells(_opened(path), image, rows)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, error) from error

    return sharded_listing(list(zip(names, paths, strict=True)), tables, schema, roles, read)


def unified(schemas: tuple[pa.Schema, ...], root: Place, kind: str) -> pa.Schema:
    """One schema for files that may each lack columns of the others."""
    try:
        schema = pa.unify_schemas(list(schemas), promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"the {kind} files in {root} do not fit together ({reason})") from error
    if len(set(schema.names)) != len(schema.names):
        raise SourceError(f"{root} has two columns of one name: {', '.join(schema.names)}")
    return schema


def read_table(path: Place) -> pa.Table:
    """Return every column of a Parquet file that holds no bytes."""
    return _records(path)[1]


def _records(path: Place) -> tuple[pa.Schema, pa.Table]:
    try:
        file = _opened(path)
        schema = file.schema_arrow
        return schema, file.read([f.name for f in schema if not holds_binary(f.type)])
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _opened(path: Place) -> pq.ParquetFile:
    # Mapped or streamed, not pre-buffered: a row group of images is never in memory as a whole.
    if isinstance(path, Path):
        return pq.ParquetFile(path, memory_map=True, pre_buffer=False)
    return pq.ParquetFile(path.open(), pre_buffer=False, buffer_size=_BUFFER)


def _damaged(path: Place, error: Exception) -> SourceError:
    reason = str(error).splitlines()[0]
    return SourceError(f"{path} cannot be read as Parquet ({reason}); replace the damaged file")


def _cells(file: pq.ParquetFile, column: str, wanted: Int64) -> Iterator[Any]:
    """Yield one column's values at ascending rows of a file, reading only their row groups."""
    if column not in file.schema_arrow.names:
        yield from (None for _ in wanted)
        return
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        low, high = np.searchsorted(wanted, [start, end])
        remaining = wanted[low:high]
        first = start
        if len(remaining):
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
                count = int(np.searchsorted(remaining, first + batch.num_rows))
                for row in remaining[:count].tolist():
                    yield batch.column(0)[row - first].as_py()
                remaining = remaining[count:]
                first += batch.num_rows
                if not len(remaining):
                    break
        start = end
