"""Candidates of an index that lies in the memory of a GPU, by a FAISS built for one.

Rows are kept in half precision with their scale folded in, so a score there is good to a part in a
hundred of the largest: a few more rows than asked for are looked at again on the processor, which
gives the same scores as a search without a GPU. They lie in pieces (PIECE_BYTES) searched in turn:
FAISS has no room to spare in a flat index and makes all of it anew for every block that is added,
so that a piece, and not all rows, is there twice while it is copied. Where the memory does not hold
the rows, it holds short codes (`gpu_cells`), and more rows are looked at again.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import faiss as _faiss
import numpy as np

from .cells import cell_count
from .exact import Found, merge
from .gpu_cells import Inverted, codes_bytes
from .metrics import Metric
from .products import selector
from .reader import Int64, StoredIndex
from .rows import Float32, decode_rows

faiss: Any = _faiss  # its stubs lack half of what is used here
_log = logging.getLogger(__name__)
FROM_ROWS = 100_000  # below, copying the rows takes longer than many questions to the processor
# Copying a million rows took as long as 160 queries of them to two accelerated cores (8 s, 49 ms):
# the one question of a command is answered sooner without.
FROM_QUERIES = 100  # asked of an index in this process, a question's seeds each for itself
MOST_RESULTS = 2048  # of a search on a GPU, by FAISS
# Of rows, scanned by one call: a million of 4,096 numbers. In four pieces they took 5.7 ms, in one
# 3.2 (benchmarks/results/index.md); of more rows, what a call costs is lost in the scan.
PIECE_BYTES = 2**33
_SCRATCH_BYTES = 3 * 2**30  # left free: FAISS itself takes half of it, libraries and searches more
_BLOCK_ROWS = 8192


def candidates(
    index: StoredIndex,
    queries: Float32,
    scale: Float32,
    top: int,
    wanted: Int64,
    metric: Metric,
    proposers: set[str] | None = None,
    *,
    largest: bool = True,
) -> list[Int64] | None:
    """Return, for each query [Q, dim], ascending positions among `wanted` that hold its best.

    None without a GPU or a FAISS for it, for a small index, for the first queries of a process,
    when codes or results are too many for it, and for a part of the rows when this FAISS ignores
    selectors, or of codes. Otherwise `proposers` is told `gpu`, and `cells` when the codes of some
    cells only were scanned. `largest` is False for queries that were negated: their best are the
    other end of a ranking.
    """
    count = min(2 * top + 64, len(wanted))
    if index.manifest.rows < FROM_ROWS or count > MOST_RESULTS or not available():
        return None
    _ASKED[index] = _ASKED.get(index, 0) + len(queries)
    if _ASKED[index] < FROM_QUERIES or index in _TOO_LARGE:
        return None
    held = _held(index, scale, metric)
    if held is None:
        return None
    told = {"gpu"}
    if isinstance(held, Inverted):
        # Measured for the best of all rows; what is least like a picture gathers in no cell.
        visit = held.visit(top) if largest else None
        if visit is not None:
            told.add("cells")
        proposed = held.candidates(queries, top, wanted, visit)
    else:
        proposed = held.candidates(queries, count, wanted)
    if proposed is not None and proposers is not None:
        proposers |= told
    return proposed


def hold(
    index: StoredIndex, scale: Float32, metric: Metric, room: int | None
) -> Resident | Inverted | None:
    """Copy the rows to the GPU, or codes of them where `room`, in bytes, does not hold the rows.

    None, with a warning, when it holds neither. A `room` of None is not known: what does not fit is
    seen when the memory runs out.
    """
    reason = ""
    rows, dim = len(index.ok_positions), index.manifest.dim
    codes = codes_bytes(rows, dim, cell_count(index.manifest.rows), metric)
    ways: list[tuple[str, int, Callable[..., Resident | Inverted]]] = [
        ("rows in half precision", rows_bytes(rows, dim), Resident),
        ("codes", codes, partial(Inverted, place=_to_gpu)),
    ]
    for what, needed, make in ways:
        if room is not None and needed > room:
            reason = f"its {what} need {needed / 2**30:,.1f} GiB of a GPU, {room / 2**30:,.1f} free"
            continue
        if reason:
            _log.warning("%s is searched by codes on the GPU, made once now: %s",
                         index.folder, reason)  # fmt: skip
        try:
            return make(index, scale, metric)
        except RuntimeError as error:  # out of memory; what was copied goes with the error
            reason = _line(error)
    _log.warning("%s is searched by the processor: %s", index.folder, reason)
    return None


def rows_bytes(rows: int, dim: int) -> int:
    """The most memory of a GPU that so many rows need, which is while the last piece is copied.

    FAISS adds a number in single precision to each, its length.
    """
    return (rows + min(rows, _piece_rows(dim))) * (2 * dim + 4)


def _piece_rows(dim: int) -> int:
    return max(1, PIECE_BYTES // (2 * dim))


def room() -> int | None:
    """Bytes of the GPU that an index may take, by the driver; None when it does not tell."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    try:
        if driver.cuCtxPushCurrent_v2(context):
            return None
        failed = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return None if failed else max(0, free.value - _SCRATCH_BYTES)


class Resident:
    """The searchable rows of one index in the memory of a GPU."""

    def __init__(self, index: StoredIndex, scale: Float32, metric: Metric) -> None:
        """Copy them; RuntimeError when the memory does not hold them."""
        self.metric = metric
        self._positions = index.ok_positions
        self._pieces: list[Any] = []
        self._largest = np.float32(np.abs(scale).max() or 1)
        factor, step = scale / self._largest, _piece_rows(index.manifest.dim)
        for first in range(0, len(self._positions), step):
            piece = _flat(index.manifest.dim)
            self._pieces.append(piece)
            positions = self._positions[first : first + step]
            for block, units in index.unit_blocks(positions, _BLOCK_ROWS):
                piece.add(decode_rows(units, factor[block]))

    def scores(
        self, queries: Float32, count: int, wanted: Int64 | None = None
    ) -> tuple[Float32, Int64] | None:
        """The `count` best scores and positions [Q, count], to a part in a hundred of the largest.

        `wanted` limits them to some positions. None when this FAISS ignores selectors, and when
        fewer than `count` scores are finite, or of a piece as many as it has.
        """
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        scaled = queries / np.where(lengths > 0, lengths, 1)  # half precision holds no extremes
        chosen = None  # all
        if wanted is not None and len(wanted) < len(self._positions):
            if not honours_selectors():
                _log.warning(
                    "this FAISS for GPUs ignores selectors: the processor searches a part of the "
                    "rows (faiss-gpu-cuvs honours them)"
                )
                return None
            chosen = np.isin(self._positions, wanted, assume_unique=True)
        parts: list[Found] = []
        end = 0
        for piece in self._pieces:
            first, end = end, end + piece.ntotal
            able, how = piece.ntotal, None
            if chosen is not None:
                here = chosen[first:end]
                able = int(np.count_nonzero(here))
                how = faiss.SearchParameters(sel=selector(here))
            if not able:
                continue
            values, found = piece.search(scaled, min(count, able), params=how)
            if (found < 0).any():  # what half precision cannot hold has no rank
                return None
            parts.append((values, self._positions[first:end][found]))
        values, positions = merge(parts, count)
        return values * (lengths * self._largest), positions

    def candidates(self, queries: Float32, count: int, wanted: Int64) -> list[Int64] | None:
        """The `count` best positions among `wanted` for each query, ascending."""
        found = self.scores(queries, count, wanted)
        return None if found is None else [np.sort(row) for row in found[1]]


_HELD: WeakKeyDictionary[StoredIndex, Resident | Inverted] = WeakKeyDictionary()
_ASKED: WeakKeyDictionary[StoredIndex, int] = WeakKeyDictionary()  # queries so far
_TOO_LARGE: WeakSet[StoredIndex] = WeakSet()


def _held(index: StoredIndex, scale: Float32, metric: Metric) -> Resident | Inverted | None:
    """What the GPU holds of an index for this metric; None when it cannot."""
    held = _HELD.get(index)
    if held is not None and held.metric == metric:
        return held
    del held
    _HELD.pop(index, None)  # the memory of the other metric is free now
    made = hold(index, scale, metric, room())
    if made is None:
        _TOO_LARGE.add(index)
    else:
        _HELD[index] = made
    return made


def _to_gpu(empty: Any) -> Any:
    config = faiss.GpuIndexIVFScalarQuantizerConfig()
    config.use_cuvs = False  # it has no codes of four bits
    return faiss.GpuIndexIVFScalarQuantizer(_resources(), empty, config)


@cache
def available() -> bool:
    """Whether FAISS was built for a GPU and finds one."""
    return hasattr(faiss, "GpuIndexFlatIP") and faiss.get_num_gpus() > 0


@cache
def honours_selectors() -> bool:
    """Try it: the classic GPU build of FAISS takes a selector and searches everything."""
    rows = _flat(32)
    rows.add(np.array([[1.0] * 32, [0.5] * 32], np.float32))
    only_second = faiss.SearchParameters(sel=selector(np.array([False, True])))
    try:
        _, found = rows.search(np.ones((1, 32), np.float32), 1, params=only_second)
    except RuntimeError:
        return False
    return bool(found[0, 0] == 1)


def _flat(dim: int) -> Any:
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    config.use_cuvs = faiss.get_compile_options().find("NVIDIA_CUVS") >= 0  # honours selectors
    return faiss.GpuIndexFlatIP(_resources(), dim, config)


@cache
def _resources() -> Any:
    return faiss.StandardGpuResources()


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
