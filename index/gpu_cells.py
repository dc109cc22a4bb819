"""Candidates from short codes in the memory of a GPU, for an index whose rows it cannot hold.

Codes are four bits a direction of the whitened, rotated row, a quarter of half precision, in
FAISS's inverted file over the cells (`cells`), which is all that FAISS has for such codes on a GPU.
A search scans the codes of all cells, or of as many as the processor's codes were measured to need
(`Calibration`). `search` scores the candidates exactly, from the rows on disk.

The rotation makes every direction of a row alike, so one range of values, known without training,
suits all, and the GPU's kernel needs no table of ranges. What still differs is length: rows stand
in a file for each octave of it, in units of that octave, so that a few long rows do not take the
precision away from the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import faiss as _faiss
import numpy as np

from . import accelerator
from .cells import TARGET, Calibration, Cells
from .codes import unit_of
from .exact import Found, merge
from .metrics import Metric
from .reader import Int64, StoredIndex
from .rows import Float32, decode_rows
from .space import CALIBRATION, folder_of, kept_space, only_builder, space
from .whitening import MOST_DIRECTIONS, Whitening

faiss: Any = _faiss  # its stubs lack half of what is used here
_log = logging.getLogger(__name__)
LEAST_CANDIDATES = 256  # of 200,000 generated rows 128 held .999 of the 100 best, 264 all of them
PER_HIT = 4  # and at least twice the results, or the processor searches
# For more, FAISS's kernel may lack shared memory, which ends the process (its issue 3207).
MOST_CANDIDATES = 512
LIST_BYTES = 2**20  # lost to every list of codes: memory is given out in pages of twice as much
_LOWEST = -4  # octave of length below the median's: what is shorter is coded as there, to less
_RANGE = 4.0  # in deviations of a row at the lower end of an octave, half as many at the upper
_SAMPLE = 1024  # rows of which the median length is taken
_BLOCK_ROWS = 8192
_SCRATCH_BYTES = 2**29  # of a search, by batches of queries; FAISS sets aside three times that
_SMALL_LIST = 4 * 2**20  # bytes; lists grow to the next power of two below, by a quarter above


def codes_bytes(rows: int, dim: int, cells: int, metric: Metric) -> int:
    """About how much memory of a GPU codes of so many rows in so many cells need while made."""
    width = dim if metric.preconditioning == "none" else min(dim, MOST_DIRECTIONS)
    codes = rows * (width // 2 + 8)  # and the position
    return int(codes * (1.25 if codes > cells * _SMALL_LIST else 2)) + cells * LIST_BYTES


class Inverted:
    """The searchable rows of one index as codes in inverted files."""

    def __init__(
        self, index: StoredIndex, scale: Float32, metric: Metric, place: Callable[[Any], Any]
    ) -> None:
        """Make the codes, a block of rows at a time.

        place  takes an empty faiss.IndexIVFScalarQuantizer to where it is filled and searched

        Raises RuntimeError when the memory there does not hold them.
        """
        self.metric = metric
        self._index_rows, self._rows = index.manifest.rows, len(index.ok_positions)
        self._whitening, self._cells, self._calibration = _space(index, scale, metric)
        width = len(self._whitening.factors)
        normal = np.random.default_rng(0).standard_normal((width, width))
        self._turn = np.linalg.qr(normal)[0].astype(np.float32)
        self._files: dict[int, Any] = {}  # by octave
        self._fill(index, scale, place)
        self._sizes = np.zeros(self._cells.count, np.int64)  # of the lists
        for file in self._files.values():
            if hasattr(file, "reclaimMemory"):  # on a GPU
                file.reclaimMemory()
            self._sizes += [_list_size(file, cell) for cell in range(self._cells.count)]

    def _fill(self, index: StoredIndex, scale: Float32, place: Callable[[Any], Any]) -> None:
        turned = (self._whitening.vectors.T * self._whitening.factors) @ self._turn
        centres = self._cells.centres @ self._turn
        factor = scale / np.float32(unit_of(scale))
        positions = index.ok_positions
        sample = positions[:: max(1, len(positions) // _SAMPLE)]
        lengths = [
            np.linalg.norm(decode_rows(units, factor[block]) @ turned, axis=1)
            for block, units in index.unit_blocks(sample, _BLOCK_ROWS)
        ]
        # The median in the middle of an octave: most indexes then have one or two.
        unit = np.float32(np.median(np.concatenate(lengths)) / np.sqrt(2) or 1)
        for block, units in index.unit_blocks(positions, _BLOCK_ROWS):
            rows = decode_rows(units, factor[block]) @ turned
            rows /= unit
            length = np.linalg.norm(rows, axis=1)
            octaves = np.frexp(np.maximum(length, 2.0**_LOWEST))[1] - 1
            for octave in np.unique(octaves).tolist():
                if octave not in self._files:
                    self._files[octave] = place(_empty(centres))
                here = octaves == octave
                self._files[octave].add_with_ids(np.ldexp(rows[here], -octave), block[here])

    def visit(self, top: int) -> int | None:
        """How many cells are proved to hold the `top` best of all rows; None: all are scanned."""
        if self._calibration is None:
            return None
        found = next((m for m in self._calibration.measured if top <= m.top), None)
        return None if found is None or found.recall < TARGET else found.visit

    def candidates(
        self, queries: Float32, top: int, wanted: Int64, visit: int | None = None
    ) -> list[Int64] | None:
        """Ascending positions that hold the `top` best for each query [Q, dim].

        `visit` limits a query to its nearest cells; None: all are scanned. Returns None for a part
        of the rows, as these files know no selector on a GPU, and for too many results.
        """
        count = min(max(LEAST_CANDIDATES, PER_HIT * top), MOST_CANDIDATES)
        if len(wanted) < self._rows or count < min(2 * top, self._rows):
            return None
        count = min(count, self._rows)
        whitened = self._whitening.queries(queries)
        proposed = self._best(whitened, count, self._probes(whitened, top, visit))
        for query, rows in enumerate(proposed):
            if len(rows) < count and visit is not None:  # its cells hold too few
                (proposed[query],) = self._best(
                    whitened[query : query + 1], count, self._cells.count
                )
        # A row that is not finite has no place in any list.
        return proposed if all(len(rows) >= min(top, count) for rows in proposed) else None

    def _probes(self, whitened: Float32, top: int, visit: int | None) -> int:
        """How many cells are scanned: what one query needs, all have."""
        if visit is None:
            return self._cells.count
        least = accelerator.candidates_for(self._index_rows, top)  # as it was measured
        visited = self._cells.visited(whitened, visit, self._sizes, least)
        return int(visited.sum(axis=1).max())

    def _best(self, whitened: Float32, count: int, probes: int) -> list[Int64]:
        turned = np.ascontiguousarray(whitened @ self._turn)
        how = faiss.SearchParametersIVF(nprobe=probes)
        a_query = probes * (12 * count + 4 * turned.shape[1])  # bytes, by FAISS's source
        batch = max(1, _SCRATCH_BYTES // a_query)
        proposed = []
        for first in range(0, len(turned), batch):
            asked = turned[first : first + batch]
            parts: list[Found] = []
            for octave, file in self._files.items():
                values, found = file.search(asked, count, params=how)
                values[found < 0] = -np.inf
                parts.append((np.ldexp(values, octave), found))
            _, positions = merge(parts, count)
            proposed += [np.sort(row[row >= 0]) for row in positions]
        return proposed


def _empty(centres: Float32) -> Any:
    """An inverted file without rows, its codes' range set: a row has length 1 to 2."""
    count, width = centres.shape
    nearest = faiss.IndexFlatIP(width)
    nearest.add(centres)
    file = faiss.IndexIVFScalarQuantizer(
        nearest,
        width,
        count,
        faiss.ScalarQuantizer.QT_4bit_uniform,
        faiss.METRIC_INNER_PRODUCT,
        False,  # the rows themselves, not what is left after their cell's centre
    )
    reach = _RANGE / np.sqrt(width)
    faiss.copy_array_to_vector(np.array([-reach, 2 * reach], np.float32), file.sq.trained)
    file.is_trained = True
    return file


def _list_size(file: Any, cell: int) -> int:
    on_gpu = hasattr(file, "getListLength")
    return int(file.getListLength(cell) if on_gpu else file.invlists.list_size(cell))


def _space(
    index: StoredIndex, scale: Float32, metric: Metric
) -> tuple[Whitening, Cells, Calibration | None]:
    """Whitening and cells as they are kept, or made; and what was measured of all codes, if it was.

    A folder that cannot be written to, and one that another process writes to, take nothing.
    """
    folder, with_cells = folder_of(index, metric), accelerator.wants_cells(index)
    whitening: Whitening | None = None
    cells: Cells | None = None
    calibration = None
    try:
        whitening, cells = kept_space(index, folder)
        if with_cells and cells is None:
            with only_builder(folder):
                whitening, cells = space(index, scale, metric, folder, with_cells=True)
        if cells is not None:
            calibration = _covering(index, scale, metric, cells)
    except OSError as error:
        _log.info("%s: its cells are made for this process only (%s)", index.folder, error)
    if whitening is None:
        whitening, cells = Whitening.of(index, metric), None
    if cells is None:
        cells = Cells.of_index(index, whitening, scale)
    return whitening, cells, calibration


def _covering(
    index: StoredIndex, scale: Float32, metric: Metric, cells: Cells
) -> Calibration | None:
    """The calibration of these cells, if it is of every row that is there now."""
    folder = folder_of(index, metric)
    found = Calibration.kept(index.folder, folder / CALIBRATION)
    if found is None:
        return None
    sizes = {
        path.stem: len(part) for _, part, path in accelerator.plan(index, scale, folder, cells)
    }
    covers = sizes.keys() <= set(found.segments)
    return found if covers and not found.aged(sizes, len(index.ok_positions)) else None
