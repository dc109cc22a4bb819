"""Exact maximum inner product over the rows of an index, streamed through FAISS."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

from .errors import IndexStoreError
from .reader import Int64, StoredIndex
from .rows import Float32

BLOCK_ROWS = 8192  # 128 MiB of float32 at 4096 dimensions
# FAISS computes each inner product on its own for few queries, and with BLAS, whose rounding
# depends on the shape of the block, for many (from 20 on in older releases).
_QUERIES_AT_ONCE = 16


def search(
    index: StoredIndex,
    queries: npt.NDArray[np.floating],
    top: int,
    *,
    positions: npt.ArrayLike | None = None,
    largest: bool = True,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Float32, Int64]:
    """Return the `top` best rows for each query: scores and positions, float32 and int64 [Q, top].

    queries    [Q, dim], finite; taken as float32
    positions  the rows to look at (default: all); quarantined ones never count
    largest    False: the other end, lowest score first

    The score is the inner product of the query with row_weight * row_norm * unit row. Equal scores
    (exact duplicates have them) are ordered by position, and nothing depends on `block_rows`.
    Raises IndexStoreError when fewer than `top` rows can be searched.
    """
    queries = _checked(index, queries)
    available = len(index.searchable(positions))
    if not 1 <= top <= available:
        raise IndexStoreError(
            f"{top} results asked for, {available} rows can be searched in {index.folder}; "
            f"choose a number from 1 to {available}"
            if available
            else f"no row of {index.folder} can be searched under this selection; widen it"
        )
    sign = np.float32(1 if largest else -1)
    signed = queries * sign
    best_scores = np.empty((len(queries), 0), np.float32)
    best_positions = np.empty((len(queries), 0), np.int64)
    for block, rows in index.blocks(block_rows, positions):
        block_scores, local = _best_of_block(signed, rows, min(top, len(rows)))
        all_scores = np.concatenate([best_scores, block_scores], axis=1)
        all_positions = np.concatenate([best_positions, block[local]], axis=1)
        order = np.lexsort((all_positions, -all_scores), axis=1)[:, :top]
        best_scores = np.take_along_axis(all_scores, order, axis=1)
        best_positions = np.take_along_axis(all_positions, order, axis=1)
    return best_scores * sign + np.float32(0), best_positions  # + 0 turns -0 into 0


def scores(
    index: StoredIndex,
    query: npt.NDArray[np.floating],
    positions: npt.ArrayLike | None = None,
    *,
    block_rows: int = BLOCK_ROWS,
) -> Float32:
    """Return the score of every row for one query [dim]: float32 [n], the values `search` gives.

    Entry i belongs to `positions[i]`, by default to `index.ok_positions[i]`. Raises
    IndexStoreError when `positions` holds a quarantined item, which has no score.
    """
    queries = _checked(index, np.asarray(query)[None])
    asked = index.ok_positions if positions is None else np.asarray(positions, dtype=np.int64)
    searched = index.searchable(asked)
    if not np.isin(asked, searched).all():
        bad = int(np.setdiff1d(asked, searched)[0])
        raise IndexStoreError(f"position {bad} of {index.folder} is quarantined and has no score")
    pieces = [_all_scores(queries, rows)[0] for _, rows in index.blocks(block_rows, searched)]
    values = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    return values[np.searchsorted(searched, asked)]


def _best_of_block(queries: Float32, rows: Float32, k: int) -> tuple[Float32, Int64]:
    """Return the k best rows of a block for each query, ties to the lower row: ([Q, k], [Q, k])."""
    if k == len(rows):
        return _all_scores(queries, rows), np.tile(np.arange(k, dtype=np.int64), (len(queries), 1))
    best, local = _knn(queries, rows, k + 1)
    # Among equal scores FAISS keeps any: where the cut falls between equals, choose ourselves.
    tied = np.flatnonzero(best[:, k - 1] == best[:, k])
    best, local = best[:, :k], local[:, :k]
    if tied.size:
        everything = _all_scores(queries[tied], rows)
        order = np.argsort(-everything, axis=1, kind="stable")[:, :k]
        local[tied] = order
        best[tied] = np.take_along_axis(everything, order, axis=1)
    return best, local


def _all_scores(queries: Float32, rows: Float32) -> Float32:
    """Return all inner products [Q, n], by the same kernel as `_best_of_block`."""
    ranked, local = _knn(queries, rows, len(rows))
    result = np.empty_like(ranked)
    np.put_along_axis(result, local, ranked, axis=1)
    return result


def _knn(queries: Float32, rows: Float32, k: int) -> tuple[Float32, Int64]:
    parts = [
        faiss.knn(queries[i : i + _QUERIES_AT_ONCE], rows, k, metric=faiss.METRIC_INNER_PRODUCT)
        for i in range(0, len(queries), _QUERIES_AT_ONCE)
    ]
    found = np.concatenate([values for values, _ in parts])
    local = np.concatenate([ids for _, ids in parts])
    if not np.isfinite(found).all() or (local < 0).any():
        raise IndexStoreError("scores overflow single precision; scale the query down")
    return found, local


def _checked(index: StoredIndex, queries: npt.NDArray[np.floating]) -> Float32:
    dim = index.manifest.dim
    if queries.ndim != 2 or queries.shape[1] != dim or not len(queries):
        raise IndexStoreError(
            f"queries have shape {queries.shape}, rows of {index.folder} have {dim} dimensions; "
            "make the query with the recipe of the index"
        )
    with np.errstate(over="ignore"):
        queries = np.ascontiguousarray(queries, dtype=np.float32)
    if not np.isfinite(queries).all():
        raise IndexStoreError("a query holds values that are not finite in single precision")
    return queries
