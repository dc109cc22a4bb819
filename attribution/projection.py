"""Random projection of gradients, drawn by a counter-based hash so that nothing large is stored.

    sjlt      signed sums, each coordinate in one of them (Dasgupta, Kumar and Sarlos 2010)
    mask      one coordinate from each of equal strata (Concept-TRAK, 2507.06547, subsamples)
    factored  products of signs of outputs and of inputs (LoGra, 2405.13954)
    trak      dense signs by the package traker (TRAK, 2303.14186), to compare with
    identity  every coordinate, unprojected

Each is linear, unbiased, E<Pa, Pb> = <a, b>, and depends on the seed and a parameter's place
alone, so parameters may be added in any order.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .errors import ModelError
from .factored import Factored
from .hashing import make_key, scaled, words
from .layers import Slot
from .sjlt import SJLT

KINDS = ("sjlt", "mask", "factored", "trak", "identity")
_MASK, _TRAK = 3, 4  # purposes of keys; sjlt.py and factored.py hold the others


class Projector(Protocol):
    """Adds the projection of a slice of the gradient to a row."""

    dim: int

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """rows [B, dim] += P gradient and square [B] += |gradient|^2, in float32.

        `gradient` [B, slot.size] holds the slot's coordinates, in the precision of the model.
        """


def make_projector(kind: str, *, slots: Sequence[Slot], dim: int, seed: int) -> Projector:
    """The projection of gradients over `slots` to rows of `dim` (`factored`: at most `dim`).

    Raises:
        ModelError: unknown kind, a dimension that it cannot have, or `trak` without its package.
    """
    if kind not in KINDS:
        raise ModelError(f"projection {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    size = sum(slot.size for slot in slots)
    if kind == "identity":
        return Identity(size)
    if dim < 1:
        raise ModelError(f"--dim {dim} is not positive; 1024 to 16384 are usual")
    if kind == "mask":
        return Mask(size, dim, seed)
    if kind == "factored":
        return Factored(slots, dim, seed)
    if kind == "trak":
        return Trak(dim, seed)
    return SJLT(dim, seed)


class Identity:
    """Keeps the whole gradient: for references and small selections."""

    def __init__(self, size: int) -> None:
        self.dim = size

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Place the slice where it belongs."""
        square += gradient.float().square().sum(1)
        rows[:, slot.offset : slot.offset + slot.size] += gradient


class Mask:
    """Keeps one coordinate of each of `dim` equal strata, scaled by sqrt(width of the stratum).

    Var<Pa, Pb> = sum over strata of width x sum (a_i b_i)^2 - (sum a_i b_i)^2: little for flat
    gradients, much for heavy-tailed ones.
    """

    def __init__(self, size: int, dim: int, seed: int) -> None:
        if dim > size:
            raise ModelError(
                f"projection 'mask' keeps --dim {dim} of only {size} selected coordinates; "
                f"give --dim {size} or less, or select more --parameters"
            )
        self.dim = dim
        stratum = torch.arange(dim + 1)
        edges = (size // dim) * stratum + (size % dim) * stratum // dim  # = size x stratum // dim
        width = edges.diff()
        kept = edges[:-1] + scaled(words(stratum[:-1], make_key(seed, _MASK)), width)
        self._kept: list[int] = kept.tolist()  # ascending
        self._plan = {torch.device("cpu"): (kept, width.double().sqrt().float())}

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Pick the slot's own coordinates: they are neighbours in the row."""
        square += gradient.float().square().sum(1)
        device = gradient.device
        if device not in self._plan:
            kept, scale = self._plan[torch.device("cpu")]
            self._plan[device] = kept.to(device), scale.to(device)
        kept, scale = self._plan[device]
        first, last = (
            bisect_left(self._kept, edge) for edge in (slot.offset, slot.offset + slot.size)
        )
        picked = gradient[:, kept[first:last] - slot.offset]
        rows[:, first:last] += picked.float() * scale[first:last]


class Trak:
    """A dense matrix of signs by TRAK's own projector, to compare with; slow at any real size.

    It draws from torch's generators, so rows of a CPU and of a GPU are not comparable.
    """

    def __init__(self, dim: int, seed: int) -> None:
        try:
            from trak.projectors import BasicProjector, ProjectionType
        except ImportError as error:
            raise ModelError(
                "projection 'trak' needs the package traker: pip install 'headwater[trak]'"
            ) from error
        self.dim = dim
        self._seed = seed
        self._projector, self._signs = BasicProjector, ProjectionType.rademacher

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """Project with a matrix of the slot's own, made for this call: it fills memory."""
        gradient = gradient.float()
        square += gradient.square().sum(1)
        high, low = make_key(self._seed, _TRAK, slot.offset)
        # 62 bits: its blocks of columns are seeded 1000 apart, which must not meet another slot's.
        projector = self._projector(
            grad_dim=slot.size,
            proj_dim=self.dim,
            seed=(high >> 2 << 32) + low,
            proj_type=self._signs,
            device=gradient.device,
        )
        # Its signs are of length one: a row of them measures sqrt(dim) too long.
        rows += projector.project(gradient, model_id=0) / math.sqrt(self.dim)
