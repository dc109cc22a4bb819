"""The best rows of an index for a query: exact, or exact scores of candidates found faster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import numpy.typing as npt

from . import accelerator, gpu
from .errors import IndexStoreError
from .metrics import Metric, prepare
from .products import Kernel
from .reader import Int64, StoredIndex
from .rows import Float16, Float32

BLOCK_ROWS = 2048  # 8 MiB at 2048 dimensions: rows stay in the cache for the next query
Found = tuple[Float32, Int64]


def search(
    index: StoredIndex,
    queries: npt.NDArray[np.floating],
    top: int,
    *,
    metric: Metric | None = None,
    positions: npt.ArrayLike | None = None,
    largest: bool = True,
    exact: bool = False,
    proposers: set[str] | None = None,
    block_rows: int = BLOCK_ROWS,
) -> Found:
    """Return the `top` best rows for each query: scores and positions, float32 and int64 [Q, top].

    queries    [Q, dim], finite; taken as float32
    metric     what rows are ranked by (default: inner product with row_weight * row_norm * unit)
    positions  the rows to look at (default: all); quarantined ones never count
    largest    False: the other end, lowest score first
    exact      True: look at every row; False: in a large index, at those that an accelerator
               proposes (`accelerator`), which misses about one hit in a hundred
    proposers  is told who proposed the rows looked at: `gpu`, `accelerator`; nobody: all were

    Scores are exact in either case. Equal ones (exact duplicates have them) are ordered by
    position, and nothing depends on `block_rows` or on the number of threads. Where an accelerator
    proposes, that order is among the proposed: of equal rows a later one may stand for an earlier.
    Raises IndexStoreError when fewer than `top` rows can be searched.
    """
    metric = metric or Metric()
    vectors, scale = _prepared(index, queries, metric)
    wanted = index.searchable(positions)
    available = len(wanted)
    if not 1 <= top <= available:
        raise IndexStoreError(
            f"{top} results asked for, {available} rows can be searched in {index.folder}; "
            f"choose a number from 1 to {available}"
            if available
            else f"no row of {index.folder} can be searched under this selection; widen it"
        )
    sign = np.float32(1 if largest else -1)
    signed = vectors * sign
    proposed = None
    for name, source in () if exact else (("gpu", gpu), ("accelerator", accelerator)):
        if proposed is None:
            proposed = source.candidates(index, signed, scale, top, wanted, metric)
            if proposed is not None and proposers is not None:
                proposers.add(name)
    if proposed is None:
        best, found = _streamed(index, signed, scale, wanted, top, block_rows)
    else:
        best, found = rescored(index, signed, scale, proposed, top)
    return best * sign + np.float32(0), found  # + 0 turns -0 into 0


def rescored(
    index: StoredIndex, queries: Float32, scale: Float32, proposed: Sequence[Int64], top: int
) -> Found:
    """Return the `top` best of the positions proposed for each query, by their exact scores."""
    parts = [
        _streamed(index, query[None], scale, rows, top, BLOCK_ROWS)
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


def scores(
    index: StoredIndex,
    query: npt.NDArray[np.floating],
    positions: npt.ArrayLike | None = None,
    *,
    metric: Metric | None = None,
    block_rows: int = BLOCK_ROWS,
) -> Float32:
    """Return the score of every row for one query [dim]: float32 [n], the values `search` gives.

    Entry i belongs to `positions[i]`, by default to `index.ok_positions[i]`. Raises
    IndexStoreError when `positions` holds a quarantined item, which has no score.
    """
    vectors, scale = _prepared(index, np.asarray(query)[None], metric or Metric())
    asked = index.ok_positions if positions is None else np.asarray(positions, dtype=np.int64)
    searched = index.searchable(asked)
    if not np.isin(asked, searched).all():
        bad = int(np.setdiff1d(asked, searched)[0])
        raise IndexStoreError(f"position {bad} of {index.folder} is quarantined and has no score")
    kernel = Kernel(index.manifest.dim)
    pieces = [
        _scaled(kernel, units, vectors, scale[block])[0]
        for block, units in _gathered(index, searched, block_rows)
    ]
    values = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    return values[np.searchsorted(searched, asked)]


def _streamed(
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
        kernel, best = Kernel(index.manifest.dim), _Best(len(queries), top)
        for block, units in _gathered(index, share, block_rows):
            best.add(_scaled(kernel, units, queries, scale[block]), block)
        return best.found()

    if threads == 1:
        return work(positions)
    with ThreadPoolExecutor(threads) as pool:
        return merge(pool.map(work, np.array_split(positions, threads)), top)


def _gathered(
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


def _scaled(kernel: Kernel, units: Float16, queries: Float32, scale: Float32) -> Float32:
    with np.errstate(over="ignore"):
        values = kernel(units, queries) * scale
    if not np.isfinite(values).all():
        raise IndexStoreError("scores overflow single precision; scale the query down")
    return values


class _Best:
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


def _prepared(
    index: StoredIndex, queries: npt.NDArray[np.floating], metric: Metric
) -> tuple[Float32, Float32]:
    dim = index.manifest.dim
    if queries.ndim != 2 or queries.shape[1] != dim or not len(queries):
        raise IndexStoreError(
            f"queries have shape {queries.shape}, rows of {index.folder} have {dim} dimensions; "
            "make the query with the recipe of the index"
        )
    if not np.isfinite(queries).all():
        raise IndexStoreError("a query holds values that are not finite")
    vectors, scale = prepare(index, queries, metric)
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(vectors, dtype=np.float32)
    if not np.isfinite(single).all():
        raise IndexStoreError("a query holds values that are not finite in single precision")
    return single, scale
