"""Kronecker-factored projection: a weight's gradient between two small matrices of signs.

The gradient G [O, I] of a matrix (a convolution: outputs by the rest) becomes
P_out G P_in^T / sqrt(k_out k_in) with entries +1 or -1, k_out k_in numbers, as in LoGra
(2405.13954) with random factors. That is P = P_out (x) P_in on the flat gradient, which is never
built. A vector has one matrix of signs. A row is the concatenation over the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ModelError
from .hashing import make_key, signs
from .layers import Slot

_OUT, _IN = 5, 6  # purposes of the two keys


@dataclass(frozen=True)
class Part:
    """A parameter's place in the row."""

    start: int
    k_out: int
    k_in: int  # the part is k_out x k_in wide


class Factored:
    """Each parameter has a share of the row in proportion to its size, and at least one number.

    `dim` is the true width: the largest that products k_out x k_in reach, at most the one asked.
    """

    def __init__(self, slots: Sequence[Slot], dim: int, seed: int) -> None:
        if dim < len(slots):
            raise ModelError(
                f"projection 'factored' needs a number for each of the {len(slots)} selected "
                f"parameters, and --dim is {dim}; raise it or select fewer --parameters"
            )
        self._parts = _share(slots, dim)
        self.dim = sum(part.k_out * part.k_in for part in self._parts.values())
        self._seed = seed
        self._factors: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Multiply from both sides."""
        gradient = gradient.float()
        square += gradient.square().sum(1)
        part = self._parts[slot.offset]
        left, right = self._signs(slot, part, gradient.device)
        matrices = gradient.reshape(-1, left.shape[1], right.shape[1])  # [B, O, I]
        found = left @ (matrices @ right.mT)  # [B, k_out, k_in]
        rows[:, part.start : part.start + part.k_out * part.k_in] += found.flatten(1)

    def _signs(self, slot: Slot, part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
        """P_out / sqrt(k_out) [k_out, O] and P_in / sqrt(k_in) [k_in, I]."""
        key = (slot.offset, device)
        if key not in self._factors:
            outputs, inputs = _sides(slot)
            self._factors[key] = (
                _matrix(part.k_out, outputs, (self._seed, _OUT, slot.offset), device),
                _matrix(part.k_in, inputs, (self._seed, _IN, slot.offset), device),
            )
        return self._factors[key]


def _sides(slot: Slot) -> tuple[int, int]:
    """Outputs and the rest; a vector is a row of inputs."""
    outputs = slot.shape[0] if len(slot.shape) > 1 else 1
    return outputs, slot.size // outputs


def _matrix(height: int, width: int, key: tuple[int, int, int], device: torch.device) -> Tensor:
    entries = signs(0, height * width, make_key(*key), device)
    return entries.view(height, width) / math.sqrt(height)


def _share(slots: Sequence[Slot], dim: int) -> dict[int, Part]:
    """The part of each parameter, by its offset; parts follow the order of the parameters."""
    spare, coordinates = dim - len(slots), sum(slot.size for slot in slots)
    shares: dict[int, tuple[int, int]] = {}
    given, seen = 0, 0
    # Shares are cut from the running sum, so that what a product cannot reach is handed on;
    # vectors come last because they can take any number.
    order = sorted(slots, key=lambda slot: (_sides(slot)[0] == 1, slot.offset))
    for number, slot in enumerate(order, start=1):
        seen += slot.size
        owed = number + spare * seen // coordinates - given
        shares[slot.offset] = k_out, k_in = _factor(owed, *_sides(slot))
        given += k_out * k_in
    parts, start = {}, 0
    for slot in slots:
        k_out, k_in = shares[slot.offset]
        parts[slot.offset] = Part(start, k_out, k_in)
        start += k_out * k_in
    return parts


def _factor(share: int, outputs: int, inputs: int) -> tuple[int, int]:
    """k_out and k_in with the largest product up to `share`, among nearly square pairs."""
    root = math.isqrt(share)
    # A factor is at most a parameter's side; where one side is short the other is longer.
    least = min(outputs, max(-(-2 * root // 3), -(-share // inputs)))
    most = max(least, min(outputs, 2 * root))
    pairs = [(k, min(inputs, share // k)) for k in range(least, most + 1)]
    return max(pairs, key=lambda pair: (pair[0] * pair[1], -abs(pair[0] - pair[1])))
