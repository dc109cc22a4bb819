"""What an index already holds of a source: records that can stay as they are, and those replaced.

A record is found again by its id. It is the same if its image's bytes, its caption and everything
carried along are the same; where it lies (`uri`) does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from headwater.index import StoredIndex, merged_schema

from .columns import RESERVED
from .sources import SourceItem
from .tables import items_schema

_COMPARED = ("caption", "licence", "rights_holder", "source")


class Held:
    """The living rows of an index, by id; of a new index nothing."""

    def __init__(self, stored: StoredIndex | None, *, content_keyed: bool) -> None:
        """Read ids and what records are compared by; rows stay on the disk.

        `content_keyed`: ids of the source are made from content, see `Source.content_keyed`.
        """
        self.content_keyed = content_keyed
        self._places: dict[str, int] = {}
        self._items = pa.table({})
        self.extra: list[str] = []
        if stored is None or not stored.manifest.rows:
            return
        items = stored.items()
        self.extra = [name for name in items.column_names if name not in RESERVED]
        self._items = items.select(
            ["item_id", "sha256", "status", "error", *_COMPARED, *self.extra]
        )
        live = stored.live_positions
        ids = items["item_id"].take(pa.array(live)).to_pylist()
        self._places = dict(zip(ids, live.tolist(), strict=True))

    def position(self, item_id: str) -> int | None:
        """Where the row with this id lies; None if there is none."""
        return self._places.get(item_id)

    def unchanged(self, item: SourceItem) -> int | None:
        """The position of the row of a record that needs no new one; None for any other.

        A record whose image cannot be read now changes nothing: what is held of it stays.
        """
        digest = None
        for position in self._candidates(item.item_id):
            if item.data is None:
                return position
            digest = digest or hashlib.sha256(item.data).hexdigest()
            row = self._row(position)
            asked = {name: getattr(item, name) for name in _COMPARED}
            if row["sha256"] == digest and self._same(row, asked, item.extra):
                return position
        return None

    def still_quarantined(self, columns: Mapping[str, Any]) -> int | None:
        """The position of the row of a quarantined item that was so for the same reason."""
        if columns["status"] != "quarantined":
            return None
        for position in self._candidates(columns["item_id"]):
            row = self._row(position)
            if row["error"] == columns["error"] and self._same(row, columns, columns):
                return position
        return None

    def searchable(self, item_id: str) -> int | None:
        """The position of the row with this id, if it is not in quarantine."""
        position = self._places.get(item_id)
        if position is None or self._items["status"][position].as_py() != "ok":
            return None
        return position

    def _candidates(self, item_id: str) -> Iterator[int]:
        """The row with this id; of a content also those with "~2", "~3" after it, its copies."""
        position, number = self._places.get(item_id), 1
        while position is not None:
            yield position
            if not self.content_keyed:  # what a given id with "~2" names is something else
                return
            number += 1
            position = self._places.get(f"{item_id}~{number}")

    def _row(self, position: int) -> dict[str, Any]:
        row: dict[str, Any] = self._items.slice(position, 1).to_pylist()[0]
        return row

    def _same(
        self, row: Mapping[str, Any], asked: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> bool:
        names = set(self.extra) | {name for name in extra if name not in RESERVED}
        return all(_equal(row[name], asked[name]) for name in _COMPARED) and all(
            _equal(row.get(name), extra.get(name)) for name in names
        )


def check_columns(stored: StoredIndex, extra: pa.Schema) -> None:
    """Refuse a source whose columns have other types than those of the same name in the index."""
    merged_schema("the source", stored.item_schema, items_schema(extra))


def _equal(left: Any, right: Any) -> bool:
    return bool(left == right) or repr(left) == repr(right)  # NaN, wherever it stands
