"""Rows made short where queries are long: the space in which codes and cells are made.

A one-bit code's error is proportional to |row| |query|, and a preconditioned query is small just
where rows are long. With eigenpairs (s, V) of the curvature, x' = (s + lambda)^-1/2 V^T x and
q' = (s + lambda)^1/2 V^T q have the same inner product and short lengths on both sides. Any
positive factors would be correct: a whitening that has aged with its index costs recall, never the
score of a hit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from . import derived
from .metrics import Curvature, Metric
from .reader import StoredIndex
from .rows import Float32

MOST_DIRECTIONS = 2048  # beyond, rows hold next to nothing
_QUERY_LENGTH = 1000.0  # in lengths of a row: FAISS subtracts the centre of rows from queries too


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

    def keep(self, root: Path, path: Path) -> None:
        """Write it to `path`, in the index folder `root`; OSError when it cannot be kept."""
        arrays: dict[str, Any] = {"vectors": self.vectors, "factors": self.factors}
        derived.keep(root, path, partial(np.savez, allow_pickle=False, **arrays))

    @classmethod
    def kept(cls, index: StoredIndex, path: Path) -> Whitening | None:
        """Read it if it is there and whole; damage gives a warning."""
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
        return cls(vectors, factors)
