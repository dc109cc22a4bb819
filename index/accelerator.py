"""Candidates of a large index from one bit per direction, kept under `faiss/` and never stale.

A search for the `top` best of millions of rows first estimates every score from a short code
(RaBitQ, Gao and Long 2024: one bit per dimension after a random rotation), then computes the exact
scores of the best estimates only. The estimate's error is proportional to |row| |query|, and a
preconditioned query is small just where rows are long. So codes are made of whitened rows: with
eigenpairs (s, V) of the curvature, x' = (s + lambda)^-1/2 V^T x and q' = (s + lambda)^1/2 V^T q
have the same inner product and short lengths on both sides. Any positive factors would be correct:
a whitening that has aged with its index costs recall, never the score of a hit.

How many candidates are enough was measured for 1e6 rows: one row in SHARE, 5,000, gives a recall@10
of .994. Larger indexes are not measured. There the candidates grow with the rows to MOST (at 1e7)
and then no more, so beyond recall is to be checked against `exact`.

Codes stand in segments of whole shards, SEGMENT_ROWS rows or a little more, each a file named by
a hash of what it was made of: the shards' bytes, the rows' scales, the whitening, the version of
this code. Appended shards make new segments beside the old ones; a deleted row is left out by a
selector; a build that was cut short goes on where it ended.

All codes are scanned: that cells in front of them (IVF) keep the hits of real rows is not shown
(benchmarks/results/index-ivf.md: of the 10 best of 2,400, a quarter of the rows holds .89).
A query reads 264 B of codes a row at about 10 GB/s and core, and one row in SHARE (4 KB) exactly:
1e7 rows 0.26 core-seconds and 0.2 GB; 1e9, over shard-holding actors, 26 core-seconds and 20 GB.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakKeyDictionary
from zipfile import BadZipFile

import faiss as _faiss
import numpy as np

from . import derived
from .manifest import Shard
from .metrics import Curvature, Metric
from .products import selector
from .reader import Int64, StoredIndex
from .rows import Float32, decode_rows

Found = tuple[Float32, Int64]
faiss: Any = _faiss  # its stubs lack half of what is used here
_log = logging.getLogger(__name__)
VERSION = 2  # of the codes: another number makes every index build new ones
FACTORY = "HR,RaBitQ"  # RaBitQfs, the fast scan, finds nothing in gradients
QUERY_BITS = 4  # 0 would keep queries whole, and does not return in FAISS 1.15.1
SEGMENT_ROWS = 131_072  # 35 MB of codes at 2048 dimensions while one is built
FROM_ROWS = 500_000  # below, all rows are read in less time than codes are worth waiting for
PER_HIT = 50  # candidates looked at exactly per result asked for
SHARE = 200  # and at least one row in so many: as the crowd grows, so does what passes for a hit
MOST = 50_000  # but no more: memory and exact scores are paid per candidate, and per query
MOST_DIRECTIONS = 2048  # of the whitening: beyond, rows hold next to nothing
_BLOCK_ROWS = 2048
_WHITENING = "whitening.npz"
_QUERY_LENGTH = 1000.0  # in lengths of a row: FAISS subtracts the centre of rows from queries too
_MOST_LENGTHS = 10.0  # in median lengths: longer rows are outliers to the centre of the codes
_FEW = 50  # exact below one row in so many: reading those takes less than estimating them all
_KEPT = 2  # candidates a segment hands over, in fair shares of all
_LEAST_KEPT = 2000  # and at least so many: by measurement 99 in 100 hits are among them


def candidates(
    index: StoredIndex,
    queries: Float32,
    scale: Float32,
    top: int,
    wanted: Int64,
    metric: Metric,
) -> list[Int64] | None:
    """Return, for each query [Q, dim], ascending positions among `wanted` that may be its best.

    None when all of `wanted` should be looked at instead: the index is small, few rows are wanted
    or many results are, or the accelerator can be neither read nor built.
    """
    rows = index.manifest.rows
    count = min(max(top * PER_HIT, rows // SHARE), MOST)
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
    return None if ready is None else ready.candidates(queries, count, wanted)


# None: it could not be had, and this process does not try again.
_OPEN: WeakKeyDictionary[StoredIndex, dict[Metric, Accelerator | None]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Whitening:
    """Rows x -> vectors factors * x, queries q -> vectors q / factors: the same inner product."""

    vectors: Float32  # [r, dim], orthonormal
    factors: Float32  # [r]

    @classmethod
    def of(cls, index: StoredIndex, metric: Metric) -> Whitening:
        """For the queries that `metric` makes; without preconditioning they look like rows."""
        if metric.preconditioning == "none":
            dim = index.manifest.dim
            return cls(np.eye(dim, dtype=np.float32), np.ones(dim, np.float32))
        curvature = Curvature.of(index)
        _, damped = curvature.damped(metric.damping)
        energy = curvature.eigenvalues / damped  # descending, as the eigenvalues are
        kept = slice(min(len(energy), MOST_DIRECTIONS))
        vectors = np.ascontiguousarray(curvature.eigenvectors[:, kept].T, dtype=np.float32)
        # In units that leave a row a length near 1.
        mean = energy[kept].sum() / curvature.rows
        length = float(np.sqrt(curvature.eigenvalues.sum() / curvature.rows))
        return cls(vectors, (length / np.sqrt(damped[kept] * mean)).astype(np.float32))

    def rows(self, rows: Float32) -> Float32:
        """Whiten rows [n, dim]."""
        return (rows @ self.vectors.T) * self.factors

    def queries(self, queries: Float32) -> Float32:
        """Bring queries [Q, dim] to where the rows are, to one length: order is what counts."""
        largest = np.abs(queries).max(axis=1, keepdims=True)  # its square may overflow
        found = ((queries / np.where(largest > 0, largest, 1)) @ self.vectors.T) / self.factors
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        return np.ascontiguousarray(found * (_QUERY_LENGTH / np.where(lengths > 0, lengths, 1)))


@dataclass(frozen=True)
class Segment:
    """Codes of consecutive shards."""

    first: int  # position of its first row
    unit: float  # length that its rows were divided by: codes hold no extremes
    codes: Any  # faiss.Index

    def estimates(self, queries: Float32, count: int, wanted: Int64) -> Found:
        """The `count` best estimates among the positions `wanted`: scores, positions [Q, count].

        Where there are fewer, the rest is minus infinity.
        """
        low, high = np.searchsorted(wanted, [self.first, self.first + self.codes.ntotal])
        local = wanted[low:high] - self.first
        if not len(local):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        how: dict[str, Any] = {"qb": QUERY_BITS}
        if len(local) < self.codes.ntotal:
            chosen = np.zeros(self.codes.ntotal, np.bool_)
            chosen[local] = True
            how["sel"] = selector(chosen)
        outer = faiss.SearchParametersPreTransform(index_params=faiss.RaBitQSearchParameters(**how))
        estimates, found = self.codes.search(queries, min(count, len(local)), params=outer)
        estimates[found < 0] = -np.inf
        return estimates * np.float32(self.unit), found + self.first


class Accelerator:
    """The segments of one index for one metric; made by `Accelerator.ready`."""

    def __init__(self, whitening: Whitening, segments: list[Segment]) -> None:
        self.whitening = whitening
        self.segments = segments

    @classmethod
    def ready(cls, index: StoredIndex, scale: Float32, metric: Metric) -> Accelerator:
        """Open what is kept and build what is missing, a segment at a time.

        Raises OSError when nothing can be kept (a read-only folder, a full disk), at the first
        file, and BlockingIOError when another process is building.
        """
        folder = index.folder / derived.FOLDER / index.caches / _kind(metric)
        whitening = _kept_whitening(index, folder)
        if whitening is not None:
            kept = [_kept(index, whitening, *job) for job in _plan(index, scale, folder)]
            if all(kept):
                return cls(whitening, [segment for segment in kept if segment])
        with _only_builder(folder):
            return cls._build(index, scale, metric, folder)

    @classmethod
    def _build(
        cls, index: StoredIndex, scale: Float32, metric: Metric, folder: Path
    ) -> Accelerator:
        whitening = _kept_whitening(index, folder)
        if whitening is None:
            whitening = Whitening.of(index, metric)
            arrays: dict[str, Any] = {"vectors": whitening.vectors, "factors": whitening.factors}
            write = partial(np.savez, allow_pickle=False, **arrays)
            derived.keep(index.folder, folder / _WHITENING, write)
        plan = _plan(index, scale, folder)
        missing = [job for job in plan if _kept(index, whitening, *job) is None]
        if missing:
            _log.warning(
                "building the search accelerator of %s: %d of %d segments, once (--exact does "
                "without)", index.folder, len(missing), len(plan),
            )  # fmt: skip
        for first, part, path in missing:
            codes = _encode(index, whitening, first, part)
            derived.keep(index.folder, path, partial(_write, codes))
        listed = {path.name for _, _, path in plan}
        for path in folder.glob("*.codes"):
            if path.name not in listed:  # of rows that a compaction moved or an append completed
                derived.remove(index.folder, path)
        return cls(whitening, [_open(whitening, *job) for job in plan])

    def candidates(self, queries: Float32, count: int, wanted: Int64) -> list[Int64]:
        """Ascending positions of the `count` best estimates among `wanted`, for each query."""
        whitened = self.whitening.queries(queries)
        threads = max(1, min(faiss.omp_get_max_threads(), len(self.segments)))
        # Keeping the best costs FAISS more the more are kept. Even where all hits lie in one
        # segment little is lost: a row's rank there is never worse than among all.
        share = min(count, max(_LEAST_KEPT, _KEPT * count // len(self.segments)))

        def work(mine: list[Segment]) -> Found:
            faiss.omp_set_num_threads(1)  # of this thread: the segments are what runs side by side
            best = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
            for segment in mine:  # cut each time: two counts a thread, however many segments
                best = _best([best, segment.estimates(whitened, share, wanted)], count)
            return best

        shares = [self.segments[first::threads] for first in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            _, positions = _best(list(pool.map(work, shares)), count)
        return [np.sort(row) for row in positions]


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


def _plan(index: StoredIndex, scale: Float32, folder: Path) -> list[tuple[int, Float32, Path]]:
    """First position, scales of the rows and file of every segment."""
    shards = index.manifest.shards
    starts = np.cumsum([0, *(shard.items for shard in shards)])
    whitening = derived.digest(index.folder, folder / _WHITENING)
    plan = []
    for low, high in segments(shards, SEGMENT_ROWS):
        first, part = int(starts[low]), scale[starts[low] : starts[high]]
        key = hashlib.sha256(f"{VERSION} {FACTORY} {whitening}".encode())
        for shard in shards[low:high]:
            key.update(shard.files[f"features/{shard.name}.npy"].encode())
        key.update(part.tobytes())
        plan.append((first, part, folder / f"{key.hexdigest()[:32]}.codes"))
    return plan


def _encode(index: StoredIndex, whitening: Whitening, first: int, scale: Float32) -> Any:
    """The codes of the rows from position `first` on, as many as there are scales."""
    codes = faiss.index_factory(len(whitening.factors), FACTORY, faiss.METRIC_INNER_PRODUCT)
    positions = np.arange(first, first + len(scale), dtype=np.int64)
    factor = scale / np.float32(_unit(scale))
    for block, units in index.unit_blocks(positions, _BLOCK_ROWS):
        rows = whitening.rows(decode_rows(units, factor[block - first]))
        if not codes.is_trained:
            codes.train(_without_extremes(rows))  # the centre: any point amidst the rows does
        codes.add(rows)
    return codes


def _without_extremes(rows: Float32) -> Float32:
    """Rows cut to _MOST_LENGTHS median lengths: a single one must not carry the centre away."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    most = max(_MOST_LENGTHS * float(np.median(lengths)), float(np.finfo(np.float32).tiny))
    return np.asarray(rows * np.minimum(1, most / np.maximum(lengths, most)), np.float32)


def _unit(scale: Float32) -> float:
    """The length in which a segment counts: its rows' median, so that codes hold no extremes."""
    lengths = np.abs(scale[scale != 0])
    return float(np.median(lengths)) if len(lengths) else 1.0


def _write(codes: Any, file: BinaryIO) -> None:
    try:
        faiss.write_index(codes, faiss.PyCallbackIOWriter(file.write))
    except RuntimeError as error:  # FAISS's own, also for a full disk
        raise OSError(str(error).splitlines()[-1]) from error


def _kept(
    index: StoredIndex, whitening: Whitening, first: int, scale: Float32, path: Path
) -> Segment | None:
    """Open the codes of a segment if they are kept and whole; damage gives a warning."""
    if not derived.whole(index.folder, path):
        return None
    try:
        return _open(whitening, first, scale, path)
    except OSError as error:
        derived.tell_damaged(path, error)
        return None


def _open(whitening: Whitening, first: int, scale: Float32, path: Path) -> Segment:
    """Map the codes of a segment; OSError when they are not codes of these rows."""
    try:
        codes = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise OSError(f"{path}: {str(error).splitlines()[0]}") from error
    expected = len(scale), len(whitening.factors)
    if (codes.ntotal, codes.d) != expected:
        raise OSError(f"{path} holds {codes.ntotal} codes of {codes.d}, not {expected}")
    return Segment(first, _unit(scale), codes)


def _kept_whitening(index: StoredIndex, folder: Path) -> Whitening | None:
    """The whitening if it is kept and whole; damage gives a warning."""
    path = folder / _WHITENING
    if not derived.whole(index.folder, path):
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            vectors, factors = arrays["vectors"], arrays["factors"]
    except (ValueError, KeyError, BadZipFile) as error:
        derived.tell_damaged(path, error)
        return None
    single = vectors.dtype == factors.dtype == np.float32
    if vectors.shape != (factors.size, index.manifest.dim) or factors.ndim != 1 or not single:
        derived.tell_damaged(path, f"it holds {vectors.dtype} {vectors.shape}")
        return None
    return Whitening(vectors, factors)


def _kind(metric: Metric) -> str:
    words = [metric.similarity, metric.preconditioning]
    if metric.preconditioning != "none":
        words.append(f"{metric.damping:g}")
    return "-".join(words)


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; BlockingIOError, an OSError, while another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    # Neither through a link nor emptied: a folder from elsewhere must not reach other files.
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
