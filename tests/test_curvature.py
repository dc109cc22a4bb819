"""Curvature and preconditioning against dense float64 solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headwater.attribution import Curvature, Gram, ModelError, dual_curvature
from headwater.attribution.curvature import HALF_DECADES
from headwater.benchmarks.measure import DAMPINGS


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


def dense_dimension(features: torch.Tensor, damping: float) -> float:
    phi = features.double()
    k = phi.mT @ phi
    lam = damping * float(phi.square().sum()) / len(phi)
    inverse = torch.linalg.inv(k + lam * torch.eye(len(k), dtype=torch.float64))
    return float((k @ inverse).trace())


def both_forms(features: torch.Tensor) -> list[Curvature]:
    gram = Gram(features.shape[1])
    gram.add(features)
    return [gram.curvature(), dual_curvature(features)]


@pytest.mark.parametrize(("rows", "dim"), [(300, 40), (25, 60), (40, 40)])
def test_effective_dimension_equals_the_dense_trace(rows: int, dim: int) -> None:
    features = heavy_rows(rows, dim)
    for curvature in both_forms(features):
        for damping in HALF_DECADES:
            expected = dense_dimension(features, damping)
            assert curvature.effective_dimension(damping) == pytest.approx(expected, rel=1e-8)
            assert curvature.share(damping) == pytest.approx(expected / min(rows, dim), rel=1e-8)


@pytest.mark.parametrize(("rows", "dim"), [(300, 40), (25, 60), (40, 40)])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.25, 0.5, 1.0])
def test_damping_is_the_half_decade_nearest_to_a_share(rows: int, dim: int, share: float) -> None:
    features = heavy_rows(rows, dim)
    off = {
        damping: abs(np.log(dense_dimension(features, damping) / (share * min(rows, dim))))
        for damping in HALF_DECADES
    }
    for curvature in both_forms(features):
        assert curvature.damping(share) == min(off, key=lambda damping: off[damping])


def test_damping_of_rows_that_share_everything_or_nothing() -> None:
    one = heavy_rows(1, 20)
    alike = one.expand(50, 20)
    private = torch.eye(50)
    # All energy in one direction: d = 1 / (1 + damping / rows) of it.
    for rows, features in ((1, one), (50, alike)):
        for curvature in both_forms(features):
            assert curvature.effective_dimension(3.0) == pytest.approx(1 / (1 + 3 / rows))
    assert dual_curvature(one).damping(0.25) == 3.0
    assert dual_curvature(alike).damping(0.25) == HALF_DECADES[0]  # 5 directions, and there is 1
    # Rows without anything in common: a quarter of each is left at 3, whatever their number.
    for curvature in both_forms(private):
        assert curvature.effective_dimension(3.0) == pytest.approx(50 / 4)
        assert curvature.damping(0.25) == 3.0
    low = private[:5].repeat(20, 1)  # five directions, each in 20 rows
    for curvature in both_forms(low):
        assert curvature.effective_dimension(10.0) == pytest.approx(5 / (1 + 10 / 20))
        assert curvature.damping(0.05) == 30.0  # 2 of 50


def test_half_decades_hold_the_benchmarks_grid() -> None:
    assert set(DAMPINGS) < set(HALF_DECADES)
    assert HALF_DECADES[0] == 0.001
    assert HALF_DECADES[-1] == 1000.0
    steps = np.diff(np.log10(HALF_DECADES))
    assert ((steps > 0.4) & (steps < 0.6)).all()


def test_damping_without_a_share_or_rows_is_refused() -> None:
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ModelError, match="at most 1"):
            dual_curvature(heavy_rows(5, 10)).damping(share)
    gram = Gram(5)
    gram.add(torch.zeros(3, 5))
    for nothing in (gram.curvature(), dual_curvature(torch.zeros(3, 5))):
        with pytest.raises(ModelError, match="all rows are zero"):
            nothing.damping(0.25)
