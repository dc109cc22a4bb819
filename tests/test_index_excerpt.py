"""Shards read as an index of their own: laid end to end they are the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headwater.index import (
    Catalog,
    IndexStoreError,
    IndexWriter,
    Manifest,
    SearchCluster,
    Shard,
    StoredIndex,
    filter_positions,
    search,
)
from headwater.index.actors import ShardHolder
from headwater.index.excerpt import Excerpt, split_shards

DIM = 16
SIZES = (5, 40, 1, 30)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> StoredIndex:
    """Four shards, the last with a column more; equal rows, quarantined and deleted ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("excerpt") / "idx"
    writer = IndexWriter.create(folder, feature_space_id="s", recipe={}, dim=DIM)
    first = 0
    for size in SIZES:
        numbers = range(first, first + size)
        rows = rng.standard_normal((size, DIM)).astype(np.float32)
        rows[0] = 1  # in every shard: equal scores, told apart by position
        columns = {
            "item_id": [f"item-{i}" for i in numbers],
            "status": ["quarantined" if i % 13 == 7 else "ok" for i in numbers],
            "error": pa.array(["bad" if i % 13 == 7 else None for i in numbers], pa.string()),
            "even": [i % 2 == 0 for i in numbers],
        }
        if size == SIZES[-1]:
            columns["late"] = [i % 3 for i in numbers]
        thumbs = pa.table({"item_id": columns["item_id"], "image": [b"%d" % i for i in numbers]})
        writer.add_shard(pa.table(columns), rows, thumbs)
        first += size
    writer.finish()
    with IndexWriter.open(folder) as writer:
        writer.write_tombstones(np.array([0, 4, 45, 75]))
        writer.finish(event="delete")
    return StoredIndex.open(folder)


def excerpts(index: StoredIndex, parts: int) -> list[Excerpt]:
    return [
        Excerpt(index.folder, index.manifest, start, stop)
        for start, stop in split_shards(index.manifest, parts)
    ]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_excerpts_end_to_end_are_the_index(index: StoredIndex, parts: int) -> None:
    found = excerpts(index, parts)
    assert len(found) == min(parts, len(SIZES))
    items = pa.concat_tables([e.items() for e in found], promote_options="permissive")
    assert items.equals(index.items())
    for name in ("ok_positions", "deleted_positions", "live_positions"):
        joined = np.concatenate([getattr(e, name) + e.first_row for e in found])
        np.testing.assert_array_equal(joined, getattr(index, name))
    rows = np.concatenate([block for e in found for _, block in e.blocks()])
    np.testing.assert_array_equal(rows, np.concatenate([block for _, block in index.blocks()]))


def test_scores_of_an_excerpt_are_those_of_the_index(index: StoredIndex) -> None:
    query = np.linspace(-1, 1, DIM, dtype=np.float32)[None]
    scores, found = search(index, query, len(index.ok_positions))
    whole = dict(zip(found[0].tolist(), scores[0].tolist(), strict=True))
    for excerpt in excerpts(index, 2):
        few, local = search(excerpt, query, len(excerpt.ok_positions))
        for position, score in zip((local[0] + excerpt.first_row).tolist(), few[0], strict=True):
            assert whole.pop(position) == score
    assert not whole


def test_a_filter_on_a_column_that_only_some_shards_have(index: StoredIndex) -> None:
    """What actors answer, without Ray: `late` stands in the last shard alone."""
    query = np.linspace(-1, 1, DIM, dtype=np.float32)[None]
    parts = split_shards(index.manifest, 4)
    holder = ShardHolder(str(index.folder), index.manifest)
    schema = pa.unify_schemas([holder.schema(part) for part in parts], promote_options="permissive")
    where = "late = 1 OR (late IS NULL AND even)"
    expected = index.searchable(filter_positions(index.items(), where))
    counts = [holder.count(part, schema, where) for part in parts]
    assert sum(counts) == len(expected) < len(index.ok_positions)
    assert counts[0] == 1  # item-2: item-0 and item-4 are deleted
    assert counts[2] == 0  # its one row is deleted
    answers = [holder.best(part, schema, where, query, 50, {}) for part in parts]
    found = np.sort(np.concatenate([positions[0] for _, positions, _ in answers]))
    np.testing.assert_array_equal(found, expected)
    rows, previews = holder.items(parts[1], schema, np.array([9, 6]))
    assert rows == index.items().take(pa.array([9, 6])).to_pylist()
    assert previews == {"item-6": b"6", "item-9": b"9"}


def test_a_filter_on_the_position_means_that_in_the_index(index: StoredIndex) -> None:
    query = np.linspace(-1, 1, DIM, dtype=np.float32)[None]
    holder = ShardHolder(str(index.folder), index.manifest)
    parts = split_shards(index.manifest, 4)
    schema, where = index.item_schema, "position BETWEEN 3 AND 50"
    answers = [holder.best(part, schema, where, query, 50, {}) for part in parts]
    found = np.sort(np.concatenate([positions[0] for _, positions, _ in answers]))
    np.testing.assert_array_equal(found, Catalog(index).select(where))
    assert len(found) == sum(holder.count(part, schema, where) for part in parts)


def test_previews_of_an_excerpt(index: StoredIndex) -> None:
    first, second = excerpts(index, 2)
    assert first.thumbnails(["item-45", "item-7"]) == {"item-7": b"7"}
    assert second.thumbnails(["item-7", "item-46"]) == {"item-46": b"46"}


@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=60), parts=st.integers(1, 80))
def test_every_shard_is_in_one_part(sizes: list[int], parts: int) -> None:
    shards = tuple(Shard(f"part-{i:05d}", size, 0, {}) for i, size in enumerate(sizes))
    found = split_shards(Manifest("s", {}, 8, rows=sum(sizes), shards=shards), parts)
    assert [i for start, stop in found for i in range(start, stop)] == list(range(len(sizes)))
    assert len(found) <= parts
    assert all(start < stop for start, stop in found)
    # None holds more than its share and one shard.
    heaviest = max(sum(sizes[start:stop]) for start, stop in found)
    assert heaviest <= sum(sizes) / parts + max(sizes)


def test_an_index_without_items_is_refused(tmp_path: Path) -> None:
    IndexWriter.create(tmp_path / "idx", feature_space_id="s", recipe={}, dim=4).finish()
    with pytest.raises(IndexStoreError, match="holds no items"):
        SearchCluster(tmp_path / "idx")
