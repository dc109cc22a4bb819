"""Search equals a dense float64 reference and depends on nothing but rows and query."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.index import IndexStoreError, IndexWriter, StoredIndex, scores, search

DIM = 32
N = 150
BAD = (3, 70, 149)
WEIGHTS = np.linspace(0.2, 3, N).astype(np.float32)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> StoredIndex:
    """150 rows in 4 shards; rows 20..59 are exact copies of row 20 (weights included)."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(-10, 2, (N, 1))
    rows = (rng.standard_normal((N, DIM)) * lengths).astype(np.float32)
    rows[20:60] = rows[20]
    weights = WEIGHTS.copy()
    weights[20:60] = weights[20]
    folder = tmp_path_factory.mktemp("search") / "idx"
    writer = IndexWriter.create(folder, feature_space_id="s", recipe={}, dim=DIM)
    for first, last in ((0, 1), (1, 41), (41, 140), (140, N)):
        numbers = range(first, last)
        items = pa.table(
            {
                "item_id": [str(i) for i in numbers],
                "status": ["quarantined" if i in BAD else "ok" for i in numbers],
                "error": pa.array(["broken" if i in BAD else None for i in numbers], pa.string()),
                "row_weight": weights[first:last],
            }
        )
        thumbs = pa.table(
            {"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}
        )
        writer.add_shard(items, rows[first:last], thumbs)
    writer.finish()
    return StoredIndex.open(folder)


def dense(index: StoredIndex) -> npt.NDArray[np.float64]:
    """Effective rows in float64, computed from the files without the code under test."""
    units = np.concatenate([index.features(s).astype(np.float64) for s in index.manifest.shards])
    items = index.items()
    scale = items["row_norm"].to_numpy().astype(np.float64) * items["row_weight"].to_numpy()
    rows: npt.NDArray[np.float64] = units * scale[:, None]
    return rows


def queries(n: int, seed: int = 1) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)


def reference(
    table: npt.NDArray[np.float64], query: npt.NDArray[np.float32], allowed: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = table[allowed] @ query.astype(np.float64)
    return values


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("top", [1, 10, 147])
def test_equals_dense_float64(index: StoredIndex, top: int, largest: bool) -> None:
    table, asked = dense(index), queries(37)
    allowed = np.setdiff1d(np.arange(N), BAD)
    found, positions = search(index, asked, top, largest=largest, block_rows=16)
    assert found.shape == positions.shape == (37, top)
    assert found.dtype == np.float32
    assert positions.dtype == np.int64
    for query, row_scores, row_positions in zip(asked, found, positions, strict=True):
        values = reference(table, query, allowed)
        best = np.sort(values)[::-1][:top] if largest else np.sort(values)[:top]
        tolerance = 1e-5 * np.abs(values).max()
        np.testing.assert_allclose(row_scores, best, rtol=1e-5, atol=tolerance * 1e-2)
        exact = reference(table, query, row_positions)
        np.testing.assert_allclose(row_scores, exact, rtol=1e-5, atol=tolerance * 1e-2)
        assert len(set(row_positions.tolist())) == top
        assert not set(row_positions.tolist()) & set(BAD)


@settings(deadline=None, max_examples=40)
@given(
    block_rows=st.integers(1, 200),
    top=st.integers(1, 147),
    largest=st.booleans(),
    seed=st.integers(0, 5),
)
def test_does_not_depend_on_block_size(
    index: StoredIndex, block_rows: int, top: int, largest: bool, seed: int
) -> None:
    asked = queries(3, seed)
    whole = search(index, asked, top, largest=largest)
    blocked = search(index, asked, top, largest=largest, block_rows=block_rows)
    np.testing.assert_array_equal(whole[0], blocked[0])
    np.testing.assert_array_equal(whole[1], blocked[1])


def test_does_not_depend_on_other_queries(index: StoredIndex) -> None:
    asked = queries(40)
    together = search(index, asked, 9)
    alone = search(index, asked[33:34], 9)
    np.testing.assert_array_equal(together[0][33:34], alone[0])
    np.testing.assert_array_equal(together[1][33:34], alone[1])


@pytest.mark.parametrize("block_rows", [7, 16, 1000])
def test_equal_scores_are_ordered_by_position(index: StoredIndex, block_rows: int) -> None:
    query = dense(index)[20:21].astype(np.float32) * 1e4
    values = scores(index, query[0])
    rank = int((values > values[np.searchsorted(index.ok_positions, 20)]).sum())
    for copies in (1, 5, 30, 40):
        _, positions = search(index, query, rank + copies, block_rows=block_rows)
        assert positions[0, rank:].tolist() == list(range(20, 20 + copies))


def test_a_zero_query_ties_everything(index: StoredIndex) -> None:
    found, positions = search(index, np.zeros((1, DIM), np.float32), 5, block_rows=4)
    assert not np.signbit(found).any()
    assert positions[0].tolist() == [0, 1, 2, 4, 5]


def test_the_bottom_end_is_the_top_of_the_opposite_query(index: StoredIndex) -> None:
    asked = queries(2)
    low, low_positions = search(index, asked, 12, largest=False)
    high, high_positions = search(index, -asked, 12)
    np.testing.assert_array_equal(low, -high)
    np.testing.assert_array_equal(low_positions, high_positions)
    assert (np.diff(low, axis=1) >= 0).all()


def test_a_selection_limits_the_search(index: StoredIndex) -> None:
    selection = [90, 5, 3, 148, 70, 5]
    found, positions = search(index, queries(1), 3, positions=selection)
    assert sorted(positions[0].tolist()) == [5, 90, 148]
    with pytest.raises(IndexStoreError, match="4 results asked for, 3 rows"):
        search(index, queries(1), 4, positions=selection)
    with pytest.raises(IndexStoreError, match="widen it"):
        search(index, queries(1), 1, positions=[3])
    assert found[0, 0] >= found[0, 1] >= found[0, 2]


def test_scores_are_those_of_search(index: StoredIndex) -> None:
    query = queries(1)
    everything = scores(index, query[0], block_rows=11)
    assert everything.shape == (N - len(BAD),)
    found, positions = search(index, query, 147)
    by_position = dict(zip(index.ok_positions.tolist(), everything.tolist(), strict=True))
    assert [by_position[p] for p in positions[0].tolist()] == found[0].tolist()
    some = scores(index, query[0], [9, 2, 9])
    assert some.tolist() == [by_position[9], by_position[2], by_position[9]]
    assert scores(index, query[0], np.array([], np.int64)).shape == (0,)
    with pytest.raises(IndexStoreError, match=r"position 70 .* is quarantined"):
        scores(index, query[0], [9, 70])


@pytest.mark.parametrize(
    ("asked", "top", "message"),
    [
        (np.zeros((1, DIM + 1)), 1, "32 dimensions"),
        (np.zeros(DIM), 1, "shape"),
        (np.full((1, DIM), np.nan), 1, "not finite"),
        (np.full((1, DIM), 1e300), 1, "not finite"),
        (np.ones((1, DIM)), 148, "148 results asked for, 147 rows"),
        (np.ones((1, DIM)), 0, "0 results"),
    ],
)
def test_refused(
    index: StoredIndex, asked: npt.NDArray[np.float64], top: int, message: str
) -> None:
    with pytest.raises(IndexStoreError, match=message):
        search(index, asked, top)


def test_scores_beyond_single_precision_are_refused(tmp_path: Path) -> None:
    writer = IndexWriter.create(tmp_path / "idx", feature_space_id="s", recipe={}, dim=2)
    items = pa.table({"item_id": ["a"], "status": ["ok"], "error": pa.array([None], pa.string())})
    thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    writer.add_shard(items, np.full((1, 2), 1e30, np.float32), thumbs)
    writer.finish()
    with pytest.raises(IndexStoreError, match="overflow"):
        search(StoredIndex.open(tmp_path / "idx"), np.full((1, 2), 1e30, np.float32), 1)
