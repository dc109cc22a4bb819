"""A finished index, read: items, streamed feature rows, curvature, previews."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import ledger
from .errors import IndexStoreError
from .manifest import Manifest, Shard, part_files, read_manifest
from .rows import Float32, decode_rows

Int64 = npt.NDArray[np.int64]
_log = logging.getLogger(__name__)
# Opening a file costs as much as reading fifty rows of it. Linux maps 65,530 files per process.
_MAPS_KEPT = 16_384


class StoredIndex:
    """An index opened for reading; made by `StoredIndex.open`.

    A position is a row number of the whole index: the shards in order, laid end to end. It is the
    same for items and features, and it is no identity: `item_id` is.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `StoredIndex.open`, which reads and checks the manifest."""
        self.folder = folder
        self.manifest = manifest
        self._mapped: dict[str, npt.NDArray[np.float16]] = {}

    @property
    def caches(self) -> str:
        """Under which name, in `faiss/`, the accelerators of these shards lie."""
        return "all"

    @classmethod
    def open(cls, folder: str | Path) -> StoredIndex:
        """Open the index in `folder`; IndexStoreError when there is none or it is unfinished."""
        folder = Path(folder)
        return cls(folder, read_manifest(folder))

    def items(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return item columns (default: every one, cached), one row per position.

        Quarantined and deleted items are among them: `ok_positions` and `live_positions` tell.
        """
        return self._items if columns is None else self._read_items(list(columns))

    def items_at(self, positions: npt.ArrayLike) -> pa.Table:
        """Return the items at `positions`, in that order, every column; reads their parts alone."""
        distinct, places = np.unique(np.asarray(positions, np.int64), return_inverse=True)
        self._check_inside(distinct)
        tables = [self.item_schema.empty_table()]
        start = 0
        for shard in self.manifest.shards:
            low, high = np.searchsorted(distinct, [start, start + shard.items])
            if low < high:
                tables.append(self._items_part(shard).take(pa.array(distinct[low:high] - start)))
            start += shard.items
        return pa.concat_tables(tables, promote_options="permissive").take(pa.array(places))

    def searchable_items(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Stream item columns at `ok_positions`, in their order, a table for each part."""
        start = 0
        for shard in self.manifest.shards:
            low, high = np.searchsorted(self.ok_positions, [start, start + shard.items])
            table = self._items_part(shard, list(columns))
            yield table.take(pa.array(self.ok_positions[low:high] - start))
            start += shard.items

    @property
    def item_schema(self) -> pa.Schema:
        """Names and types of the item columns, from the footers of the parts."""
        return pa.unify_schemas(self._item_schemas, promote_options="permissive")

    @property
    def uniform_items(self) -> bool:
        """Whether all parts have the same item columns; sources added later may bring others."""
        return len(self._item_schemas) == 1

    @cached_property
    def ok_positions(self) -> Int64:
        """Ascending positions of the items that are neither quarantined nor deleted.

        They are those a search sees.
        """
        return np.flatnonzero(self._ok).astype(np.int64)

    @cached_property
    def live_positions(self) -> Int64:
        """Ascending positions of the items that are not deleted, quarantined ones included."""
        return np.flatnonzero(self._live).astype(np.int64)

    @cached_property
    def deleted_positions(self) -> Int64:
        """Ascending positions of the deleted items: no answer shows them."""
        names = [name for name in self.manifest.files if name.startswith("tombstones/")]
        if not names:
            return np.empty(0, np.int64)
        path = self.folder / names[0]
        positions = np.array(self._load_array(path))
        if (
            positions.dtype != np.int64
            or positions.shape != (self.manifest.deleted,)
            or (np.diff(positions, prepend=-1) <= 0).any()
            or (positions >= self.manifest.rows).any()
        ):
            raise IndexStoreError(
                f"{path} does not hold {self.manifest.deleted} ascending positions; "
                "the index is damaged: ingest again"
            )
        return positions

    def features(self, shard: Shard) -> npt.NDArray[np.float16]:
        """Return a shard's stored unit rows, float16 [items, dim], memory-mapped and read-only."""
        mapped = self._mapped.get(shard.name)
        if mapped is not None:
            return mapped
        path = self.folder / part_files(shard.name)[0]
        array = self._load_array(path)
        expected = (shard.items, self.manifest.dim)
        if array.shape != expected or array.dtype != np.float16:
            raise IndexStoreError(
                f"{path} holds {array.dtype} {array.shape}, the manifest says float16 {expected}; "
                "the index is damaged: ingest again"
            )
        if len(self._mapped) >= _MAPS_KEPT:
            self._mapped.clear()
        # As a plain array: taking rows from numpy's class for mapped files costs twice as much.
        found = self._mapped[shard.name] = array.view(np.ndarray)
        return found

    def blocks(
        self,
        max_rows: int = 8192,
        positions: npt.ArrayLike | None = None,
        *,
        weighted: bool = True,
    ) -> Iterator[tuple[Int64, Float32]]:
        """Stream effective rows as (positions int64 [b], rows float32 [b, dim]) with b <= max_rows.

        `positions` limits the rows (default: all); they come out ascending, each once, and without
        quarantined or deleted items. With `weighted=False` the rows lack `row_weight`, as
        curvature wants it. A block never spans two shards. Raises IndexStoreError for a position
        outside the index.
        """
        if max_rows < 1:
            raise IndexStoreError(f"max_rows is {max_rows}; a block holds at least one row")
        for block, units in self.unit_blocks(self.searchable(positions), max_rows):
            scale = self.norms[block] * self.weights[block] if weighted else self.norms[block]
            yield block, decode_rows(units, scale)

    def unit_blocks(
        self, positions: Int64, max_rows: int
    ) -> Iterator[tuple[Int64, npt.NDArray[np.float16]]]:
        """Stream the stored unit rows at `positions`, which are ascending and unique.

        A run of positions without a gap comes as a view of the file, read when it is used.
        """
        shards = self.manifest.shards
        starts = np.cumsum([0, *(shard.items for shard in shards)])
        cuts = np.searchsorted(positions, starts)
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            units, start = self.features(shards[number]), starts[number]
            for first in range(cuts[number], cuts[number + 1], max_rows):
                block = positions[first : min(first + max_rows, cuts[number + 1])]
                yield block, _take(units, block - start)

    def searchable(self, positions: npt.ArrayLike | None = None) -> Int64:
        """Return `positions` (default: all) ascending, each once: those among `ok_positions`."""
        if positions is None:
            return self.ok_positions
        wanted = np.unique(np.asarray(positions, dtype=np.int64))
        self._check_inside(wanted)
        return wanted[self._ok[wanted]]

    def curvature(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays written by `IndexWriter.write_curvature`, memory-mapped, by name."""
        return {
            Path(name).stem: self._load_array(self.folder / name)
            for name in sorted(self.manifest.files)
            if name.startswith("curvature/")
        }

    def duplicates(self) -> pa.Table | None:
        """Return the items that repeat an earlier one, by position; None: not looked for.

        Columns `item_id`, `duplicate_of`, `near_duplicate_of`, `near_distance`, as of
        `duplicate_groups` over the searchable items.
        """
        path = self.duplicates_path
        return None if path is None else self._read_table(path)

    @property
    def duplicates_path(self) -> Path | None:
        """The Parquet file of `duplicates`; None in an index that was not looked through."""
        names = [name for name in self.manifest.files if name.startswith("duplicates/")]
        return self.folder / names[0] if names else None

    def thumbnails(self, item_ids: Sequence[str]) -> dict[str, bytes]:
        """Return the previews (WebP bytes) of these items; items without one are left out."""
        found: dict[str, bytes] = {}
        # An id may stand on a deleted row too, with the preview of what it was.
        living = self._ids.take(pa.array(self.live_positions))
        places = pc.index_in(pa.array(item_ids, pa.string()), living)
        known = self.live_positions[np.unique(places.drop_null().to_numpy())]
        start = 0
        for shard in self.manifest.shards:
            low, high = np.searchsorted(known, [start, start + shard.items])
            start += shard.items
            if low == high:
                continue
            here = self._ids.take(pa.array(known[low:high]))
            table = self._read_table(self.folder / part_files(shard.name)[2])
            table = table.filter(pc.field("item_id").isin(here))
            pairs = zip(table["item_id"].to_pylist(), table["image"].to_pylist(), strict=True)
            found.update(pairs)
        return found

    def append_ledger(self, event: str, details: Mapping[str, Any]) -> None:
        """Note an event in `ledger.jsonl`; a folder that cannot be written to gives a warning."""
        try:
            ledger.append(self.folder, event, details)
        except OSError as error:
            _log.warning("%s not noted in the ledger of %s: %s", event, self.folder, error)

    @cached_property
    def _items(self) -> pa.Table:
        return self._read_items()

    @cached_property
    def _ids(self) -> pa.ChunkedArray:
        return self._read_items(["item_id"])["item_id"]

    @cached_property
    def _row_columns(self) -> pa.Table:
        return self._read_items(["status", "row_norm", "row_weight"])

    def _read_items(self, columns: list[str] | None = None) -> pa.Table:
        tables = [self._items_part(shard, columns) for shard in self.manifest.shards]
        if not tables:
            raise self._empty()
        return pa.concat_tables(tables, promote_options="permissive")

    def _items_part(self, shard: Shard, columns: list[str] | None = None) -> pa.Table:
        path = self.folder / part_files(shard.name)[1]
        table = self._read_table(path, columns=columns)
        self._check_count(path, shard, table.num_rows)
        return table

    @cached_property
    def _item_schemas(self) -> list[pa.Schema]:
        """The different schemas of the items parts."""
        found: list[pq.ParquetSchema] = []
        for shard in self.manifest.shards:
            path = self.folder / part_files(shard.name)[1]
            try:
                footer = pq.read_metadata(path)
            except (OSError, pa.ArrowException) as error:
                raise self._damaged(path, error) from error
            self._check_count(path, shard, footer.num_rows)
            if not any(footer.schema.equals(other) for other in found):
                found.append(footer.schema)
        if not found:
            raise self._empty()
        return [schema.to_arrow_schema() for schema in found]

    def _check_count(self, path: Path, shard: Shard, rows: int) -> None:
        if rows != shard.items:
            raise IndexStoreError(
                f"{path} has {rows} items, the manifest says {shard.items}; "
                "the index is damaged: ingest again"
            )

    def _check_inside(self, positions: Int64) -> None:
        if positions.size and (positions[0] < 0 or positions[-1] >= self.manifest.rows):
            raise IndexStoreError(
                f"positions {positions[0]} to {positions[-1]} do not lie in {self.folder}, "
                f"which has rows 0 to {self.manifest.rows - 1}"
            )

    def _empty(self) -> IndexStoreError:
        return IndexStoreError(f"{self.folder} holds no items; ingest a corpus into it")

    @cached_property
    def _ok(self) -> npt.NDArray[np.bool_]:
        flags: npt.NDArray[np.bool_] = pc.equal(self._row_columns["status"], "ok").to_numpy()
        return flags & self._live

    @cached_property
    def _live(self) -> npt.NDArray[np.bool_]:
        flags = np.ones(self.manifest.rows, np.bool_)
        flags[self.deleted_positions] = False
        return flags

    @cached_property
    def norms(self) -> Float32:
        """Lengths of the rows, float32 [rows]; 0 where an item is quarantined."""
        return np.asarray(self._row_columns["row_norm"], dtype=np.float32)

    @cached_property
    def weights(self) -> Float32:
        """What the method weights each row with, float32 [rows]."""
        return np.asarray(self._row_columns["row_weight"], dtype=np.float32)

    def _load_array(self, path: Path) -> npt.NDArray[Any]:
        try:
            array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise self._damaged(path, error) from error
        return array

    def _read_table(self, path: Path, columns: list[str] | None = None) -> pa.Table:
        try:
            with pq.ParquetFile(path) as file:  # a third of the time of pq.read_table
                return file.read(columns)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(path, error) from error

    def _damaged(self, path: Path, error: Exception) -> IndexStoreError:
        reason = str(error).splitlines()[0]
        with suppress(IndexStoreError):
            if read_manifest(self.folder) != self.manifest:
                return IndexStoreError(f"{self.folder} was changed meanwhile; ask again")
        return IndexStoreError(
            f"{path} cannot be read ({reason}); the index is damaged: ingest again"
        )


def _take(units: npt.NDArray[np.float16], local: Int64) -> npt.NDArray[np.float16]:
    """Return rows `local` (ascending, unique); a gapless run is a view and reads straight on."""
    if local[-1] - local[0] == len(local) - 1:
        return units[local[0] : local[-1] + 1]
    return units[local]
