"""Rows as gradients are, in any number: what few real rows have, resampled.

A row is mean + mixture + residual in the eigenbasis of the real rows. The mixture is a random
convex combination of MIXED real rows (Dirichlet, CONCENTRATION below 1: one of them mostly leads,
so that rows have near neighbours as pictures of one object or style do). The residual takes each
direction's coefficient from a real row of its own, so every direction keeps its variance and its
tail, and is scaled so that mixture and residual together have the variance of the real rows.
`compare` puts norms, spectrum and scores of generated rows beside those of the real ones.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
MIXED = 3
CONCENTRATION = 0.2  # matches the real rows' scores and nearest neighbours; 1 makes a fog
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Generator:
    """What the real rows leave behind; made by `Generator.fit`."""

    mean: Float32  # [dim]
    basis: Float32  # [r, dim], orthonormal
    coefficients: Float32  # [r, n] of the centred real rows

    @classmethod
    def fit(cls, rows: Float32) -> Generator:
        """Decompose real rows [n, dim]."""
        mean = rows.mean(axis=0)
        _, lengths, basis = np.linalg.svd(rows - mean, full_matrices=False)
        basis = basis[lengths > lengths[0] * 1e-6]
        return cls(mean, basis, np.ascontiguousarray(basis @ (rows - mean).T))

    def blocks(self, rows: int, seed: int = 0) -> Iterator[Float32]:
        """Yield `rows` rows, 2048 at a time: float32 [b, dim]; the same for the same seed."""
        by_row = np.ascontiguousarray(self.coefficients.T)
        starts = iter(range(0, rows, _BLOCK_ROWS))
        with ThreadPoolExecutor() as threads:  # numpy draws and multiplies without Python's lock
            waiting: deque[Future[Float32]] = deque()
            while True:
                for start in islice(starts, 2 * (os.cpu_count() or 1) - len(waiting)):
                    count = min(_BLOCK_ROWS, rows - start)
                    number = [seed, start // _BLOCK_ROWS]
                    waiting.append(threads.submit(self._block, count, number, by_row))
                if not waiting:
                    return
                yield waiting.popleft().result()

    def _block(self, b: int, seed: list[int], by_row: Float32) -> Float32:
        directions, real = self.coefficients.shape
        rng = np.random.default_rng(seed)
        shares = rng.dirichlet([CONCENTRATION] * MIXED, b).astype(np.float32)
        chosen = rng.integers(0, real, (b, MIXED))
        mixture: Float32 = np.zeros((b, directions), np.float32)
        for share, row in zip(shares.T, chosen.T, strict=True):
            mixture += share[:, None] * by_row[row]
        picked = rng.integers(0, real, (directions, b), dtype=np.uint32)
        residual = np.take_along_axis(self.coefficients, picked, axis=1)
        residual *= np.sqrt(1 - np.square(shares).sum(axis=1))
        mixture += residual.T
        return mixture @ self.basis + self.mean


def compare(real: Float32, made: Float32, queries: Float64) -> dict[str, list[float]]:
    """Figures of real and of made rows [n, dim], as many of each: {name: [real, made]}.

    queries  [Q, dim], not yet preconditioned; here with the curvature of the real rows

    Lengths are in units of their median, eigenvalues of the second moment as shares of its trace,
    scores in units of their own standard deviation over all rows.
    """
    second = real.T.astype(np.float64) @ real
    lam = 3 * np.trace(second) / len(real)
    solved = np.linalg.solve(second + lam * np.eye(len(second)), queries.T).T
    figures = [_figures(rows.astype(np.float64), solved) for rows in (real, made)]
    return {name: [f[name] for f in figures] for name in figures[0]}


def _figures(rows: Float64, solved: Float64) -> dict[str, float]:
    lengths = np.linalg.norm(rows, axis=1)
    found = {
        f"length, quantile {q}": float(np.quantile(lengths, q) / np.median(lengths))
        for q in (0.01, 0.1, 0.9, 0.99)
    }
    shares = np.linalg.eigvalsh(rows.T @ rows)[::-1]
    shares /= shares.sum()
    for i in (1, 2, 10, 100, 300):
        if i <= len(shares):
            found[f"eigenvalue {i}"] = float(shares[i - 1])
    units = rows / lengths[:, None]
    cosines = units @ units.T
    np.fill_diagonal(cosines, -1)
    found["cosine of the nearest row, median"] = float(np.median(cosines.max(axis=1)))
    values = solved @ rows.T
    values -= values.mean(axis=1, keepdims=True)
    values /= values.std(axis=1, keepdims=True)
    best = -np.sort(-values, axis=1)
    for k in (1, 10, 100):
        found[f"score {k} of a query, mean"] = float(best[:, k - 1].mean())
    found["gap between scores 10 and 11"] = float((best[:, 9] - best[:, 10]).mean())
    found["kurtosis of scores"] = float((values**4).mean())
    return found
