"""One-bit codes (RaBitQ) of whitened rows: made, kept and scanned, some shards at a time.

Where the rows are cut into cells, the codes of a segment are sorted by cell: a scan that skips
codes gains only where those it reads stand together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from .cells import Cells
from .products import selector
from .reader import Int64, StoredIndex
from .rows import Float32, decode_rows
from .whitening import Whitening

Int32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Found = tuple[Float32, Int64]
faiss: Any = _faiss  # its stubs lack half of what is used here
FACTORY = "HR,RaBitQ"  # RaBitQfs, the fast scan, finds nothing in gradients
QUERY_BITS = 4  # 0 would keep queries whole, and does not return in FAISS 1.15.1
BLOCK_ROWS = 512  # 4 MiB at 2048 dimensions, of which a build holds several
_MOST_LENGTHS = 10.0  # in median lengths: longer rows are outliers to the centre of the codes
_SORTED_BYTES = 16  # of every code at a time


@dataclass(frozen=True)
class Layout:
    """Where the codes of each cell stand, in a segment that is sorted by cell."""

    order: Int32  # [n] the row, counted from the first of the segment, that each code is of
    starts: Int64  # [cells + 1] where the codes of a cell begin

    def save(self, file: BinaryIO) -> None:
        """Write the two arrays."""
        np.savez(file, allow_pickle=False, order=self.order, starts=self.starts)

    @classmethod
    def load(cls, path: Path, rows: int, cells: int) -> Layout:
        """Read what `save` wrote; OSError when it is no layout of so many rows in so many cells."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                order, starts = arrays["order"], arrays["starts"]
        except (ValueError, KeyError, BadZipFile) as error:
            raise OSError(f"{path}: {error}") from error
        if (order.shape, starts.shape) != ((rows,), (cells + 1,)):
            raise OSError(f"{path} is of {order.shape} rows in {len(starts) - 1} cells")
        return cls(order, starts)


@dataclass(frozen=True)
class Segment:
    """Codes of consecutive shards."""

    name: str  # a hash of everything its codes were made of
    first: int  # position of its first row
    unit: float  # length that its rows were divided by: codes hold no extremes
    codes: Any  # faiss.Index
    layout: Layout | None  # None: the codes stand in the order of the rows

    @property
    def sizes(self) -> Int64:
        """How many codes stand in each cell."""
        starts = [0, self.codes.ntotal] if self.layout is None else self.layout.starts
        return np.diff(starts)

    def estimates(
        self, queries: Float32, count: int, wanted: Int64, visited: Bools | None = None
    ) -> Found:
        """The `count` best estimates among the positions `wanted`: scores, positions [Q, count].

        `visited` [Q, cells] limits each query to some cells, in a segment that has a layout. Where
        there are fewer rows than `count`, the rest is minus infinity.
        """
        rows = self.codes.ntotal
        low, high = np.searchsorted(wanted, [self.first, self.first + rows])
        local = wanted[low:high] - self.first
        count = min(count, len(local))
        if not count:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        chosen = None
        if len(local) < rows:
            chosen = np.zeros(rows, np.bool_)
            chosen[local] = True
            if self.layout is not None:
                chosen = chosen[self.layout.order]
        if visited is None:
            return self._scanned(queries, count, chosen)
        parts = []
        for query, cells in zip(queries, visited, strict=True):
            seen = np.repeat(cells, self.sizes)
            if chosen is not None:
                seen &= chosen
            parts.append(self._scanned(query[None], count, seen))
        estimates, positions = (np.concatenate(column) for column in zip(*parts, strict=True))
        return estimates, positions

    def _scanned(self, queries: Float32, count: int, chosen: Bools | None) -> Found:
        how: dict[str, Any] = {"qb": QUERY_BITS}
        if chosen is not None:
            how["sel"] = selector(chosen)
        outer = faiss.SearchParametersPreTransform(index_params=faiss.RaBitQSearchParameters(**how))
        estimates, found = self.codes.search(queries, count, params=outer)
        estimates[found < 0] = -np.inf
        rows = found if self.layout is None else self.layout.order[found].astype(np.int64)
        return estimates * np.float32(self.unit), rows + self.first


def encode(
    index: StoredIndex, whitening: Whitening, cells: Cells | None, first: int, scale: Float32
) -> tuple[Any, Layout | None]:
    """The codes of the rows from position `first` on, as many as there are scales."""
    codes = faiss.index_factory(len(whitening.factors), FACTORY, faiss.METRIC_INNER_PRODUCT)
    positions = np.arange(first, first + len(scale), dtype=np.int64)
    factor = scale / np.float32(unit_of(scale))
    homes = []
    for block, units in index.unit_blocks(positions, BLOCK_ROWS):
        rows = whitening.rows(decode_rows(units, factor[block - first]))
        if not codes.is_trained:
            codes.train(_without_extremes(rows))  # the centre: any point amidst the rows does
            flat = faiss.downcast_index(codes.index)
            for room in (len(scale) * flat.code_size, 0):  # once: growing would copy them
                flat.codes.resize(room)
        codes.add(rows)
        if cells is not None:
            homes.append(cells.of(rows))
    if cells is None:
        return codes, None
    home = np.concatenate(homes)
    order = np.argsort(home, kind="stable").astype(np.int32)
    _sort(codes, order)
    return codes, Layout(order, np.searchsorted(home[order], np.arange(cells.count + 1)))


def _sort(codes: Any, order: Int32) -> None:
    """Put the codes into this order, some bytes of each at a time: no second copy of them."""
    flat = faiss.downcast_index(codes.index)
    view = faiss.rev_swig_ptr(flat.codes.data(), flat.ntotal * flat.code_size)
    table = view.reshape(flat.ntotal, flat.code_size)
    for byte in range(0, flat.code_size, _SORTED_BYTES):
        table[:, byte : byte + _SORTED_BYTES] = table[order, byte : byte + _SORTED_BYTES]


def _without_extremes(rows: Float32) -> Float32:
    """Rows cut to _MOST_LENGTHS median lengths: a single one must not carry the centre away."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    most = max(_MOST_LENGTHS * float(np.median(lengths)), float(np.finfo(np.float32).tiny))
    return np.asarray(rows * np.minimum(1, most / np.maximum(lengths, most)), np.float32)


def unit_of(scale: Float32) -> float:
    """The length in which a segment counts: its rows' median, so that codes hold no extremes."""
    lengths = np.abs(scale[scale != 0])
    return float(np.median(lengths)) if len(lengths) else 1.0


def write(codes: Any, file: BinaryIO) -> None:
    """Write codes to a file; OSError when it does not take them."""
    try:
        faiss.write_index(codes, faiss.PyCallbackIOWriter(file.write))
    except RuntimeError as error:  # FAISS's own, also for a full disk
        raise OSError(str(error).splitlines()[-1]) from error


def open_segment(
    whitening: Whitening, cells: Cells | None, first: int, scale: Float32, path: Path
) -> Segment:
    """Map the codes of a segment; OSError when they are not codes of these rows."""
    try:
        codes = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    expected = len(scale), len(whitening.factors)
    if (codes.ntotal, codes.d) != expected:
        raise OSError(f"{path} holds {codes.ntotal} codes of {codes.d}, not {expected}")
    layout = None if cells is None else Layout.load(layout_path(path), len(scale), cells.count)
    return Segment(path.stem, first, unit_of(scale), codes, layout)


def layout_path(path: Path) -> Path:
    """Where the layout of the codes in `path` stands."""
    return path.with_suffix(".layout")
