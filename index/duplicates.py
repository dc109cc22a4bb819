"""Exact and near duplicates among items, by SHA-256 and by 64-bit perceptual hash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .errors import IndexStoreError
from .reader import StoredIndex

# On 18,453 emoji: re-encoded as JPEG (quality 85) or resized, 92 % of pictures stay within 4 bits
# and 94 % within 6; but of the pairs 6 apart most show different things, and at 10 nearly all do.
RADIUS = 4
MAX_RADIUS = 8
_BALANCED = 32  # bits set in the hash of a picture with structure: those above the median of 64
# Of the file that keeps what was found.
FILE_SCHEMA = pa.schema(
    {
        "item_id": pa.string(),
        "duplicate_of": pa.string(),
        "near_duplicate_of": pa.string(),
        "near_distance": pa.int8(),
    }
)
_HASH = re.compile("[0-9a-fA-F]{16}")


@dataclass(frozen=True)
class DuplicateCounts:
    """How many items repeat an earlier one."""

    exact: int
    near: int  # that are no exact duplicates


def duplicate_groups(items: pa.Table, radius: int = RADIUS) -> pa.Table:
    """Return for every item the first one that it repeats; one row per item, in their order.

    items   with the columns `item_id`, `sha256` and `phash` (16 hex digits; null: no image)
    radius  most bits in which the perceptual hashes of near duplicates differ, 0 to 8

    Columns:
        item_id
        duplicate_of       the first item with the same file; null for that one and without others
        near_duplicate_of  the first item of its group by perceptual hash, exact duplicates too
        near_distance      bits (int8) between those two hashes

    Groups are formed in the order of the table: a hash not seen before joins the group whose first
    item is nearest within `radius`, the earliest of several, or else begins one. So members are as
    near to the item named as `near_distance` says, never chained. Perceptual hashes see brightness
    alone: recoloured drawings are near duplicates. Pictures that are flat or all symmetric
    (squares, stripes) have hashes without meaning, told by bits set other than 32; these join no
    group.

    The search is exact: distinct hashes sorted by some of their bits at a time (Manku, Jain and Das
    Sarma, WWW 2007). Time grows with the pairs that agree in two of `radius` + 2 blocks of bits.
    One core: 1e5 random hashes take half a second, 1e6 seven seconds.
    """
    if not 0 <= radius <= MAX_RADIUS:
        raise IndexStoreError(f"radius {radius} of near duplicates: give 0 to {MAX_RADIUS} bits")
    ids = items["item_id"].combine_chunks()
    first = _first_places(items["sha256"].combine_chunks().cast(pa.string()))
    near, distance = _near_places(items["phash"], radius)
    return pa.table(
        {
            "item_id": ids,
            "duplicate_of": ids.take(pa.array(first, mask=first < 0)),
            "near_duplicate_of": ids.take(pa.array(near, mask=near < 0)),
            "near_distance": pa.array(distance, mask=near < 0),
        }
    )


def duplicate_counts(groups: pa.Table) -> DuplicateCounts:
    """Count what `duplicate_groups` found."""
    exact = pc.is_valid(groups["duplicate_of"])
    near = pc.and_not(pc.is_valid(groups["near_duplicate_of"]), exact)
    return DuplicateCounts(pc.sum(exact).as_py() or 0, pc.sum(near).as_py() or 0)


def find_duplicates(index: StoredIndex) -> pa.Table | None:
    """Return the searchable items that repeat an earlier one: FILE_SCHEMA, in their order.

    None when the items have no column `sha256` or `phash`.
    """
    columns = ["item_id", "sha256", "phash"]
    if not set(columns) <= set(index.item_schema.names):
        return None
    groups = duplicate_groups(index.items(columns).take(pa.array(index.ok_positions)))
    named = pc.or_(pc.is_valid(groups["duplicate_of"]), pc.is_valid(groups["near_duplicate_of"]))
    return groups.filter(named).cast(FILE_SCHEMA)


def problem_of(index: StoredIndex) -> str | None:
    """Say why the duplicates that an index keeps cannot be those of its items; None: they can."""
    found = index.duplicates()
    if found is None:
        return None
    if not found.schema.equals(FILE_SCHEMA):
        return f"its columns are {found.schema.names}, not {FILE_SCHEMA.names}, or of other types"
    items = index.items(["item_id", "sha256"]).take(pa.array(index.ok_positions))
    place = pc.fill_null(pc.index_in(found["item_id"], items["item_id"]), -1).to_numpy()
    if (np.diff(place, prepend=-1) <= 0).any():
        return "its items are not searchable ones of the index, in their order and each once"
    for name in ("duplicate_of", "near_duplicate_of"):
        rows = np.flatnonzero(pc.is_valid(found[name]).to_numpy())
        named = found[name].take(pa.array(rows))
        earlier = pc.fill_null(pc.index_in(named, items["item_id"]), -1).to_numpy()
        wrong = (earlier < 0) | (earlier >= place[rows])
        if wrong.any():
            item_id = named[int(np.argmax(wrong))].as_py()
            return f"{name} {item_id!r} is no searchable item of the index before the one it names"
        files = (items["sha256"].take(pa.array(at)) for at in (place[rows], earlier))
        if name == "duplicate_of" and not pc.all(pc.equal(*files), min_count=0).as_py():
            return "an item and its duplicate_of have not the same sha256"
    distance, near = (found[name] for name in ("near_distance", "near_duplicate_of"))
    if not distance.is_valid().equals(near.is_valid()):
        return "near_distance and near_duplicate_of do not stand together"
    named = pc.or_(found["duplicate_of"].is_valid(), near.is_valid())
    if not pc.all(named, min_count=0).as_py():
        return "an item names no other"
    return None


def _first_places(values: pa.Array) -> npt.NDArray[np.int64]:
    """The row of each value's first occurrence, -1 where it is here or the value is null."""
    # `index_in` gives the first place; nulls are found too, unlike here.
    first: npt.NDArray[np.int64] = pc.index_in(values, values).to_numpy().astype(np.int64)
    alone = (first == np.arange(len(values))) | pc.is_null(values).to_numpy(zero_copy_only=False)
    return np.where(alone, -1, first)


def _near_places(
    phash: pa.ChunkedArray, radius: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """The row of the first item of each item's group, -1 for that one; the distance to it."""
    rows, hashes = _hashes(phash)
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # hashes in the order in which they first occur
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    leader, apart = _leaders(distinct[order], radius)
    place = rows[first[order]]  # of the first item with a hash
    near = np.full(len(phash), -1, np.int64)
    distance = np.zeros(len(phash), np.int8)
    near[rows] = place[leader[rank[which]]]
    distance[rows] = apart[rank[which]]
    near[near == np.arange(len(near))] = -1
    return near, distance


def _leaders(
    hashes: npt.NDArray[np.uint64], radius: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """For each of distinct hashes the number of the one that leads its group, and the distance."""
    earlier, later, bits = _near_pairs(hashes, radius)
    order = np.lexsort((earlier, bits, later))
    leader = list(range(len(hashes)))
    apart = np.zeros(len(hashes), np.int8)
    # A hash comes after all that are earlier, and takes its nearest leader first.
    for one, other, distance in zip(*(part[order].tolist() for part in (earlier, later, bits)),
                                    strict=True):  # fmt: skip
        if leader[other] == other and leader[one] == one:
            leader[other], apart[other] = one, distance
    return np.array(leader, np.int64), apart


def _near_pairs(
    hashes: npt.NDArray[np.uint64], radius: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Every pair of distinct hashes within `radius`: earlier one, later one, bits between them.

    Of `radius` + 2 blocks of bits, two are equal in such a pair: it stands together when sorted by
    the right two.
    """
    edges = [block * 64 // (radius + 2) for block in range(radius + 3)]
    blocks = [np.uint64((1 << stop) - (1 << start)) for start, stop in pairwise(edges)]
    found = [np.empty((2, 0), np.int64)]
    for one, other in combinations(blocks, 2):
        keys = hashes & (one | other)
        order = np.argsort(keys)
        keys = keys[order]
        at, apart = np.arange(len(keys)), 0
        while len(at):
            apart += 1
            at = at[at + apart < len(keys)]
            at = at[keys[at] == keys[at + apart]]
            pairs = np.stack([order[at], order[at + apart]])
            near = np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]]) <= radius
            found.append(np.sort(pairs[:, near], axis=0))
    pairs = np.unique(np.concatenate(found, axis=1), axis=1)
    return pairs[0], pairs[1], np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]])


def _hashes(phash: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Rows that have a hash with meaning, and those hashes."""
    rows = np.flatnonzero(phash.is_valid().to_numpy())
    texts = phash.drop_null().to_pylist()
    wrong = next((text for text in texts if not _HASH.fullmatch(text)), None)
    if wrong is not None:
        raise IndexStoreError(f"perceptual hash {wrong!r} is not 16 hex digits")
    hashes = np.frombuffer(bytes.fromhex("".join(texts)), ">u8").astype(np.uint64)
    structured = np.bitwise_count(hashes) == _BALANCED
    return rows[structured], hashes[structured]
