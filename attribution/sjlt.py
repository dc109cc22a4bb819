"""The sparse Johnson-Lindenstrauss transform, laid out so that a device streams the gradient.

A parameter's flat coordinates i = 0, 1, ... are cut into windows of `dim`. Window w is rotated as
a whole: coordinate i goes to bucket (i + r_w) mod dim with sign s_i, where r_w is drawn from the
global coordinate that the window begins at and s_i from the global coordinate of i. So there is
one non-zero per coordinate (Dasgupta, Kumar and Sarlos 2010), memory is read in order, no list of
buckets exists, and a row depends on the seed and the parameter's place alone.

Inner products are unbiased, E<Pa, Pb> = <a, b>. Two coordinates of one window never meet, two of
different windows meet with probability 1/dim, so with a_w the part of a in window w

    Var<Pa, Pb> = (|a|^2 |b|^2 + <a, b>^2 - sum_w (|a_w|^2 |b_w|^2 + <a_w, b_w>^2)) / dim,

at most the variance with independent buckets, which subtracts only 2 sum_i a_i^2 b_i^2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .hashing import make_key, scaled, signs, words
from .layers import Slot

_ROTATION, _SIGN = 1, 2  # purposes of the two keys
_CHUNK = 1 << 16  # coordinates signed at a time without the kernel: the temporaries stay in cache


class SJLT:
    """One non-zero per coordinate; the same rows on CPU and GPU up to rounding."""

    def __init__(self, dim: int, seed: int) -> None:
        self.dim = dim
        self._rotation_key = make_key(seed, _ROTATION)
        self._sign_key = make_key(seed, _SIGN)
        self._cache: dict[tuple[int, int, torch.device], Tensor] = {}

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Add every signed window at its rotation, in the same order at every call."""
        fused = _fused() if gradient.is_cuda else None
        if fused is None:
            self.add_windows(rows, square, gradient, slot)
        else:
            rotations = self.rotations(slot, gradient.device)
            fused(rows, square, gradient, slot.offset, rotations, self._sign_key)

    def add_windows(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """`add` in plain torch, on any device."""
        size, dim = slot.size, self.dim
        turns = self.rotations(slot, torch.device("cpu")).tolist()
        # Twice the width: a window at rotation r fills r ... r + dim, which wraps once at the end.
        unrolled = torch.zeros(len(rows), 2 * dim, device=gradient.device)
        step = max(1, _CHUNK // dim) * dim
        for start in range(0, size, step):
            part = gradient[:, start : start + step].float()
            square += part.square().sum(1)
            sign = signs(slot.offset + start, part.shape[1], self._sign_key, gradient.device)
            for low in range(0, part.shape[1], dim):
                window, turn = part[:, low : low + dim], turns[(start + low) // dim]
                place = unrolled[:, turn : turn + window.shape[1]]
                place.addcmul_(window, sign[low : low + dim])
        rows += unrolled[:, :dim] + unrolled[:, dim:]

    def rotations(self, slot: Slot, device: torch.device) -> Tensor:
        """r_w of every window of the parameter, int32 [windows]."""
        key = (slot.offset, slot.size, device)
        if key not in self._cache:
            begins = torch.arange(slot.offset, slot.offset + slot.size, self.dim)
            turns = scaled(words(begins, self._rotation_key), self.dim)
            self._cache[key] = turns.to(torch.int32).to(device)
        return self._cache[key]


@cache
def _fused() -> Callable[..., None] | None:
    """The kernel, where Triton is installed: it comes with CUDA builds of torch."""
    try:
        from .sjlt_triton import add
    except ImportError:
        return None
    return add
