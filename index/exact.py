"""Exact scores of stored rows, a block at a time, and the best of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np

from .errors import IndexStoreError
from .products import Kernel
from .reader import Int64, StoredIndex
from .rows import Float16, Float32

BLOCK_ROWS = 2048  # 8 MiB at 2048 dimensions: rows stay in the cache for the next query
Found = tuple[Float32, Int64]


def rescored(
    index: StoredIndex, queries: Float32, scale: Float32, proposed: Sequence[Int64], top: int
) -> Found:
    """Return the `top` best of the positions proposed for each query, by their exact scores."""
    parts = [
        streamed(index, query[None], scale, rows, top, BLOCK_ROWS)
        for query, rows in zip(queries, proposed, strict=True)
    ]
    best, found = (np.concatenate(column) for column in zip(*parts, strict=True))
    return best, found


def merge(parts: Iterable[Found], top: int) -> Found:
    """Return the `top` best of several results for the same queries, ties to the lower position.

    Each part holds (scores, positions) [Q, k] with its own k: of some shards, say.
    """
    scores_of, positions_of = zip(*parts, strict=True)
    everything = np.concatenate(scores_of, axis=1)
    positions = np.concatenate(positions_of, axis=1)
    order = np.lexsort((positions, -everything), axis=1)[:, :top]
    return (
        np.take_along_axis(everything, order, axis=1),
        np.take_along_axis(positions, order, axis=1),
    )


def streamed(
    index: StoredIndex,
    queries: Float32,
    scale: Float32,
    positions: Int64,
    top: int,
    block_rows: int,
) -> Found:
    """Rank the rows at `positions`, as many blocks at a time as FAISS has threads."""
    threads = max(1, min(faiss.omp_get_max_threads(), len(positions) // 512))

    def work(share: Int64) -> Found:
        kernel, best = Kernel(index.manifest.dim), Best(len(queries), top)
        for block, units in gathered(index, share, block_rows):
            best.add(scaled(kernel, units, queries, scale[block]), block)
        return best.found()

    if threads == 1:
        return work(positions)
    with ThreadPoolExecutor(threads) as pool:
        return merge(pool.map(work, np.array_split(positions, threads)), top)


def gathered(
    index: StoredIndex, positions: Int64, block_rows: int
) -> Iterator[tuple[Int64, Float16]]:
    """Stream unit rows with scattered ones put together: a call costs as much as 50 rows."""
    held: list[tuple[Int64, Float16]] = []
    count = 0
    for block, units in index.unit_blocks(positions, block_rows):
        if not held and len(block) == block_rows:
            yield block, np.ascontiguousarray(units)
            continue
        held.append((block, units))
        count += len(block)
        if count >= block_rows:
            yield _together(held)
            held, count = [], 0
    if held:
        yield _together(held)


def _together(held: list[tuple[Int64, Float16]]) -> tuple[Int64, Float16]:
    blocks, units = zip(*held, strict=True)
    return np.concatenate(blocks), np.concatenate(units)


def scaled(kernel: Kernel, units: Float16, queries: Float32, scale: Float32) -> Float32:
    """Return scores [Q, n] of rows [n, dim]; IndexStoreError when they overflow."""
    with np.errstate(over="ignore"):
        values = kernel(units, queries) * scale
    if not np.isfinite(values).all():
        raise IndexStoreError("scores overflow single precision; scale the query down")
    return values


class Best:
    """The `top` best of what was added so far, for each query."""

    def __init__(self, queries: int, top: int) -> None:
        self._top = top
        self._bars = np.full(queries, -np.inf, np.float32)  # score of the last that still counts
        self._parts: list[list[tuple[Float32, Int64]]] = [[] for _ in range(queries)]
        self._held = np.zeros(queries, np.int64)

    def add(self, values: Float32, positions: Int64) -> None:
        """Take in scores [Q, n] of the rows at `positions` [n]."""
        for query, row in enumerate(values):
            # What equals the bar stays: its position may be lower.
            chosen = np.flatnonzero(row >= self._bars[query])
            if not len(chosen):
                continue
            self._parts[query].append((row[chosen], positions[chosen]))
            self._held[query] += len(chosen)
            if self._held[query] >= 2 * self._top + BLOCK_ROWS:
                self._shorten(query)

    def found(self) -> Found:
        """Scores and positions [Q, at most top], best first."""
        for query in range(len(self._parts)):
            self._shorten(query)
        columns = zip(*(parts[0] for parts in self._parts), strict=True)
        found_scores, found_positions = (np.stack(column) for column in columns)
        return found_scores, found_positions

    def _shorten(self, query: int) -> None:
        values, positions = (
            np.concatenate(column) for column in zip(*self._parts[query], strict=True)
        )
        order = np.lexsort((positions, -values))[: self._top]
        self._parts[query] = [(values[order], positions[order])]
        self._held[query] = len(order)
        if len(order) == self._top:
            self._bars[query] = values[order[-1]]
