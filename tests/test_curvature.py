"""Curvature and preconditioning against dense float64 solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwater.attribution import Curvature, Gram, ModelError, dual_curvature


def heavy_rows(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows with a fast-falling spectrum, as gradients have."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1) ** -1.0
    return torch.randn(count, dim, generator=generator) * scale + 0.1


def dense(features: torch.Tensor, query: torch.Tensor, damping: float) -> torch.Tensor:
    k = features.double().mT @ features.double()
    shifted = k + damping * k.trace() / len(features) * torch.eye(len(k), dtype=torch.float64)
    return torch.linalg.solve(shifted, query.double())


@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("rows", "dim"), [(300, 40), (25, 60), (40, 40)])
def test_preconditioned_query_equals_dense_solve(rows: int, dim: int, damping: float) -> None:
    features, query = heavy_rows(rows, dim), heavy_rows(1, dim, 1)[0]
    gram = Gram(dim)
    for block in features.split(7):
        gram.add(block)
    expected = dense(features, query, damping)
    for curvature in (gram.curvature(), dual_curvature(features)):
        found = curvature.precondition(query[None], damping)[0]
        assert (found - expected).norm() <= 1e-7 * expected.norm()


def test_dual_form_holds_no_more_pairs_than_rows() -> None:
    features = heavy_rows(12, 500)
    curvature = dual_curvature(torch.cat([features, features[:3]]))  # duplicates add no direction
    assert curvature.eigenvectors.shape == (500, 12)
    assert curvature.rows == 15
    trace = float((features.double() ** 2).sum() + (features[:3].double() ** 2).sum())
    assert abs(curvature.scale - trace / 15) < 1e-9 * trace


def test_gram_of_parts_is_gram_of_all() -> None:
    features = heavy_rows(64, 32)
    parts, whole = Gram(32), Gram(32)
    for block in features.split(10):
        parts.add(block)
    whole.add(features)
    torch.testing.assert_close(parts.matrix, whole.matrix, rtol=1e-12, atol=0)
    assert parts.rows == whole.rows == 64


def test_arrays_round_trip() -> None:
    curvature = dual_curvature(heavy_rows(10, 30))
    again = Curvature.from_arrays(curvature.arrays())
    assert torch.equal(again.eigenvectors, curvature.eigenvectors)
    assert again.rows == 10
    assert all(isinstance(array, np.ndarray) for array in curvature.arrays().values())


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(ModelError, match="not positive"):
        dual_curvature(heavy_rows(5, 10)).precondition(torch.zeros(1, 10), damping)
