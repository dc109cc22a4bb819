"""Cells of whitened rows, so that a search scans the codes of some only, as far as that is proved.

The cells are an inverted file's: centres are directions (spherical k-means over a sample of the
rows), a row lies in the cell whose direction has the largest inner product with it, a query visits
the cells in the order of theirs with the query. Whether the best rows of a query gather in few
cells depends on the data, so it is measured on the index itself: queries made of its own rows,
their exact best among all other rows, and the share of those that a search proposes which visits
so many cells. A search visits the fewest that hold TARGET of them; where half of the cells do not
suffice, it scans all codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from . import derived
from .exact import Best
from .metrics import Metric, prepare
from .reader import Int64, StoredIndex
from .rows import Float32, decode_rows
from .whitening import Whitening

faiss: Any = _faiss  # its stubs lack half of what is used here
TARGET = 0.99  # of the exact best: what is proposed by visiting some cells
TOPS = (10, 100)  # results asked for, for which it is measured
# Of the cells visited. Below an eighth, queries made of the index's own rows are too easy a proof:
# 1/64 gave them 1.000 of the ten best, queries of rows from elsewhere .963, and .998 at an eighth.
LEAST_SHARE = 1 / 8
MOST_SHARE = 1 / 2  # of the codes, too; beyond, scanning all is as good
SAMPLED = 128  # queries of each kind: a single one that finds nothing is one in a hundred
POINTS = 32  # rows of the sample, per cell
MOST_CELLS = 2048
MOST_SAMPLE = 32_768  # rows: 128 MiB in half precision at 2048 dimensions
_ROUNDS = 10  # of k-means
_BLOCK_ROWS = 512
_AGED = 8  # measured again once one row in so many has come, or has gone
_GROWN = 4  # cells are made again once there should be so many times as many

# For queries [Q, dim], results wanted, cells visited (None: all): the positions proposed for each
# query, and the mean share of the codes that were scanned.
Propose = Callable[[Float32, int, int | None], tuple[list[Int64], float]]


def cell_count(rows: int) -> int:
    """How many cells that many rows are cut into: the power of two nearest to their root."""
    return min(MOST_CELLS, 1 << round(math.log2(max(rows, 1)) / 2))


@dataclass(frozen=True)
class Cells:
    """Directions in whitened space."""

    centres: Float32  # [cells, r], of length 1

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.centres)

    @classmethod
    def of_index(cls, index: StoredIndex, whitening: Whitening, scale: Float32) -> Cells:
        """Cut the rows of an index into cells, by a sample of them."""
        count = cell_count(index.manifest.rows)
        positions = _sample(index, min(POINTS * count, MOST_SAMPLE), seed=0)
        sample = np.zeros((len(positions), len(whitening.factors)), np.float16)
        done = 0
        for block, units in index.unit_blocks(positions, _BLOCK_ROWS):
            # A direction has no length, but a negative weight turns it round.
            rows = whitening.rows(decode_rows(units, np.sign(scale[block])))
            lengths = np.linalg.norm(rows, axis=1, keepdims=True)
            sample[done : done + len(block)] = rows / np.where(lengths > 0, lengths, 1)
            done += len(block)
        dim = sample.shape[1]
        clustering = faiss.Clustering(dim, count)
        clustering.niter, clustering.spherical = _ROUNDS, True
        clustering.decode_block_size = _BLOCK_ROWS  # of the sample in single precision at once
        # All of the sample, and no word on the terminal when it is small.
        clustering.min_points_per_centroid, clustering.max_points_per_centroid = 1, len(sample)
        half = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        centres = faiss.IndexFlatIP(dim)
        clustering.train_encoded(sample.view(np.uint8), half, centres)
        return cls(centres.reconstruct_n(0, count))

    def of(self, rows: Float32) -> Int64:
        """The cell of each whitened row [n, r]."""
        found: Int64 = np.argmax(rows @ self.centres.T, axis=1)
        return found

    def visited(
        self, queries: Float32, count: int, sizes: Int64, least: int
    ) -> npt.NDArray[np.bool_]:
        """Which cells each whitened query [Q, r] visits: [Q, cells].

        The `count` nearest, and more until they hold `least` rows, by the `sizes` [cells].
        """
        order = np.argsort(-(queries @ self.centres.T), axis=1)
        before = np.cumsum(sizes[order], axis=1) - sizes[order]
        marked = np.zeros(order.shape, np.bool_)
        np.put_along_axis(marked, order, (np.arange(self.count) < count) | (before < least), axis=1)
        return marked

    def keep(self, root: Path, path: Path) -> None:
        """Write them to `path`, in the index folder `root`; OSError when they cannot be kept."""
        derived.keep(root, path, partial(np.save, arr=self.centres, allow_pickle=False))

    @classmethod
    def kept(cls, index: StoredIndex, whitening: Whitening, path: Path) -> Cells | None:
        """Read them if they are there, whole, and not far too few; damage gives a warning."""
        if not derived.whole(index.folder, path):
            return None
        try:
            centres = np.load(path, allow_pickle=False)
        except (ValueError, BadZipFile) as error:
            derived.tell_damaged(path, error)
            return None
        if centres.ndim != 2 or centres.shape[1] != len(whitening.factors):
            derived.tell_damaged(path, f"it holds {centres.dtype} {centres.shape}")
            return None
        return None if len(centres) * _GROWN <= cell_count(index.manifest.rows) else cls(centres)


@dataclass(frozen=True)
class Measured:
    """What visiting some cells proposes, when `top` results are asked for."""

    top: int
    visit: int | None  # the fewest cells that suffice; None: all codes are scanned
    recall: float  # share of the exact best proposed so, or by the most cells that were tried
    scanned: float  # mean share of the codes that this reads
    everything: float  # share of the exact best proposed by all codes


@dataclass(frozen=True)
class Calibration:
    """How many cells a search visits, as measured on some segments of an index."""

    cells: int
    queries: int  # sampled
    searchable: int  # rows then
    segments: tuple[str, ...]  # their names: the codes of others are all scanned
    measured: tuple[Measured, ...]

    def visit(self, top: int) -> int | None:
        """How many cells hold the `top` best; None: all codes are to be scanned."""
        return next((m.visit for m in self.measured if top <= m.top), None)

    def aged(self, sizes: dict[str, int], searchable: int) -> bool:
        """Whether too many rows came or went; `sizes` are the rows of each segment by name."""
        new = sum(rows for name, rows in sizes.items() if name not in self.segments)
        gone = max(0, self.searchable - (searchable - new))
        # Not their sum: an append makes a new segment of the last, whose old rows are in both.
        return max(new, gone) * _AGED > max(searchable, self.searchable)

    def told(self) -> Iterator[str]:
        """Say for each number of results what was measured and what follows."""
        for found in self.measured:
            if found.visit is not None:
                what = (
                    f"visits {found.visit:,} of {self.cells:,} cells "
                    f"({found.scanned:.0%} of the codes), which proposed"
                )
            elif found.scanned > MOST_SHARE:  # whether or not it is enough that they proposed
                what = (
                    f"scans all codes: cells would read {found.scanned:.0%} of the codes, which "
                    "proposed"
                )
            else:
                what = f"scans all codes: half of {self.cells:,} cells proposed only"
            yield (
                f"a search for {found.top} {what} {found.recall:.3f} of the exact best of "
                f"{self.queries} sample queries (all codes {found.everything:.3f})"
            )

    def keep(self, root: Path, path: Path) -> None:
        """Write it to `path`, in the index folder `root`; OSError when it cannot be kept."""
        text = json.dumps(asdict(self), indent=1)
        derived.keep(root, path, lambda file: file.write(text.encode()))

    @classmethod
    def kept(cls, root: Path, path: Path) -> Calibration | None:
        """Read it if it is there and whole; damage gives a warning."""
        if not derived.whole(root, path):
            return None
        try:
            content = json.loads(path.read_text())
            content["measured"] = tuple(Measured(**found) for found in content["measured"])
            return cls(**{**content, "segments": tuple(content["segments"])})
        except (ValueError, TypeError, KeyError) as error:
            derived.tell_damaged(path, error)
            return None


def measured(
    index: StoredIndex, scale: Float32, metric: Metric, cells: int, propose: Propose
) -> tuple[int, tuple[Measured, ...]]:
    """Find, for each of TOPS, the fewest cells that propose TARGET of the exact best.

    Where all codes propose less, that much is asked of the cells. What counts is the worse of the
    kinds of sample queries. Returns the number of queries, too.
    """
    kinds = list(_sample_queries(index, metric))
    queries, sources = (np.concatenate(column) for column in zip(*kinds, strict=True))
    truth = _exact(index, queries, scale, sources, max(TOPS))
    cuts = np.cumsum([len(asked) for asked, _ in kinds])[:-1]

    def recall(top: int, visit: int | None) -> tuple[float, float]:
        proposed, share = propose(queries, top, visit)
        found = [np.isin(b[:top], rows).mean() for b, rows in zip(truth, proposed, strict=True)]
        return min(float(np.mean(kind)) for kind in np.split(np.array(found), cuts)), share

    results = []
    for top in TOPS:
        everything, _ = recall(top, None)
        target = min(TARGET, everything)  # cells need not find what codes lose
        for visit in _visits(cells):
            reached, share = recall(top, visit)
            if reached >= target or share > MOST_SHARE:
                break
        enough = reached >= target and share <= MOST_SHARE
        results.append(Measured(top, visit if enough else None, reached, share, everything))
    return len(queries), tuple(results)


def _visits(cells: int) -> list[int]:
    """Numbers of cells to try: from LEAST_SHARE to MOST_SHARE in steps of the root of two."""
    steps = round(2 * math.log2(MOST_SHARE / LEAST_SHARE))
    shares = LEAST_SHARE * 2 ** (np.arange(steps + 1) / 2)
    return sorted({int(np.ceil(cells * share)) for share in shares})


def _sample(index: StoredIndex, count: int, seed: int) -> Int64:
    """Positions of so many rows that can be searched, ascending."""
    chosen = np.random.default_rng(seed).permutation(len(index.ok_positions))[:count]
    return index.ok_positions[np.sort(chosen)]


def _sample_queries(index: StoredIndex, metric: Metric) -> Iterator[tuple[Float32, Int64]]:
    """Queries of each kind, prepared and of length 1 [n, dim], and the two rows each is made of.

    A picture asks with its own row, a contrast with a difference of two.
    """
    positions = _sample(index, 3 * SAMPLED, seed=1)
    rows = np.concatenate([rows for _, rows in index.blocks(positions=positions, weighted=False)])
    order = np.random.default_rng(2).permutation(len(positions))
    one, two, three = np.array_split(order, 3)
    two = two[: len(three)]
    for made, of in ((rows[one], (one, one)), (rows[two] - rows[three], (two, three))):
        asks = made.any(axis=1)  # a picture may be there twice
        vectors, _ = prepare(index, made[asks].astype(np.float64), metric)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        yield (vectors / lengths).astype(np.float32), positions[np.stack(of, axis=1)[asks]]


def _exact(
    index: StoredIndex, queries: Float32, scale: Float32, sources: Int64, top: int
) -> list[Int64]:
    """The positions of the exact best for each query, best first, but for those it is made of.

    Products by BLAS: for a hundred queries at once that is faster than the kernel of scores.
    """
    best = Best(len(queries), top + sources.shape[1])
    factor = scale / np.float32(np.abs(scale).max() or 1)
    for block, units in index.unit_blocks(index.ok_positions, _BLOCK_ROWS):
        best.add(queries @ decode_rows(units, factor[block]).T, block)
    _, found = best.found()
    return [rows[~np.isin(rows, of)][:top] for rows, of in zip(found, sources, strict=True)]
