"""The best rows of an index for a query: exact, or exact scores of candidates found faster."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from . import accelerator, gpu
from .errors import IndexStoreError
from .exact import BLOCK_ROWS, Found, gathered, rescored, scaled, streamed
from .metrics import Metric, prepare
from .products import Kernel
from .reader import StoredIndex
from .rows import Float32


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
    proposers  is told who proposed the rows looked at: `gpu` or `accelerator`, and with it `cells`
               when the codes of some cells only were scanned; nobody: all were looked at

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
    if not exact:
        asking = index, signed, scale, top, wanted, metric, proposers
        proposed = gpu.candidates(*asking, largest=largest)
        if proposed is None:
            proposed = accelerator.candidates(*asking, largest=largest)
    if proposed is None:
        best, found = streamed(index, signed, scale, wanted, top, block_rows)
    else:
        best, found = rescored(index, signed, scale, proposed, top)
    return best * sign + np.float32(0), found  # + 0 turns -0 into 0


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
        scaled(kernel, units, vectors, scale[block])[0]
        for block, units in gathered(index, searched, block_rows)
    ]
    values = np.concatenate(pieces) if pieces else np.empty(0, np.float32)
    return values[np.searchsorted(searched, asked)]


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
