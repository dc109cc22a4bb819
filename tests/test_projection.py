"""Random projections: unbiased, with the known variance, the same on every path and every device.

The fused kernel is tested where there is a GPU, or in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from headwater.attribution import ModelError
from headwater.attribution.factored import Factored
from headwater.attribution.hashing import WORD, make_key, mix, scaled, signs, words
from headwater.attribution.layers import Slot
from headwater.attribution.projection import KINDS, Mask, make_projector
from headwater.attribution.sjlt import SJLT, _fused

CUDA = torch.cuda.is_available()
DRAWN = [kind for kind in KINDS if kind != "identity"]
KERNEL_RUNS = importlib.util.find_spec("triton") is not None and (
    CUDA or os.environ.get("TRITON_INTERPRET") == "1"
)


def make_slots(*shapes: tuple[int, ...], offset: int = 0) -> list[Slot]:
    slots: list[Slot] = []
    for shape in shapes:
        slots.append(Slot(f"p{len(slots)}", "weight", offset, shape))
        offset += slots[-1].size
    return slots


SLOTS = make_slots((20, 15), (40,), (6, 5, 2))


def project(
    kind: str, vectors: Tensor, dim: int, seed: int, slots: Sequence[Slot] = SLOTS
) -> tuple[Tensor, Tensor]:
    """Rows and squared lengths of vectors over all of SLOTS, adding `slots` in their order."""
    projector = make_projector(kind, slots=SLOTS, dim=dim, seed=seed)
    rows, square = torch.zeros(len(vectors), projector.dim), torch.zeros(len(vectors))
    for slot in slots:
        projector.add(rows, square, vectors[:, slot.offset : slot.offset + slot.size], slot)
    return rows, square


def heavy_tailed(count: int = 2, size: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(size, generator=generator) * torch.rand(size, generator=generator) ** 4
    rest = 0.5 * first + torch.randn(count - 1, size, generator=generator) * 0.2
    return torch.cat([first[None], rest])


def sjlt_by_definition(slots: Sequence[Slot], dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bucket and sign of every coordinate, one at a time in Python's integers."""
    turn_key, sign_key = make_key(seed, 1), make_key(seed, 2)

    def word(counter: int, key: tuple[int, int]) -> int:
        return mix(mix((counter & WORD) ^ key[0]) ^ (counter >> 32) ^ key[1])

    bucket, sign = [], []
    for slot in slots:
        for i in range(slot.size):
            turn = word(slot.offset + i // dim * dim, turn_key) * dim >> 32
            place = slot.offset + i
            negative = word(place // 32, sign_key) >> place % 32 & 1
            bucket.append((i % dim + turn) % dim)
            sign.append(-1.0 if negative else 1.0)
    return torch.tensor(bucket), torch.tensor(sign, dtype=torch.float64)


def part(vector: Tensor, start: int, stop: int) -> Tensor:
    return vector[start:stop].double()


def sjlt_variance(a: Tensor, b: Tensor, dim: int) -> float:
    inside = 0.0
    for slot in SLOTS:
        for low in range(0, slot.size, dim):
            edges = slot.offset + low, slot.offset + min(low + dim, slot.size)
            x, y = part(a, *edges), part(b, *edges)
            inside += float(x @ x * (y @ y) + (x @ y) ** 2)
    return (float(a @ a * (b @ b) + (a @ b) ** 2) - inside) / dim


def mask_variance(a: Tensor, b: Tensor, dim: int) -> float:
    total = 0.0
    for i in range(dim):
        product = part(a * b, len(a) * i // dim, len(a) * (i + 1) // dim)
        total += float(len(product) * product @ product - product.sum() ** 2)
    return total


def dense_variance(a: Tensor, b: Tensor, dim: int) -> float:
    return float(a @ a * (b @ b) + (a @ b) ** 2 - 2 * (a * a) @ (b * b)) / dim


def sign_moments(height: int, width: int) -> Tensor:
    """E[M_ij M_kl] of M = P^T P for P [height, width] of independent signs / sqrt(height)."""
    eye = torch.eye(width, dtype=torch.float64)
    both = torch.einsum("ij,kl->ijkl", eye, eye)
    same = torch.einsum("ik,jl->ijkl", eye, eye) + torch.einsum("il,jk->ijkl", eye, eye)
    return both + (same - 2 * torch.einsum("ij,ik,il->ijkl", eye, eye, eye)) / height


def factored_variance(a: Tensor, b: Tensor, dim: int) -> float:
    parts = Factored(SLOTS, dim, 0)._parts
    total = 0.0
    for slot in SLOTS:
        shape = slot.shape if len(slot.shape) > 1 else (1, *slot.shape)
        edges = slot.offset, slot.offset + slot.size
        x, y = (part(v, *edges).view(shape[0], -1) for v in (a, b))
        left = sign_moments(parts[slot.offset].k_out, x.shape[0])
        right = sign_moments(parts[slot.offset].k_in, x.shape[1])
        # <Px, Py> = sum L_ij x_jp R_pq y_iq, and its square has L_kl x_lr R_rs y_ks besides
        middle = torch.einsum("jp,iq,pqrs->ijrs", x, y, right)
        middle = torch.einsum("lr,ks,ijrs->ijkl", x, y, middle)
        total += float((left * middle).sum() - (x * y).sum() ** 2)
    return total


VARIANCES: dict[str, Callable[[Tensor, Tensor, int], float]] = {
    "sjlt": sjlt_variance,
    "mask": mask_variance,
    "factored": factored_variance,
    "trak": dense_variance,
}


@pytest.mark.parametrize("kind", DRAWN)
def test_inner_products_are_unbiased_with_the_known_variance(kind: str) -> None:
    a, b = heavy_tailed()
    dim, draws = 64, 3000
    found = torch.tensor(
        [torch.dot(*project(kind, torch.stack([a, b]), dim, s)[0]) for s in range(draws)]
    )
    variance = VARIANCES[kind](a, b, dim)
    assert abs(float(found.mean()) - float(a @ b)) < 4 * math.sqrt(variance / draws)
    assert 0.85 < float(found.var()) / variance < 1.15


def test_windows_leave_no_more_variance_than_independent_buckets() -> None:
    # One window holds each parameter, so coordinates meet across parameters alone.
    vectors = heavy_tailed()
    drawn = [torch.dot(*project("sjlt", vectors, 400, seed)[0]) for seed in range(1500)]
    assert float(torch.stack(drawn).var()) < 0.85 * dense_variance(*vectors, 400)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_are_added_in_any_order_to_what_is_there(kind: str, dtype: torch.dtype) -> None:
    vectors = heavy_tailed(3).to(dtype)
    forward, square = project(kind, vectors, 48, 7)
    torch.testing.assert_close(project(kind, vectors, 48, 7, SLOTS[::-1])[0], forward)
    exact, _ = project(kind, vectors.float(), 48, 7)
    torch.testing.assert_close(forward, exact)
    torch.testing.assert_close(square, vectors.float().square().sum(1))
    missing, _ = project(kind, vectors, 48, 7, SLOTS[1:])  # linear: the parts add up
    torch.testing.assert_close(forward - missing, project(kind, vectors, 48, 7, SLOTS[:1])[0])


@pytest.mark.parametrize("kind", DRAWN)
def test_another_seed_draws_another_projection(kind: str) -> None:
    vectors = heavy_tailed()
    rows = [project(kind, vectors, 48, seed)[0][0] for seed in (0, 1, 2**32, -1)]
    for one, other in itertools.combinations(rows, 2):
        assert (one - other).norm() > 0.5 * one.norm()


@pytest.mark.parametrize(
    ("shapes", "dim", "offset"),
    [
        ([(30, 10), (17,), (64,)], 64, 0),
        ([(1000,), (3, 5)], 100, 2**33 + 77),  # beyond 32 bits, in the middle of a word
        ([(20,), (9, 9)], 4096, 5),  # wider than a parameter
        ([(50,)], 1, 3),
        ([(70_000,)], 4096, 31),  # more than is signed at a time
    ],
)
def test_sjlt_is_its_definition(shapes: list[tuple[int, ...]], dim: int, offset: int) -> None:
    slots = make_slots(*shapes, offset=offset)
    vectors = torch.randn(3, sum(s.size for s in slots), generator=torch.Generator().manual_seed(1))
    projector = SJLT(dim, 12345)
    rows, square = torch.ones(3, dim), torch.zeros(3)
    for slot in slots:
        start = slot.offset - offset
        projector.add(rows, square, vectors[:, start : start + slot.size], slot)
    bucket, sign = sjlt_by_definition(slots, dim, 12345)
    exact = torch.ones(3, dim, dtype=torch.float64).index_add_(1, bucket, vectors * sign)
    torch.testing.assert_close(rows.double(), exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(square, vectors.square().sum(1))


def test_hash_is_pinned() -> None:
    # Stored rows are only comparable while these never change (else raise CODE_VERSION).
    assert make_key(0, 1) == (264495044, 1055905112)
    assert words(torch.arange(3), make_key(7, 2)).tolist() == [1233013358, 1532196370, 4290920102]
    far = words(torch.tensor([2**32, 2**32 + 1]), make_key(7, 2))
    assert far.tolist() == [1850427277, 2042959768]
    assert signs(30, 8, make_key(7, 2)).tolist() == [-1, 1, 1, -1, 1, 1, -1, 1]
    slots = make_slots((8, 8), (64,))
    assert SJLT(16, 0).rotations(slots[1], torch.device("cpu")).tolist() == [3, 1, 3, 9]
    assert Mask(128, 8, 0)._kept == [12, 23, 39, 48, 78, 87, 98, 113]
    rows_of = {
        "sjlt": [241.0, -35, -613, -143, 255, -187, 331, -645],
        "factored": [0.0, -128, -8, -88, -183, 274, 549, -327],
    }
    vector = torch.arange(128.0)[None]
    for kind, expected in rows_of.items():
        projector = make_projector(kind, slots=slots, dim=8, seed=5)
        rows = torch.zeros(1, 8)
        for slot in slots:
            piece = vector[:, slot.offset : slot.offset + slot.size]
            projector.add(rows, torch.zeros(1), piece, slot)
        torch.testing.assert_close(rows[0], torch.tensor(expected), rtol=0, atol=1e-3)


def test_words_and_signs_are_uniform_and_unrelated() -> None:
    word = words(torch.arange(12345, 1_012_345), make_key(3))
    counts = torch.bincount(scaled(word, 1000), minlength=1000).double()
    assert len(counts) == 1000
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert abs(chi_square - 999) < 6 * math.sqrt(2 * 999)
    drawn = signs(17, 1_000_000, make_key(3))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    bound = 5 / math.sqrt(1_000_000)
    assert abs(float(drawn.mean())) < bound
    for lag in (1, 2, 16, 31, 32, 64, 4096):  # within a word, from word to word, across windows
        assert abs(float((drawn[lag:] * drawn[:-lag]).mean())) < bound
    for other in (2, 4, 3 + 2**32):
        assert abs(float((drawn * signs(17, 1_000_000, make_key(other))).mean())) < bound


def test_signs_of_a_part_are_part_of_the_signs() -> None:
    whole = signs(0, 300, make_key(1))
    for start, count in ((0, 32), (31, 1), (31, 2), (33, 200), (299, 1)):
        assert torch.equal(signs(start, count, make_key(1)), whole[start : start + count])


@pytest.mark.parametrize(("size", "dim"), [(400, 400), (401, 64), (2**40 + 7, 1000)])
def test_mask_keeps_one_coordinate_of_each_stratum(size: int, dim: int) -> None:
    kept = Mask(size, dim, 3)._kept
    for i, coordinate in enumerate(kept):
        assert size * i // dim <= coordinate < size * (i + 1) // dim
    assert len(kept) == dim


def test_mask_wider_than_the_gradient() -> None:
    with pytest.raises(ModelError, match="--dim 500 of only 400 selected"):
        make_projector("mask", slots=SLOTS, dim=500, seed=0)


@pytest.mark.parametrize("dim", [3, 10, 64, 200])
def test_factored_is_a_kronecker_product(dim: int) -> None:
    vectors = heavy_tailed(3)
    projector = Factored(SLOTS, dim, 9)
    rows, _ = project("factored", vectors, dim, 9)
    expected = []
    for slot in SLOTS:
        left, right = projector._signs(slot, projector._parts[slot.offset], torch.device("cpu"))
        for side in (left, right):
            torch.testing.assert_close(side.abs(), torch.full_like(side, len(side) ** -0.5))
        matrix = torch.kron(left, right).double()
        expected.append(vectors[:, slot.offset : slot.offset + slot.size].double() @ matrix.mT)
    torch.testing.assert_close(rows.double(), torch.cat(expected, 1), rtol=1e-5, atol=1e-5)


def test_factored_shares_the_width_out() -> None:
    shapes = [(192, 192), (192,), (192, 256), (96, 96), (96, 4, 3, 3), (2, 500), (3,)] * 4
    slots = make_slots(*shapes)
    for dim in (28, 29, 100, 512, 4096, 32_768, 10**9):
        projector = Factored(slots, dim, 0)
        size = sum(slot.size for slot in slots)
        assert 0.98 * min(dim, size) <= projector.dim <= min(dim, size)
        end = 0
        for slot in slots:
            found = projector._parts[slot.offset]
            outputs = slot.shape[0] if len(slot.shape) > 1 else 1
            assert found.start == end
            assert 1 <= found.k_out <= outputs
            assert 1 <= found.k_in <= slot.size // outputs
            end += found.k_out * found.k_in
        assert end == projector.dim
    with pytest.raises(ModelError, match="each of the 28 selected parameters"):
        Factored(slots, 27, 0)


def test_trak_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trak.projectors", None)
    with pytest.raises(ModelError, match=r"headwater\[trak\]"):
        make_projector("trak", slots=SLOTS, dim=8, seed=0)


def test_identity_keeps_the_gradient() -> None:
    vectors = heavy_tailed()
    rows, _ = project("identity", vectors, 3, 0, SLOTS[1:])
    assert torch.equal(rows[:, 300:], vectors[:, 300:])
    assert not rows[:, :300].any()


def test_unknown_projection_and_width() -> None:
    with pytest.raises(ModelError, match="sjlt, mask"):
        make_projector("dense", slots=SLOTS, dim=3, seed=0)
    for kind in DRAWN:
        with pytest.raises(ModelError, match="not positive"):
            make_projector(kind, slots=SLOTS, dim=0, seed=0)


def test_without_triton_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "headwater.attribution.sjlt_triton", None)
    assert _fused.__wrapped__() is None


@pytest.mark.skipif(not KERNEL_RUNS, reason="no CUDA device with Triton, no interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "size", "batch", "offset"),
    [
        (64, 1000, 3, 0),
        (1000, 2500, 9, 77),  # no power of two, the last window cut
        (4096, 320, 5, 2**33 + 5),  # wider than the parameter
        (100, 10_007, 17, 31),  # more groups of samples and chunks than one
        (512, 40 * 512, 8, 64),
        (1, 50, 1, 3),
    ],
)
def test_kernel_equals_the_torch_path(
    dtype: torch.dtype, dim: int, size: int, batch: int, offset: int
) -> None:
    from headwater.attribution import sjlt_triton

    device = torch.device("cuda", 0) if CUDA else torch.device("cpu")
    generator = torch.Generator().manual_seed(3)
    wide = torch.randn(batch, size + 3, generator=generator).to(dtype)
    gradient = wide[:, 2:-1].to(device)  # rows that are not contiguous with each other
    slot = Slot("w", "weight", offset, (size,))
    projector = SJLT(dim, 9)
    start = torch.randn(batch, dim, generator=generator), torch.rand(batch, generator=generator)

    def by_kernel(gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows, square = (x[: len(gradient)].clone().to(device) for x in start)
        turns = projector.rotations(slot, device)
        sjlt_triton.add(rows, square, gradient, offset, turns, projector._sign_key)
        return rows.cpu(), square.cpu()

    expected = start[0].clone(), start[1].clone()
    projector.add_windows(*expected, wide[:, 2:-1], slot)
    found = by_kernel(gradient)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    for one, other in zip(by_kernel(gradient), found, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(by_kernel(gradient[:1]), found, strict=True):
        assert torch.equal(one[0], other[0])  # whatever the batch


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "trak"])
def test_gpu_rows_equal_cpu_rows(kind: str) -> None:
    slots = make_slots((192, 256), (192,), (96, 4, 3, 3))
    size = sum(slot.size for slot in slots)
    vectors = torch.randn(5, size, generator=torch.Generator().manual_seed(3))
    found = {}
    for device in ("cpu", "cuda"):
        projector = make_projector(kind, slots=slots, dim=512, seed=9)
        rows, square = torch.zeros(5, projector.dim), torch.zeros(5)
        rows, square = rows.to(device), square.to(device)
        for slot in slots:
            piece = vectors[:, slot.offset : slot.offset + slot.size].to(device)
            projector.add(rows, square, piece, slot)
        found[device] = rows.cpu(), square.cpu()
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_torch_path_of_sjlt_repeats_on_a_gpu() -> None:
    vectors = torch.randn(5, 30_000, generator=torch.Generator().manual_seed(3))
    slot = Slot("w", "weight", 40, (30_000,))
    rows = [torch.zeros(5, 512, device=device) for device in ("cpu", "cuda", "cuda")]
    for row in rows:
        square = torch.zeros(5, device=row.device)
        SJLT(512, 9).add_windows(row, square, vectors.to(row.device), slot)
    assert torch.equal(rows[1], rows[2])
    torch.testing.assert_close(rows[0], rows[1].cpu(), rtol=1e-4, atol=1e-4)
