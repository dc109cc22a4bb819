"""A finished index, read: items, streamed feature rows, curvature, previews."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
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
from .manifest import Manifest, Shard, read_manifest
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

    @classmethod
    def open(cls, folder: str | Path) -> StoredIndex:
        """Open the index in `folder`; IndexStoreError when there is none or it is unfinished."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest.complete:
            raise IndexStoreError(
                f"the ingest that wrote {folder} did not finish; delete the folder and ingest again"
            )
        return cls(folder, manifest)

    def items(self) -> pa.Table:
        """Return every item column, one row per position, quarantined items included (cached)."""
        return self._items

    @cached_property
    def ok_positions(self) -> Int64:
        """Ascending positions of the items that are not quarantined: those a search sees."""
        return np.flatnonzero(self._ok).astype(np.int64)

    def features(self, shard: Shard) -> npt.NDArray[np.float16]:
        """Return a shard's stored unit rows, float16 [items, dim], memory-mapped and read-only."""
        mapped = self._mapped.get(shard.name)
        if mapped is not None:
            return mapped
        path = self.folder / "features" / f"{shard.name}.npy"
        array = _load_array(path)
        expected = (shard.items, self.manifest.dim)
        if array.shape != expected or array.dtype != np.float16:
            raise IndexStoreError(
                f"{path} holds {array.dtype} {array.shape}, the manifest says float16 {expected}; "
                "the index is damaged: ingest again"
            )
        if len(self._mapped) >= _MAPS_KEPT:
            self._mapped.clear()
        self._mapped[shard.name] = array
        return array

    def blocks(
        self,
        max_rows: int = 8192,
        positions: npt.ArrayLike | None = None,
        *,
        weighted: bool = True,
    ) -> Iterator[tuple[Int64, Float32]]:
        """Stream effective rows as (positions int64 [b], rows float32 [b, dim]) with b <= max_rows.

        `positions` limits the rows (default: all); they come out ascending, each once, and without
        quarantined items. With `weighted=False` the rows lack `row_weight`, as curvature wants it.
        A block never spans two shards. Raises IndexStoreError for a position outside the index.
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
        start = 0
        for shard in self.manifest.shards:
            low, high = np.searchsorted(positions, [start, start + shard.items])
            local = positions[low:high] - start
            for first in range(0, len(local), max_rows):
                block = local[first : first + max_rows]
                yield block + start, _take(self.features(shard), block)
            start += shard.items

    def searchable(self, positions: npt.ArrayLike | None = None) -> Int64:
        """Return `positions` (default: all) ascending, each once, without quarantined items."""
        if positions is None:
            return self.ok_positions
        wanted = np.unique(np.asarray(positions, dtype=np.int64))
        if wanted.size and (wanted[0] < 0 or wanted[-1] >= self.manifest.rows):
            raise IndexStoreError(
                f"positions {wanted[0]} to {wanted[-1]} do not lie in {self.folder}, "
                f"which has rows 0 to {self.manifest.rows - 1}"
            )
        return wanted[self._ok[wanted]]

    def curvature(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays written by `IndexWriter.write_curvature`, memory-mapped, by name."""
        paths = [Path(name) for name in sorted(self.manifest.files)]
        return {
            path.stem: _load_array(self.folder / "curvature" / path.name)
            for path in paths
            if path.parent.as_posix() == "curvature" and path.suffix == ".npy"
        }

    def thumbnails(self, item_ids: Sequence[str]) -> dict[str, bytes]:
        """Return the previews (WebP bytes) of these items; items without one are left out."""
        found: dict[str, bytes] = {}
        positions = pc.index_in(pa.array(item_ids, pa.string()), self._items["item_id"])
        known = np.unique(positions.drop_null().to_numpy())
        start = 0
        for shard in self.manifest.shards:
            low, high = np.searchsorted(known, [start, start + shard.items])
            start += shard.items
            if low == high:
                continue
            table = _read_table(
                self.folder / "thumbs" / f"{shard.name}.parquet",
                filters=pc.field("item_id").isin(list(item_ids)),
            )
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
        tables = []
        for shard in self.manifest.shards:
            path = self.folder / "items" / f"{shard.name}.parquet"
            table = _read_table(path)
            if table.num_rows != shard.items:
                raise IndexStoreError(
                    f"{path} has {table.num_rows} items, the manifest says {shard.items}; "
                    "the index is damaged: ingest again"
                )
            tables.append(table)
        if not tables:
            raise IndexStoreError(f"{self.folder} holds no items; ingest a corpus into it")
        return pa.concat_tables(tables, promote_options="permissive")

    @cached_property
    def _ok(self) -> npt.NDArray[np.bool_]:
        flags: npt.NDArray[np.bool_] = pc.equal(self._items["status"], "ok").to_numpy()
        return flags

    @cached_property
    def norms(self) -> Float32:
        """Lengths of the rows, float32 [rows]; 0 where an item is quarantined."""
        return np.asarray(self._items["row_norm"], dtype=np.float32)

    @cached_property
    def weights(self) -> Float32:
        """What the method weights each row with, float32 [rows]."""
        return np.asarray(self._items["row_weight"], dtype=np.float32)


def _take(units: npt.NDArray[np.float16], local: Int64) -> npt.NDArray[np.float16]:
    """Return rows `local` (ascending, unique); a gapless run is a view and reads straight on."""
    if local[-1] - local[0] == len(local) - 1:
        return units[local[0] : local[-1] + 1]
    return units[local]


def _load_array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return array


def _read_table(path: Path, filters: pc.Expression | None = None) -> pa.Table:
    try:
        return pq.read_table(path, filters=filters)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> IndexStoreError:
    reason = str(error).splitlines()[0]
    return IndexStoreError(f"{path} cannot be read ({reason}); the index is damaged: ingest again")
