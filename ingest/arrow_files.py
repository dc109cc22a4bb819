"""Arrow files as `datasets` writes them (save_to_disk, its cache), mapped into memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from .columns import ColumnNames, find_columns, holds_binary
from .errors import SourceError
from .hub_layout import with_splits
from .listing import Int64, Listing, required_image, sharded_listing
from .parquet_files import unified


def arrow_listing(root: Path, paths: list[Path], asked: ColumnNames) -> Listing:
    """List the rows of Arrow stream files; `root` is where their names start."""
    schemas, parts = zip(*map(_records, paths), strict=True)
    names = [path.relative_to(root).as_posix() for path in paths]
    schema = unified(schemas, root, "Arrow")
    tables, schema = with_splits(names, list(parts), schema)
    roles = find_columns(schema, asked, str(root))
    image = required_image(roles, schema, root)

    def read(number: int, rows: Int64) -> Iterator[Any]:
        mapped = _mapped(paths[number])
        if image not in mapped.column_names:
            yield from (None for _ in rows)
            return
        column = mapped[image]
        yield from (column[row].as_py() for row in rows.tolist())

    return sharded_listing(list(zip(names, paths, strict=True)), tables, schema, roles, read)


def _records(path: Path) -> tuple[pa.Schema, pa.Table]:
    table = _mapped(path)
    kept = table.select([f.name for f in table.schema if not holds_binary(f.type)])
    return table.schema, kept


def _mapped(path: Path) -> pa.Table:
    """The whole file as a table; of its images only what is looked at is read from disk."""
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_stream(file).read_all()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{path} cannot be read as an Arrow stream ({reason}); replace the damaged file"
        ) from error
