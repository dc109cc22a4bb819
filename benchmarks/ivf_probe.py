"""Which share of an index an inverted file must look at to hold the best rows of a query.

    python -m headwater.benchmarks.ivf_probe --features INDEX --rows 200000 --cells 450

Rows, curvature and queries are those of `headwater bench index`. The rows are cut into cells by
k-means in several spaces; the cells are visited in several orders until a share of all rows is
seen. Codes play no part: the share of the true hits among the rows seen bounds from above what an
inverted file finds whatever its codes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import numpy.typing as npt

from headwater.benchmarks.gradient_rows import Generator
from headwater.benchmarks.index_bench import METRIC, QUERIES, read_real, write_index
from headwater.index import StoredIndex, search
from headwater.index.metrics import prepare
from headwater.index.rows import Float32
from headwater.index.whitening import Whitening

Int64 = npt.NDArray[np.int64]
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
POINTS = 64  # of k-means, per cell
ROUNDS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, help="an index or a .npy of rows")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--cells", type=int, default=450)
    parser.add_argument("--real", action="store_true", help="real rows, --rows of them")
    parser.add_argument("--only", nargs="*", help="spaces to cut in (default: all)")
    parser.add_argument("--folder", type=Path, help="where the generated index lies meanwhile")
    args = parser.parse_args()
    real = read_real(args.features)
    held = len(real) // 10
    asked = (real[:held] - real[held : 2 * held])[:QUERIES].astype(np.float64)
    with TemporaryDirectory(dir=args.folder, prefix="headwater-ivf-") as temporary:
        source = Real(real[2 * held :]) if args.real else Generator.fit(real[2 * held :])
        write_index(source, args.rows, Path(temporary) / "index")
        index = StoredIndex.open(Path(temporary) / "index")
        _, truth = search(index, asked, 100, metric=METRIC, exact=True)
        whitening = Whitening.of(index, METRIC)
        solved = prepare(index, asked, METRIC)[0]
        queries: Float32 = solved.astype(np.float32) @ whitening.vectors.T
        # From here on in the basis of the curvature.
        rows = np.concatenate([block @ whitening.vectors.T for _, block in index.blocks()])
    print(f"{len(rows):,} rows, {args.cells} cells, {len(queries)} queries\n")
    print("| cells | order | cells explain | " + " | ".join(f"{s:.4g}" for s in SHARES), end=" ")
    print("| rows for .99 of 10, of 100 |\n|---|---|---|" + "---|" * len(SHARES) + "---|")
    for name, space, spherical in spaces(rows, whitening.factors, args.only):
        cell, centres = partition(space, args.cells, spherical)
        del space
        to_cells = np.float32(1) / whitening.factors
        promised: Float32 | None = (queries * to_cells) @ centres.T if spherical else None
        report(name, rows, cell, queries, truth, promised)


class Real(Generator):
    """Rows as they are."""

    def __init__(self, rows: Float32) -> None:
        super().__init__(rows[0], rows, rows)

    def blocks(self, rows: int, seed: int = 0) -> Iterator[Float32]:
        for first in range(0, rows, 2048):
            yield self.basis[first : min(first + 2048, rows)]


def spaces(
    rows: Float32, factors: Float32, only: list[str] | None
) -> Iterator[tuple[str, Float32, bool]]:
    """Names of spaces, rows in them, and whether centres are directions."""
    made = {
        "as they are": lambda: (rows, False),
        "half whitened": lambda: (rows * np.sqrt(factors), False),
        "whitened": lambda: (rows * factors, False),
        "whitened, spherical": lambda: (unit(rows * factors), True),
        "centred directions": lambda: (unit((rows - rows.mean(axis=0)) * factors), True),
    }
    for name, make in made.items():
        if only is None or name in only:
            yield name, *make()


def unit(rows: Float32) -> Float32:
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def partition(space: Float32, cells: int, spherical: bool) -> tuple[Int64, Float32]:
    """The cell of every row."""
    trained = faiss.Kmeans(
        space.shape[1], cells, niter=ROUNDS, spherical=spherical, max_points_per_centroid=POINTS
    )
    trained.train(space)
    found: Int64 = trained.index.search(space, 1)[1][:, 0]
    centres: Float32 = trained.index.reconstruct_n(0, cells)
    return found, centres


def report(
    name: str, rows: Float32, cell: Int64, queries: Float32, truth: Int64, promised: Float32 | None
) -> None:
    """Print one line per order of the cells.

    A cell promises its mean score, or that and three standard deviations (of all its scores, or of
    independent directions), or the inner product with its direction, or the score of its best row,
    which nobody knows beforehand: what a perfect order would leave to look at.

    promised  [Q, cells], the inner products with directions, where centres are directions
    """
    order = np.argsort(cell, kind="stable")
    held, starts, sizes = np.unique(cell[order], return_index=True, return_counts=True)
    scores = (queries @ rows.T)[:, order]
    means = np.add.reduceat(scores, starts, axis=1, dtype=np.float64) / sizes
    squares = np.add.reduceat(np.square(scores), starts, axis=1, dtype=np.float64) / sizes
    spread = np.sqrt(np.maximum(squares - np.square(means), 0))
    grand = (means * sizes).sum(axis=1, keepdims=True) / len(rows)
    explained = (np.square(means - grand) * sizes).sum(axis=1) / len(rows) / scores.var(axis=1)
    variances = np.stack(
        [rows[order[a : a + n]].var(axis=0) for a, n in zip(starts, sizes, strict=True)]
    )
    promises = {
        "mean": means,
        "mean + 3 sd": means + 3 * spread,
        "mean + 3 sd, diagonal": means + 3 * np.sqrt(np.square(queries) @ variances.T),
        "best row": np.maximum.reduceat(scores, starts, axis=1),
    }
    if promised is not None:
        promises["direction"] = promised[:, held]
    home = np.searchsorted(held, cell[truth])
    for how, promise in promises.items():
        visits = np.argsort(-promise, axis=1)
        seen = np.empty(visits.shape)  # share of all rows once a cell has been looked at
        np.put_along_axis(seen, visits, np.cumsum(sizes[visits], axis=1) / len(rows), axis=1)
        needed = np.take_along_axis(seen, home, axis=1)
        recalls = (f"{(needed[:, :10] <= s).mean():.3f} {(needed <= s).mean():.3f}" for s in SHARES)
        print(
            f"| {name} | {how} | {explained.mean():.2f} | {' | '.join(recalls)} "
            f"| {np.quantile(needed[:, :10], 0.99):.2f} {np.quantile(needed, 0.99):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
