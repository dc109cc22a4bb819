"""A corpus as a stream of items: image bytes, caption, licence, rights holder, everything else."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headwater.index import IndexStoreError, filter_positions

from .columns import ColumnNames, dropped_columns, flag, is_text, kept_columns
from .errors import SourceError
from .layouts import read_listing
from .listing import Listing, load
from .signals import failed_download, opt_out, signal_columns
from .signature import Signature, signature

__all__ = ["ColumnNames", "Source", "SourceItem", "open_source"]

_ROWS_AT_ONCE = 256
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceItem:
    """One training image with what is known about it. Either `data` or `error` is set."""

    key: str  # what the record says it is: its id, its path, or a hash of image and caption
    item_id: str  # the key, told apart where keys of the table repeat
    uri: str  # where it lies, relative to the source: "cats/1.png", "train.parquet#17"
    data: bytes | None  # the encoded image; None when it could not be found
    caption: str
    licence: str | None
    rights_holder: str | None
    source: str | None
    opt_out: str | None  # which of its columns refuse training, and what they say
    extra: dict[str, Any]  # the user's other columns, by their names in the items table
    error: str | None  # why the item belongs into quarantine


@dataclass(frozen=True)
class Source:
    """The selected items of a corpus; iterate over it as often as needed, it streams."""

    label: str  # the path as given, for messages
    listing: Listing
    positions: npt.NDArray[np.int64]  # of the selected records in the listing, ascending

    @property
    def columns(self) -> tuple[str, ...]:
        """The user's column names."""
        return tuple(self.listing.schema.names)

    @property
    def names(self) -> ColumnNames:
        """Which column serves as what."""
        return self.listing.names

    @property
    def content_keyed(self) -> bool:
        """Whether a record is identified by its image and caption, having no id and no path."""
        return self.names.id is None and not self.listing.keyed_by_uri

    @cached_property
    def extra_schema(self) -> pa.Schema:
        """Names and types of `SourceItem.extra`, so that every batch of items has one schema."""
        table = self.listing.table
        kept = kept_columns(self.listing.schema, self.names)
        return pa.schema([(new, table.schema.field(name).type) for name, new in kept.items()])

    def __len__(self) -> int:
        """Return the number of selected records."""
        return len(self.positions)

    def __iter__(self) -> Iterator[SourceItem]:
        """Yield the items in the order of the corpus, each id once, little in memory at a time."""
        ids = _Ids(frozenset())
        for item in self.part(0, len(self)):
            yield replace(item, item_id=ids.claim(item.item_id)[0])

    def part(self, start: int, stop: int) -> Iterator[SourceItem]:
        """Yield the items `start` to `stop` - 1 of the selection; a Parquet row group is the least
        that is read.

        An item is the same whatever part it is read with. So `item_id` may repeat between items
        whose identity is their content (no id column, images in the table): iterating over all of
        them tells them apart.
        """
        positions = self.positions[start:stop]
        cells = self.listing.cells(positions)
        kept = kept_columns(self.listing.schema, self.names)
        place = start
        for first in range(0, len(positions), _ROWS_AT_ONCE):
            chunk = positions[first : first + _ROWS_AT_ONCE]
            taken = self.listing.table.take(pa.array(chunk))
            records = taken.to_pylist() if taken.num_columns else [{} for _ in chunk]
            for position, record in zip(chunk.tolist(), records, strict=True):
                yield self._item(place, position, record, next(cells), kept)
                place += 1

    def signature(self, known: Signature | None = None) -> Signature:
        """Return what this source is, to tell whether it is still the same; see `signature`."""
        return signature(self.listing, self.positions, known)

    def _item(
        self, place: int, position: int, record: dict[str, Any], cell: Any, kept: dict[str, str]
    ) -> SourceItem:
        names, listing = self.names, self.listing
        data, error = load(cell, listing.base(position))
        if data is None:
            error = failed_download(record) or error
        error = listing.errors.get(position, error)
        is_path = isinstance(cell, str) and bool(cell)
        # A listing of paths knows its uris; elsewhere a path says more than a row number.
        uri = cell if is_path and not listing.keyed_by_uri else listing.uri(position)
        caption = _text(record, names.caption) or ""
        key = _text(record, names.id) if names.id is not None else None
        if not key:
            key = uri if listing.keyed_by_uri else _content_key(data, uri, caption)
            if names.id is not None and not listing.keyed_by_uri:
                error = error or f"no item id in column {names.id!r}"
        elif place in self._repeats:
            error = error or f"duplicate item id {key!r}"
        return SourceItem(
            key=key,
            item_id=self._repeats.get(place, key),
            uri=uri,
            data=None if error else data,
            caption=caption,
            licence=_text(record, names.licence),
            rights_holder=_text(record, names.rights_holder),
            source=_text(record, names.source),
            opt_out=opt_out(record, self._signals),
            extra={new: record[name] for name, new in kept.items()},
            error=error,
        )

    @cached_property
    def _signals(self) -> tuple[str, ...]:
        return signal_columns(self.listing.table.schema)

    @cached_property
    def _repeats(self) -> dict[int, str]:
        """{place in the selection: id} where an id from the table, or a uri, came before."""
        if self.names.id is not None:
            column = self.listing.table[self.names.id].take(pa.array(self.positions))
            if len(pc.unique(column.drop_null())) == len(column) - column.null_count:
                return {}
            wanted = [None if value is None else str(value) for value in column.to_pylist()]
        elif self.listing.uris_repeat:
            wanted = [self.listing.uri(position) for position in self.positions.tolist()]
        else:
            return {}
        ids = _Ids(frozenset(name for name in wanted if name))
        claims = ((place, ids.claim(name)) for place, name in enumerate(wanted) if name)
        return {place: item_id for place, (item_id, repeated) in claims if repeated}


def open_source(
    path: str | Path,
    *,
    columns: ColumnNames = ColumnNames(),  # noqa: B008 (frozen)
    where: str | None = None,
    limit: int | None = None,
    captions_required: bool = True,
) -> Source:
    """Open a corpus: Parquet files, tar shards, what `datasets` saved, or images with captions.

    path               a file or folder, an fsspec URL of Parquet files or tar shards
                       (`s3://bucket/folder`), or a pattern of either: `shards/{000..041}.tar`
    columns            the user's names where they differ from `columns.CONVENTIONS`
    where              a DuckDB expression over the user's columns, in the user's names
    limit              the first so many of the selected records
    captions_required  False for a model without prompts: a corpus without captions will do

    Raises SourceError, one line with the remedy, when there is nothing to ingest.

    >>> source = open_source("train.parquet", where="\\"group\\" = 'animals'", limit=300)
    >>> for item in source: ...
    """
    listing = read_listing(path, columns)
    if listing.names.caption is None and captions_required:
        raise SourceError(
            f"no column of {path} holds captions; name it with {flag('caption')}, or for a folder "
            "of images put a .txt beside each or add metadata.jsonl; "
            f"its columns: {', '.join(listing.schema.names)}"
        )
    if listing.rows == 0:
        raise SourceError(f"{path} holds no records; give a corpus with at least one image")
    if limit is not None and limit < 1:
        raise SourceError(f"--limit {limit}: give a number from 1 on")
    positions = np.arange(listing.rows, dtype=np.int64)
    if where is not None:
        try:
            positions = filter_positions(listing.table, where)
        except IndexStoreError as error:
            raise SourceError(f"{path}: {error}") from error
        if not len(positions):
            raise SourceError(
                f"no record of {path} satisfies --where {where!r} (of {listing.rows}); widen it"
            )
    if captions_required and listing.names.caption is not None:
        words = listing.table[listing.names.caption].take(pa.array(positions)).to_pylist()
        missing = sum(not (word or "").strip() for word in words)
        if missing == len(words):
            raise SourceError(
                f"no selected record of {path} has a caption (column {listing.names.caption!r} is "
                f"empty); name another with {flag('caption')}"
            )
        if missing:
            _log.warning("%d of %d records of %s have no caption", missing, len(words), path)
    if (splits := _splits(listing, positions)) and len(splits) > 1:
        _log.warning(
            "%s holds the splits %s; if the model saw one, choose it: --where \"split = 'train'\"",
            path,
            ", ".join(splits),
        )
    if dropped := dropped_columns(listing.schema, listing.names):
        _log.warning("columns of %s that hold bytes are not kept: %s", path, ", ".join(dropped))
    return Source(label=str(path), listing=listing, positions=positions[:limit])


class _Ids:
    """Hands out ids, each once: a repeated one gets "~2", "~3", never one of `taken`."""

    def __init__(self, taken: frozenset[str]) -> None:
        self._taken = taken
        self._used: set[str] = set()
        self._next: dict[str, int] = {}

    def claim(self, wanted: str) -> tuple[str, bool]:
        """Return (the id to use, whether `wanted` was used before)."""
        if wanted not in self._used:
            self._used.add(wanted)
            return wanted, False
        number = self._next.get(wanted, 2)
        while (candidate := f"{wanted}~{number}") in self._used or candidate in self._taken:
            number += 1
        self._next[wanted] = number + 1
        self._used.add(candidate)
        return candidate, True


def _splits(listing: Listing, positions: npt.NDArray[np.int64]) -> list[str]:
    """The values of a column `split` of text, among the selected records."""
    table = listing.table
    if "split" not in table.column_names or not is_text(table.schema.field("split").type):
        return []
    return [str(split) for split in pc.unique(table["split"].take(pa.array(positions)).drop_null())]


def _content_key(data: bytes | None, uri: str, caption: str) -> str:
    content = data if data is not None else uri.encode()
    return hashlib.sha256(content + caption.encode()).hexdigest()[:16]


def _text(record: dict[str, Any], name: str | None) -> str | None:
    value = record[name] if name is not None else None
    return None if value is None else str(value)
