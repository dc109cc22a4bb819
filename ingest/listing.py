"""The records of a corpus: a table, and for each record its image or the image's path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .columns import ColumnNames, flag
from .errors import SourceError
from .places import Place

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """A file that holds records of a corpus, their images in it."""

    name: str  # relative to the corpus
    path: Place
    first: int  # position of its first record
    stop: int  # one past its last


@dataclass(frozen=True)
class Unreadable:
    """An image cell without an image."""

    reason: str


@dataclass(frozen=True)
class Listing:
    """The records of a corpus before selection; positions count its records from 0."""

    rows: int
    schema: pa.Schema  # every column, the image's too
    table: pa.Table  # every column without bytes, in the user's names
    names: ColumnNames
    base: Callable[[int], Place]  # the folder that a record's relative image path starts from
    uri: Callable[[int], str]  # where a record lies, relative to the corpus
    # Yields the image cell (bytes, {bytes, path}, path, None, Unreadable) at ascending positions.
    cells: Callable[[Int64], Iterator[Any]]
    keyed_by_uri: bool  # records without an id column are identified by their uri
    uris_repeat: bool = False  # one image may stand in several records
    shards: tuple[Shard, ...] = ()  # files with records in them; none where each image is a file
    errors: Mapping[int, str] = field(default_factory=dict)  # position -> why it cannot be used


def sharded_listing(
    files: Sequence[tuple[str, Place]],
    tables: Sequence[pa.Table],
    schema: pa.Schema,
    names: ColumnNames,
    read: Callable[[int, Int64], Iterator[Any]],
    name_of: Callable[[int, int], str] | None = None,
) -> Listing:
    """A listing of files with images in them.

    files    (name in the corpus, path) of each
    tables   its records, columns without bytes
    read     yields the image cells at ascending rows of the file of that number
    name_of  gives the name, in the file of that number, of a row; it identifies records without
             an id. None: rows have no names
    """
    starts = np.cumsum([0, *(table.num_rows for table in tables)])
    shards = tuple(
        Shard(name, path, first, stop)
        for (name, path), (first, stop) in zip(files, pairwise(starts.tolist()), strict=True)
    )
    table = pa.concat_tables(tables, promote_options="permissive")

    def locate(position: int) -> int:
        return int(np.searchsorted(starts, position, side="right")) - 1

    def uri(position: int) -> str:
        number = locate(position)
        row = position - shards[number].first
        if name_of is not None:
            return f"{shards[number].name}/{name_of(number, row)}"
        return f"{shards[number].name}#{row}"

    def cells(positions: Int64) -> Iterator[Any]:
        for number in range(locate(positions[0]), len(shards)) if len(positions) else ():
            low, high = np.searchsorted(positions, [shards[number].first, shards[number].stop])
            if low < high:
                yield from read(number, positions[low:high] - shards[number].first)

    return Listing(
        rows=int(starts[-1]),
        schema=schema,
        table=table.select([name for name in schema.names if name in table.column_names]),
        names=names,
        base=lambda position: shards[locate(position)].path.parent,
        uri=uri,
        cells=cells,
        keyed_by_uri=name_of is not None,
        shards=shards,
    )


def image_path(cell: Any, base: Place) -> Place | None:
    """Return where the image of a cell lies, if the cell is a path."""
    if isinstance(cell, dict):  # the Hugging Face Image feature
        cell = None if cell.get("bytes") is not None else cell.get("path")
    return base / cell if isinstance(cell, str) and cell else None


def load(cell: Any, base: Place) -> tuple[bytes | None, str | None]:
    """Return (image bytes of a cell, None) or (None, why there are none)."""
    if isinstance(cell, Unreadable):
        return None, cell.reason
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return content, None
    path = image_path(cell, base)
    if path is None:
        return None, "no image in this record"
    name = cell["path"] if isinstance(cell, dict) else cell
    try:
        if not path.is_file():
            return None, f"no such image file: {name}"
        return path.read_bytes(), None
    except OSError as error:
        return None, f"image file cannot be read ({error.strerror}): {name}"


def required_image(names: ColumnNames, schema: pa.Schema, root: Place) -> str:
    """Return the image column's name; SourceError when there is none."""
    if names.image is None:
        raise SourceError(
            f"no column of {root} holds images; name it with {flag('image')}; "
            f"its columns: {', '.join(schema.names)}"
        )
    return names.image
