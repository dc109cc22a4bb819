"""Rows removed from an index: from its answers at once, from the disk by `compact`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from headwater.index import (
    EncodedRows,
    IndexStoreError,
    IndexWriter,
    Shard,
    StoredIndex,
    filter_positions,
    part_files,
    part_name,
    write_part,
)
from headwater.index.files import sha256_of

from .spectrum import curvature_arrays

Int64 = npt.NDArray[np.int64]
_NAMED = 3  # unknown ids that an error shows


@dataclass(frozen=True)
class Deletion:
    """What `delete` did."""

    folder: Path
    deleted: tuple[str, ...]  # ids of the items that no answer shows any more
    remaining: int  # items, quarantined ones included


@dataclass(frozen=True)
class Compaction:
    """What `compact` did."""

    folder: Path
    removed: int  # rows taken from the disk
    remaining: int
    parts: int  # rewritten or removed


def delete(
    index: str | Path, *, where: str | None = None, ids: Iterable[str] | None = None
) -> Deletion:
    """Remove items from every answer of an index, its curvature included, at once.

    Their rows, captions and previews stay on the disk until `compact`. The Gram matrix is reduced
    by the deleted rows in double precision and decomposed again, so that scores and the unit of
    damping are those of an index that never held them. Duplicates are looked for anew.

    Args:
        index: its folder.
        where: DuckDB expression over the item columns, quarantined items included.
        ids: item ids; those deleted before do no harm. Give this or `where`.

    Raises:
        IndexStoreError: no index, a bad `where`, ids that it does not hold, another process is
            writing, or an ingest into it is unfinished.
    """
    if (where is None) == (ids is None):
        raise IndexStoreError("give --where or --ids, one of them, to say what to delete")
    with IndexWriter.open(index) as writer:
        _check_settled(writer, "delete")
        before = StoredIndex(writer.folder, writer.manifest)
        if where is not None:
            wanted = filter_positions(before.items(), where)
        else:
            wanted = _positions_of(before, list(dict.fromkeys(ids or ())))
        gone = np.intersect1d(wanted, before.live_positions)
        deleted = tuple(before.items()["item_id"].take(pa.array(gone)).to_pylist())
        remaining = len(before.live_positions) - len(gone)
        if len(gone):
            writer.write_tombstones(np.union1d(before.deleted_positions, gone))
            after = StoredIndex(writer.folder, writer.manifest)
            if len(after.ok_positions) < len(before.ok_positions):
                writer.write_curvature(curvature_arrays(after, before))
                writer.write_duplicates()
            writer.finish({"where": where, "deleted": list(deleted)}, event="delete")
    return Deletion(Path(index), deleted, remaining)


def compact(index: str | Path) -> Compaction:
    """Take deleted rows from the disk: parts that hold some are written anew, the rest stays.

    The order of the remaining items stays, and with it every answer and what is a duplicate.

    Raises:
        IndexStoreError: no index, another process is writing, an ingest into it is unfinished, or
            a part that is to be written anew is damaged.
    """
    with IndexWriter.open(index) as writer:
        _check_settled(writer, "compact")
        stored = StoredIndex(writer.folder, writer.manifest)
        removed = stored.deleted_positions
        number, start = stored.manifest.next_part, 0
        rewritten: dict[str, Shard | None] = {}
        for shard in stored.manifest.shards:
            low, high = np.searchsorted(removed, [start, start + shard.items])
            if low < high:
                kept = np.setdiff1d(np.arange(shard.items), removed[low:high] - start)
                rewritten[shard.name] = None
                if len(kept):
                    rewritten[shard.name] = _without(stored, shard, kept, part_name(number))
                    number += 1
            start += shard.items
        if rewritten:
            writer.replace_parts(rewritten, number)
            writer.finish({"removed": len(removed)}, event="compact")
        remaining = stored.manifest.rows - len(removed)
    return Compaction(Path(index), len(removed), remaining, len(rewritten))


def _check_settled(writer: IndexWriter, then: str) -> None:
    """Refuse to change rows that an unfinished ingest refers to by their positions."""
    if writer.unfinished_job():
        raise IndexStoreError(
            f"an ingest into {writer.folder} is unfinished; run it again to its end, "
            f"or begin it anew with --restart, then {then}"
        )


def _positions_of(stored: StoredIndex, ids: list[str]) -> Int64:
    column = stored.items(["item_id"])["item_id"]
    asked = pa.array(ids, pa.string())
    unknown = asked.filter(pc.invert(pc.is_in(asked, column))).to_pylist()
    if unknown:
        shown = ", ".join(map(repr, unknown[:_NAMED])) + (", ..." if unknown[_NAMED:] else "")
        raise IndexStoreError(
            f"{stored.folder} does not hold {len(unknown)} of the {len(ids)} ids: {shown}; "
            "nothing was deleted"
        )
    # An id may stand on an older, deleted row as well: every row that has it is meant.
    found: Int64 = np.flatnonzero(pc.is_in(column, asked).to_numpy())
    return found


def _without(stored: StoredIndex, shard: Shard, kept: Int64, name: str) -> Shard:
    """The part with the rows `kept` alone, under another name."""
    for path, digest in shard.files.items():  # a new digest would hide what is wrong with the old
        if sha256_of(stored.folder / path) != digest:
            raise IndexStoreError(
                f"{stored.folder / path} is not what was written: its sha256 is another; "
                "nothing was compacted. Put the file back from a copy, or ingest again"
            )
    _, items_path, thumbs_path = part_files(shard.name)
    # Not pq.read_table: it would add a column for a folder named like `licence=MIT`.
    items = pq.ParquetFile(stored.folder / items_path).read().take(pa.array(kept))
    thumbs = pq.ParquetFile(stored.folder / thumbs_path).read()
    thumbs = thumbs.filter(pc.is_in(thumbs["item_id"], items["item_id"]))
    encoded = EncodedRows(items, np.ascontiguousarray(stored.features(shard)[kept]))
    return write_part(stored.folder, name, encoded, thumbs)
