"""Random projection of gradients, drawn by a counter-based hash so that nothing is stored.

`sjlt` is the sparse Johnson-Lindenstrauss transform with one non-zero per coordinate
(Dasgupta, Kumar and Sarlos 2010): coordinate j goes to bucket h(j) with sign s(j). Inner products
are preserved in expectation: E<Pa, Pb> = <a, b>. `identity` keeps every coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .errors import ModelError
from .layers import Slot

KINDS = ("sjlt", "identity")
_WORD = 0xFFFFFFFF  # the hash computes in 32-bit words held by int64


class Projector(Protocol):
    """Adds the projection of a slice of the gradient to a row."""

    dim: int

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """rows [B, dim] += P gradient and square [B] += |gradient|^2, in float32.

        `gradient` [B, slot.size] holds the slot's coordinates, in the precision of the model.
        """


def make_projector(kind: str, *, slots: Sequence[Slot], dim: int, seed: int) -> Projector:
    """The projection of gradients over `slots` to rows of `dim`.

    Raises:
        ModelError: unknown kind or a dimension below 1.
    """
    if kind == "identity":
        return Identity(sum(slot.size for slot in slots))
    if kind == "sjlt":
        if dim < 1:
            raise ModelError(f"--dim {dim} is not positive; 1024 to 16384 are usual")
        return SJLT(dim, seed)
    raise ModelError(f"projection {kind!r} is unknown; choose one of {', '.join(KINDS)}")


class Identity:
    """Keeps the whole gradient: for references and small selections."""

    def __init__(self, size: int) -> None:
        self.dim = size

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Place the slice where it belongs."""
        square += gradient.float().square().sum(1)
        rows[:, slot.offset : slot.offset + slot.size] += gradient


class SJLT:
    """One non-zero per coordinate; the same rows on CPU and GPU up to rounding."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self._seed = seed
        self._plans: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Scatter the signed slice into its buckets, the same way at every call."""
        gradient = gradient.float()
        square += gradient.square().sum(1)
        index, sign = self._plan(slot, gradient.device)
        if gradient.device.type == "cpu":
            rows.scatter_add_(1, index.expand_as(gradient), gradient * sign)
        else:
            # A GPU scatters with atomic additions in any order; gathering each bucket's
            # coordinates sums them in one fixed order, so that a run repeats to the bit.
            padded = torch.nn.functional.pad(gradient, (0, 1))  # the last column is the filler 0
            rows += (padded[:, index] * sign).sum(-1)  # [B, dim, widest bucket]

    def _plan(self, slot: Slot, device: torch.device) -> tuple[Tensor, Tensor]:
        key = (slot.name, device)
        if key not in self._plans:
            bucket, sign = hash_coordinates(slot.offset, slot.size, self.dim, self._seed, device)
            if device.type != "cpu":
                bucket, sign = _bucket_lists(bucket, sign, self.dim)
            self._plans[key] = (bucket, sign)
        return self._plans[key]


def hash_coordinates(
    offset: int, size: int, dim: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Bucket (int64 [size]) and sign (float32 [size], +1 or -1) from `offset` on.

    Exact integer arithmetic: every device gives the same answer.
    """
    counter = torch.arange(offset, offset + size, dtype=torch.int64, device=device)
    word = _mix(_mix(counter & _WORD, seed & _WORD), (counter >> 32) ^ (seed >> 32) ^ 0x51ED270B)
    other = _mix(word, 0x2545F491)
    bucket = (word * dim) >> 32  # unbiased to 1 in 2^32 / dim, and no modulo
    return bucket, ((other >> 31) & 1).float() * 2 - 1


def _mix(word: Tensor, key: int | Tensor) -> Tensor:
    """A bijective 32-bit finaliser (two multiply-xorshift rounds) keyed by xor."""
    word = (word ^ key) & _WORD
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


def _bucket_lists(bucket: Tensor, sign: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Coordinates of each bucket [dim, widest] and their signs, filled with (size, 0)."""
    size = bucket.numel()
    order = torch.argsort(bucket, stable=True)
    counts = torch.bincount(bucket, minlength=dim)
    start = counts.cumsum(0) - counts
    column = torch.arange(size, device=bucket.device) - start[bucket[order]]
    lists = bucket.new_full((dim, int(counts.max())), size)
    signs = sign.new_zeros(lists.shape)
    lists[bucket[order], column] = order
    signs[bucket[order], column] = sign[order]
    return lists, signs
