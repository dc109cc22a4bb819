"""What a denoiser hears beside x_t and t: text states, pooled text, sizes, masks, a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditions:
    """Named tensors, one row per sample; the names are those of the denoiser's arguments."""

    tensors: Mapping[str, Tensor]  # each [B, ...]

    def rows(self, which: Tensor | slice) -> Conditions:
        """The rows of a slice, or those at the positions [N] int64, in that order."""
        return Conditions({name: tensor[which] for name, tensor in self.tensors.items()})

    def expand(self, count: int) -> Conditions:
        """A single row, seen `count` times without a copy."""
        return Conditions(
            {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        )

    def to(self, dtype: torch.dtype) -> Conditions:
        """The same with floating-point tensors in `dtype`; masks and classes stay integers."""
        return Conditions(
            {
                name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self.tensors.items()
            }
        )

    def replaced(self, name: str, value: float) -> Conditions:
        """The same with every entry of one tensor set to `value`."""
        return Conditions({**self.tensors, name: torch.full_like(self.tensors[name], value)})

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """The rows of all parts, one after the other."""
        return Conditions(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )
