"""The corpus's curvature K = Phi^T Phi, and queries preconditioned by (K + lambda I)^-1.

K is held as its non-negligible eigenpairs, so that one decomposition serves every lambda:
(K + lambda)^-1 q = (q - V diag(s / (s + lambda)) V^T q) / lambda. With fewer rows than
dimensions the pairs come from the N x N matrix Phi Phi^T (the dual form).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError

# Eigenvalues below this share of the largest are rounding: their term s / (s + lambda) is nil.
_NEGLIGIBLE = 1e-12
# What `Curvature.damping` chooses from: answers hardly differ between two of them, and what is
# derived for one (codes of an inner product) stays valid when a few rows come or go.
HALF_DECADES = (*(float(f"{digit}e{power}") for power in range(-3, 3) for digit in (1, 3)), 1000.0)


@dataclass(frozen=True)
class Curvature:
    """Eigenpairs of K over `rows` training rows."""

    eigenvalues: Tensor  # [r] float64, descending
    eigenvectors: Tensor  # [dim, r] float64
    rows: int

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """As plain arrays, to be stored; the inverse of `from_arrays`."""
        return {
            "eigenvalues": self.eigenvalues.cpu().numpy(),
            "eigenvectors": self.eigenvectors.cpu().numpy(),
            "rows": np.array(self.rows),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Curvature:
        """From what `arrays` gave, memory-mapped or not."""
        values, vectors = np.array(arrays["eigenvalues"]), np.array(arrays["eigenvectors"])
        return cls(torch.from_numpy(values), torch.from_numpy(vectors), int(arrays["rows"]))

    @property
    def scale(self) -> float:
        """The mean squared length of a row, trace(K) / rows: the unit that damping is given in.

        It is the mean diagonal of Phi Phi^T. The best damping in this unit moves with neither the
        number of rows nor the width of the projection; in units of trace(K) / dim it does.
        """
        return float(self.eigenvalues.sum()) / self.rows

    def effective_dimension(self, damping: float) -> float:
        """trace K (K + lambda)^-1: directions, each counted as far as K outweighs lambda in it.

        From 0, for a large damping, to the rank of the rows.
        """
        return float((self.eigenvalues / (self.eigenvalues + damping * self.scale)).sum())

    def share(self, damping: float) -> float:
        """The effective dimension as a share of min(rows, width), what the rows can span."""
        return self.effective_dimension(damping) / min(self.rows, len(self.eigenvectors))

    def damping(self, share: float) -> float:
        """The half decade whose `share` of directions is nearest to this one in log.

        Raises:
            ModelError: a share that is none, or rows that are all zero.
        """
        if not 0 < share <= 1:
            raise ModelError(f"share is {share}; it must be above 0 and at most 1")
        if not len(self.eigenvalues):
            raise ModelError("all rows are zero, so no damping suits them; ingest again")
        return min(HALF_DECADES, key=lambda damping: abs(math.log(self.share(damping) / share)))

    def precondition(self, queries: Tensor, damping: float) -> Tensor:
        """(K + lambda I)^-1 q for queries [Q, dim], with lambda = damping x `scale`; float64.

        Raises:
            ModelError: damping that is not positive.
        """
        if not damping > 0:
            raise ModelError(f"--damping {damping} is not positive; 1 to 10 are usual")
        lam = damping * self.scale
        q = queries.to(self.eigenvectors.device, torch.float64)
        shrink = self.eigenvalues / (self.eigenvalues + lam)
        return (q - ((q @ self.eigenvectors) * shrink) @ self.eigenvectors.mT) / lam


class Gram:
    """Accumulates Phi^T Phi in float64 from blocks of rows; sums of two are sums of their rows."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.matrix = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.rows = 0

    def add(self, block: Tensor) -> None:
        """Add rows [n, dim]."""
        block = block.to(self.matrix.device, torch.float64)
        self.matrix.addmm_(block.mT, block)
        self.rows += len(block)

    def remove(self, block: Tensor) -> None:
        """Take rows [n, dim] out again that were added before."""
        block = block.to(self.matrix.device, torch.float64)
        self.matrix.addmm_(block.mT, block, alpha=-1)
        self.rows -= len(block)

    def curvature(self) -> Curvature:
        """Decompose the dim x dim matrix (the primal form, for at least as many rows)."""
        values, vectors = torch.linalg.eigh(self.matrix)
        return _pairs(values, vectors, self.rows)


def dual_curvature(features: Tensor) -> Curvature:
    """Curvature of rows [N, dim] through the N x N matrix, for fewer rows than dimensions."""
    phi = features.double()
    values, vectors = torch.linalg.eigh(phi @ phi.mT)
    dual = _pairs(values, vectors, len(phi))
    return replace(dual, eigenvectors=(phi.mT @ dual.eigenvectors) / dual.eigenvalues.sqrt())


def _pairs(values: Tensor, vectors: Tensor, rows: int) -> Curvature:
    solid = values > values[-1] * _NEGLIGIBLE
    return Curvature(values[solid].flip(0), vectors[:, solid].flip(1).contiguous(), rows)
