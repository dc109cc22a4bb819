"""Candidates of a large index from one bit per direction, kept under `faiss/` and never stale.

A search for the `top` best of millions of rows first estimates every score from a short code
(RaBitQ, Gao and Long 2024: one bit per dimension after a random rotation) of the whitened row
(`whitening`), then computes the exact scores of the best estimates only.

How many candidates are enough was measured for 1e6 rows: one row in SHARE, 5,000, gives a recall@10
of .994. Larger indexes are not measured. There the candidates grow with the rows to MOST (at 1e7)
and then no more, so beyond recall is to be checked against `exact`.

Codes stand in segments of whole shards, SEGMENT_ROWS rows or a little more, each a file named by
a hash of what it was made of: the shards' bytes, the rows' scales, the whitening, the cells, the
version of this code. Appended shards make new segments beside the old ones; a deleted row is left
out by a selector; a build that was cut short goes on where it ended.

From FROM_CELLS rows on, codes are sorted by cell (`cells`), and a search scans those of the cells
nearest to its query, as many as the index itself showed to suffice. It scans all codes where half
of the cells do not suffice, among a part of the rows, whose best may lie in any cell, and at the
other end of a ranking. Segments that came after the calibration are scanned whole until it is made
again.

All codes are 264 B a row, read at about 10 GB/s and core, and one row in SHARE (4 KB) is scored
exactly: for a query of 1e7 rows 0.26 core-seconds and 0.2 GB; of 1e9, over shard-holding actors,
26 core-seconds and 20 GB.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import faiss as _faiss
import numpy as np

from . import codes, derived
from .cells import Calibration, Cells, measured
from .codes import Bools, Segment
from .exact import Found
from .manifest import Shard
from .metrics import Metric
from .reader import Int64, StoredIndex
from .rows import Float32
from .space import CALIBRATION, CELLS, WHITENING, folder_of, kept_space, only_builder, space
from .whitening import Whitening

faiss: Any = _faiss  # its stubs lack half of what is used here
_log = logging.getLogger(__name__)
VERSION = 3  # of the codes: another number makes every index build new ones
SEGMENT_ROWS = 131_072  # 35 MB of codes at 2048 dimensions while one is built
FROM_ROWS = 500_000  # below, all rows are read in less time than codes are worth waiting for
FROM_CELLS = 1_000_000  # searchable ones; below, the exact scores take longer than all codes do
PER_HIT = 50  # candidates looked at exactly per result asked for
SHARE = 200  # and at least one row in so many: as the crowd grows, so does what passes for a hit
MOST = 50_000  # but no more: memory and exact scores are paid per candidate, and per query
_FEW = 50  # exact below one row in so many: reading those takes less than estimating them all
_KEPT = 2  # candidates a segment hands over, in fair shares of all
_LEAST_KEPT = 2000  # and at least so many: by measurement 99 in 100 hits are among them
_TOGETHER = 32  # sample queries that the cells are measured by, for each has its candidates


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
    """Return, for each query [Q, dim], ascending positions among `wanted` that may be its best.

    None when all of `wanted` should be looked at instead: the index is small, few rows are wanted
    or many results are, or the accelerator can be neither read nor built. `proposers` is told
    `accelerator`, and `cells` when the codes of some cells only were scanned. `largest` is False
    for queries that were negated: their best are the other end of a ranking.
    """
    rows = index.manifest.rows
    count = candidates_for(rows, top)
    if count < 2 * top:
        return None  # so many results that an exact search is what is asked for
    if rows < FROM_ROWS or len(wanted) < max(rows // _FEW, 4 * count):
        return None
    opened = _OPEN.setdefault(index, {})
    if metric not in opened:
        try:
            opened[metric] = Accelerator.ready(index, scale, metric)
        except OSError as error:
            _log.warning("every row is looked at: no accelerator of %s (%s)", index.folder, error)
            if isinstance(error, BlockingIOError):  # another process builds: it will be there
                return None
            opened[metric] = None  # a full disk would cost a build at every search
    ready = opened[metric]
    if ready is None:
        return None
    # Measured for the best among all rows; what is least like a picture gathers in no cell.
    proved = largest and len(wanted) == len(index.ok_positions)
    visit = ready.calibration.visit(top) if proved and ready.calibration is not None else None
    if proposers is not None:
        proposers |= {"accelerator"} if visit is None else {"accelerator", "cells"}
    return ready.candidates(queries, count, wanted, visit)


def candidates_for(rows: int, top: int) -> int:
    """How many candidates are looked at for `top` results of an index of so many rows."""
    return min(max(top * PER_HIT, rows // SHARE), MOST)


def calibrations(index: StoredIndex) -> dict[str, Calibration]:
    """What was measured of the cells of this index, by similarity, preconditioning, damping."""
    found = {}
    for folder in sorted((index.folder / derived.FOLDER / index.caches).glob("*")):
        try:
            calibration = Calibration.kept(index.folder, folder / CALIBRATION)
        except OSError:  # a link, which none of ours is
            continue
        if calibration is not None:
            found[folder.name] = calibration
    return found


# None: it could not be had, and this process does not try again.
_OPEN: WeakKeyDictionary[StoredIndex, dict[Metric, Accelerator | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Accelerator:
    """The segments of one index for one metric; made by `Accelerator.ready`."""

    whitening: Whitening
    segments: list[Segment]
    cells: Cells | None = None
    calibration: Calibration | None = None  # of the cells; None while it is being made

    @classmethod
    def ready(cls, index: StoredIndex, scale: Float32, metric: Metric) -> Accelerator:
        """Open what is kept and build what is missing, a segment at a time.

        Raises OSError when codes are missing and none can be kept (a read-only folder, a full
        disk), at the first file, and BlockingIOError when another process is building.
        """
        folder = folder_of(index, metric)
        kept = cls._kept(index, scale, folder)
        try:
            ready = kept and kept._with_calibration(index, folder)
            if ready is not None:
                return ready
            with only_builder(folder):
                return cls._build(index, scale, metric, folder)
        except BlockingIOError:
            raise
        except OSError as error:
            if kept is None:
                raise
            _log.warning("%s: a search scans all codes, not those of some cells (%s)",
                         index.folder, error)  # fmt: skip
            return kept

    @classmethod
    def _kept(cls, index: StoredIndex, scale: Float32, folder: Path) -> Accelerator | None:
        """What is kept, without a calibration, if no code is missing."""
        whitening, cells = kept_space(index, folder)
        if whitening is None or (cells is None and wants_cells(index)):
            return None
        jobs = plan(index, scale, folder, cells)
        found = [_kept_segment(index, whitening, cells, *job) for job in jobs]
        kept = cls(whitening, [segment for segment in found if segment], cells)
        return kept if all(found) else None

    @classmethod
    def _build(
        cls, index: StoredIndex, scale: Float32, metric: Metric, folder: Path
    ) -> Accelerator:
        whitening, cells = space(index, scale, metric, folder, with_cells=wants_cells(index))
        jobs = plan(index, scale, folder, cells)
        missing = [job for job in jobs if not _kept_segment(index, whitening, cells, *job)]
        if missing:
            _log.warning(
                "building the search accelerator of %s: %d of %d segments, once (--exact does "
                "without)", index.folder, len(missing), len(jobs),
            )  # fmt: skip
        for first, part, path in missing:
            made, layout = codes.encode(index, whitening, cells, first, part)
            if layout is not None:
                derived.keep(index.folder, codes.layout_path(path), layout.save)
            derived.keep(index.folder, path, partial(codes.write, made))
            del made  # or there were two while the next are made
        listed = {path.stem for _, _, path in jobs}
        for path in (*folder.glob("*.codes"), *folder.glob("*.layout")):
            if path.stem not in listed:  # of rows that a compaction moved or an append completed
                derived.remove(index.folder, path)
        built = cls(whitening, [codes.open_segment(whitening, cells, *job) for job in jobs], cells)
        return built._with_calibration(index, folder) or built._calibrated(
            index, scale, metric, folder
        )

    def _with_calibration(self, index: StoredIndex, folder: Path) -> Accelerator | None:
        """This and the calibration that is kept, unless too many rows came or went since.

        Without cells there is nothing to calibrate.
        """
        if self.cells is None:
            return self
        kept = Calibration.kept(index.folder, folder / CALIBRATION)
        sizes = {segment.name: segment.codes.ntotal for segment in self.segments}
        if kept is None or kept.aged(sizes, len(index.ok_positions)):
            return None
        return replace(self, calibration=kept)

    def _calibrated(
        self, index: StoredIndex, scale: Float32, metric: Metric, folder: Path
    ) -> Accelerator:
        """This and a calibration that is made now."""
        assert self.cells is not None

        def propose(queries: Float32, top: int, visit: int | None) -> tuple[list[Int64], float]:
            count = candidates_for(index.manifest.rows, top)
            proposed = [
                rows
                for first in range(0, len(queries), _TOGETHER)
                for rows in self.candidates(
                    queries[first : first + _TOGETHER], count, index.ok_positions, visit
                )
            ]
            return proposed, self.share(queries, count, visit)

        asked, found = measured(index, scale, metric, self.cells.count, propose)
        names = tuple(segment.name for segment in self.segments)
        made = Calibration(self.cells.count, asked, len(index.ok_positions), names, found)
        try:
            made.keep(index.folder, folder / CALIBRATION)
        except OSError as error:
            _log.warning("%s: what its cells hold is measured again next time, as it could not be "
                         "kept (%s)", index.folder, error)  # fmt: skip
        for line in made.told():
            _log.warning("%s: %s", index.folder, line)
        return replace(self, calibration=made)

    def candidates(
        self, queries: Float32, count: int, wanted: Int64, visit: int | None = None
    ) -> list[Int64]:
        """Ascending positions of the `count` best estimates among `wanted`, for each query.

        Only the nearest `visit` cells of a query are looked at, in the segments for which that is
        calibrated; None: all codes are.
        """
        whitened = self.whitening.queries(queries)
        visited = self._visited(whitened, count, visit)
        estimates, positions = self._best(whitened, count, wanted, visited)
        found = [np.sort(row[e > -np.inf]) for e, row in zip(estimates, positions, strict=True)]
        for query, rows in enumerate(found if visit is not None else ()):
            if len(rows) < min(count, len(wanted)):  # of those in its cells, too many are deleted
                found[query] = self.candidates(queries[query : query + 1], count, wanted)[0]
        return found

    def _best(self, whitened: Float32, count: int, wanted: Int64, visited: Bools | None) -> Found:
        threads = max(1, min(faiss.omp_get_max_threads(), len(self.segments)))
        # Keeping the best costs FAISS more the more are kept. Even where all hits lie in one
        # segment little is lost: a row's rank there is never worse than among all.
        share = min(count, max(_LEAST_KEPT, _KEPT * count // len(self.segments)))

        def work(mine: list[Segment]) -> Found:
            faiss.omp_set_num_threads(1)  # of this thread: the segments are what runs side by side
            best = np.empty((len(whitened), 0), np.float32), np.empty((len(whitened), 0), np.int64)
            for segment in mine:  # cut each time: two counts a thread, however many segments
                cells = visited if self._covers(segment) else None
                best = _best([best, segment.estimates(whitened, share, wanted, cells)], count)
            return best

        shares = [self.segments[first::threads] for first in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            return _best(list(pool.map(work, shares)), count)

    def share(self, queries: Float32, count: int, visit: int | None) -> float:
        """The mean share of all codes that `candidates` scans for queries [Q, dim]."""
        visited = self._visited(self.whitening.queries(queries), count, visit)
        if visited is None:
            return 1.0
        everything = int(sum(segment.codes.ntotal for segment in self.segments))
        return 1 - float(np.mean(~visited @ self._sizes)) / everything

    def _visited(self, whitened: Float32, count: int, visit: int | None) -> Bools | None:
        if visit is None or self.cells is None:
            return None
        return self.cells.visited(whitened, visit, self._sizes, count)

    @cached_property
    def _sizes(self) -> Int64:
        """How many codes each cell holds, in the segments that are calibrated."""
        sizes = [segment.sizes for segment in self.segments if self._covers(segment)]
        total: Int64 = np.sum(sizes, axis=0, dtype=np.int64)
        return total

    def _covers(self, segment: Segment) -> bool:
        return self.calibration is None or segment.name in self.calibration.segments


def _best(parts: list[Found], count: int) -> Found:
    """The `count` best estimates of several, in no order: estimates, positions [Q, <= count]."""
    estimates, positions = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
    if estimates.shape[1] <= count:
        return estimates, positions
    best = np.argpartition(-estimates, count - 1, axis=1)[:, :count]
    return np.take_along_axis(estimates, best, 1), np.take_along_axis(positions, best, 1)


def segments(shards: Sequence[Shard], most: int) -> list[tuple[int, int]]:
    """Return [from, to) of consecutive shards that make segments of `most` rows or a little more.

    Only the last is shorter, so that appended shards change none but that.
    """
    cuts, held = [0], 0
    for number, shard in enumerate(shards, start=1):
        held += shard.items
        if held >= most or number == len(shards):
            cuts.append(number)
            held = 0
    return list(pairwise(cuts))


def plan(
    index: StoredIndex, scale: Float32, folder: Path, cells: Cells | None
) -> list[tuple[int, Float32, Path]]:
    """First position, scales of the rows and file of every segment."""
    shards = index.manifest.shards
    starts = np.cumsum([0, *(shard.items for shard in shards)])
    words = [VERSION, codes.FACTORY, derived.digest(index.folder, folder / WHITENING)]
    if cells is not None:
        words.append(derived.digest(index.folder, folder / CELLS))
    found = []
    for low, high in segments(shards, SEGMENT_ROWS):
        first, part = int(starts[low]), scale[starts[low] : starts[high]]
        key = hashlib.sha256(" ".join(map(str, words)).encode())
        for shard in shards[low:high]:
            key.update(shard.files[f"features/{shard.name}.npy"].encode())
        key.update(part.tobytes())
        found.append((first, part, folder / f"{key.hexdigest()[:32]}.codes"))
    return found


def wants_cells(index: StoredIndex) -> bool:
    """Whether it has rows enough for cells to be kept."""
    return len(index.ok_positions) >= FROM_CELLS


def _kept_segment(
    index: StoredIndex,
    whitening: Whitening,
    cells: Cells | None,
    first: int,
    scale: Float32,
    path: Path,
) -> Segment | None:
    """Open the codes of a segment if they are kept and whole; damage gives a warning."""
    needed = [path] if cells is None else [path, codes.layout_path(path)]
    if not all(derived.whole(index.folder, file) for file in needed):
        return None
    try:
        return codes.open_segment(whitening, cells, first, scale, path)
    except OSError as error:
        derived.tell_damaged(path, error)
        return None
