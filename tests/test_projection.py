"""Random projections: unbiased, rightly scaled, the same on every path."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from headwater.attribution import ModelError
from headwater.attribution.layers import Slot
from headwater.attribution.projection import SJLT, _bucket_lists, hash_coordinates, make_projector


def project(vectors: torch.Tensor, dim: int, seed: int, cut: int = 0) -> torch.Tensor:
    projector = SJLT(dim, seed)
    rows = torch.zeros(len(vectors), dim)
    size = vectors.shape[1]
    edges = [0, cut, size] if cut else [0, size]
    for start, stop in pairwise(edges):
        projector.add(
            rows,
            torch.zeros(len(rows)),
            vectors[:, start:stop],
            Slot(f"{start}", "weight", start, (stop - start,)),
        )
    return rows


def test_sjlt_inner_products_are_unbiased_with_the_known_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, generator=generator) * torch.rand(400, generator=generator) ** 4
    b = 0.5 * a + torch.randn(400, generator=generator) * 0.2
    dim, draws = 64, 4000
    found = torch.tensor(
        [float(torch.dot(*project(torch.stack([a, b]), dim, s))) for s in range(draws)]
    )
    exact = float(a @ b)
    # Var <Pa, Pb> = (|a|^2 |b|^2 + <a, b>^2 - 2 sum a_j^2 b_j^2) / dim for one non-zero per column.
    variance = float(a @ a * (b @ b) + (a @ b) ** 2 - 2 * (a * a) @ (b * b)) / dim
    error = math.sqrt(variance / draws)
    assert abs(float(found.mean()) - exact) < 4 * error
    assert 0.85 < float(found.var()) / variance < 1.15


def test_sjlt_of_a_cut_gradient_is_the_same() -> None:
    vectors = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(project(vectors, 128, 7), project(vectors, 128, 7, cut=333))


def test_gathered_buckets_equal_scattered_coordinates() -> None:
    # The path of a GPU, computed here: every bucket sums its own coordinates.
    vectors = torch.randn(3, 1000, generator=torch.Generator().manual_seed(2))
    lists, signs = _bucket_lists(*hash_coordinates(0, 1000, 128, 7), 128)
    padded = torch.nn.functional.pad(vectors, (0, 1))
    gathered = (padded[:, lists] * signs).sum(-1)
    torch.testing.assert_close(gathered, project(vectors, 128, 7))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_rows_equal_cpu_rows() -> None:
    vectors = torch.randn(5, 30_000, generator=torch.Generator().manual_seed(3))
    rows = torch.zeros(5, 512, device="cuda")
    SJLT(512, 9).add(
        rows, torch.zeros(5, device="cuda"), vectors.cuda(), Slot("w", "weight", 0, (30_000,))
    )
    torch.testing.assert_close(rows.cpu(), project(vectors, 512, 9), rtol=1e-4, atol=1e-4)


def test_hash_is_pinned() -> None:
    # Stored rows are only comparable while these never change (else raise CODE_VERSION).
    bucket, sign = hash_coordinates(0, 8, 4096, 0)
    assert bucket.tolist() == [3842, 2884, 3938, 3449, 3665, 2206, 1589, 2830]
    assert sign.tolist() == [-1, 1, 1, 1, -1, 1, 1, -1]
    far, _ = hash_coordinates(2**33, 4, 4096, 5)  # beyond 32 bits coordinates stay distinct
    assert far.tolist() != hash_coordinates(0, 4, 4096, 5)[0].tolist()


def test_buckets_and_signs_are_uniform() -> None:
    bucket, sign = hash_coordinates(12345, 1_000_000, 1000, 3)
    counts = torch.bincount(bucket, minlength=1000).double()
    assert len(counts) == 1000
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert abs(chi_square - 999) < 6 * math.sqrt(2 * 999)
    assert abs(float(sign.mean())) < 6e-3
    by_bucket = torch.zeros(1000).index_add_(0, bucket, sign)
    assert abs(float(by_bucket.var()) / 1000 - 1) < 0.3  # signs do not follow buckets


def test_identity_keeps_the_gradient() -> None:
    vectors = torch.randn(2, 10)
    projector = make_projector("identity", slots=[Slot("w", "weight", 0, (10,))], dim=3, seed=0)
    rows = torch.zeros(2, projector.dim)
    projector.add(rows, torch.zeros(2), vectors[:, 4:], Slot("w", "weight", 4, (6,)))
    assert torch.equal(rows[:, 4:], vectors[:, 4:])
    assert not rows[:, :4].any()


def test_unknown_projection_and_width() -> None:
    with pytest.raises(ModelError, match="sjlt, identity"):
        make_projector("dense", slots=[Slot("w", "weight", 0, (10,))], dim=3, seed=0)
    with pytest.raises(ModelError, match="not positive"):
        make_projector("sjlt", slots=[Slot("w", "weight", 0, (10,))], dim=0, seed=0)
