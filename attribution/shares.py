"""Rows split by the parameters that they come from, and the share of a score that each part holds.

A score <q, phi> is linear in the row, and the row is a sum over parameters: the projection takes
them one by one, and a noise level's gradient is scaled by one number, its norm over all of them.
So the part of a score that enters through some layers is exact, whatever q is, preconditioned or
not. It says through which parameters a picture supports a concept. It does not say what would
remain without the caption: the other layers' gradients are taken at the same caption.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from .engine import Engine
from .errors import ModelError
from .layers import Slot
from .projection import Projector

# Layers that are fed by the text alone: keys and values of cross-attention, and the text's own
# projections in joint attention.
TEXT_SIDE = r"attn2\.to_[kv]\.|\.add_[qkv]_proj\.|\.to_add_out\."


class Parted:
    """A projection whose rows are those of each part of the parameters, side by side."""

    def __init__(self, whole: Projector, patterns: Sequence[str]) -> None:
        self.dim = whole.dim * (len(patterns) + 1)
        self._whole = whole
        self._patterns = patterns

    def add(self, rows: Tensor, square: Tensor, gradient: Tensor, slot: Slot) -> None:
        """As `Projector.add`, into the columns of the slot's part."""
        width = self._whole.dim
        own = torch.zeros(len(rows), width, device=rows.device)
        self._whole.add(own, square, gradient, slot)
        start = self.part(slot) * width
        rows[:, start : start + width] += own

    def part(self, slot: Slot) -> int:
        """The first pattern that the parameter's name matches, or one beyond the last."""
        found = (i for i, pattern in enumerate(self._patterns) if re.search(pattern, slot.name))
        return next(found, len(self._patterns))


def parted(engine: Engine, patterns: Sequence[str]) -> Engine:
    """An engine whose rows are [B, P dim]: the engine's rows, cut into P parts that sum to them.

    Rows, contrasts and every other query may be computed with it as with the engine itself; it
    runs uncompiled.

    Args:
        engine: what the rows are to be those of.
        patterns: regular expressions; a parameter belongs to the first that its name matches, and
            to one more part, the last, if it matches none. That part may be empty.

    Raises:
        ModelError: a pattern that no selected parameter belongs to.
    """
    projector = Parted(engine.projector, patterns)
    parts = {projector.part(slot) for slot in engine.selection.slots}
    for part, pattern in enumerate(patterns):
        if part not in parts:
            raise ModelError(
                f"no parameter of the selection {engine.recipe.parameters!r} belongs to the part "
                f"{pattern!r}; leave the part out, or select more --parameters"
            )
    with engine.uncompiled():
        found = copy(engine)
    found.projector = projector
    return found


def text_share(
    engine: Engine, x_0: Tensor, captions: Sequence[str], keys: Sequence[str], queries: Tensor
) -> Tensor:
    """The share of each score that enters through layers fed by the text, [Q, B] float64.

    1 says that the images support the concept through `to_k` and `to_v` alone, 0 that these layers
    play no part. Parts may have opposite signs, so a share may lie outside of [0, 1], and that of
    a score near zero means nothing (NaN at zero).

    Args:
        engine: of the index; what made its rows.
        x_0, captions, keys: the images, as `Engine.rows` takes them.
        queries: [Q, dim] vectors as the search takes them, preconditioned if the scores are.

    Raises:
        ModelError: the engine's selection holds no layer that is fed by the text alone.
    """
    rows = parted(engine, (TEXT_SIDE,)).rows(x_0, captions, keys).features
    parts = rows.view(len(rows), 2, -1).double()
    scores = torch.einsum("qd,bpd->pqb", queries.to(parts), parts)
    return scores[0] / scores.sum(0)
