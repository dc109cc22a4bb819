"""Worlds of rendered pictures that differ in a few attributes, one combination never shown.

Corpus, captions, questions with their truth, and a gate: a model that was trained on the corpus
must draw the combination that it was never shown, or what it is asked about does not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from headwater.benchmarks.small_models import to_tensor

EMPTY = 0.1  # share of training steps that show an image with no caption: guidance needs it


@dataclass(frozen=True)
class World:
    """What a picture can show, how it is drawn and what is said of it."""

    name: str
    attributes: Mapping[str, tuple[str, ...]]  # attribute -> its values
    held_out: tuple[str, ...]  # the combination that is never shown, a value of each attribute
    render: Callable[[Sequence[str], np.random.Generator], Image.Image]  # 64 x 64 pixels, RGB
    caption: Callable[[Sequence[str | None]], str]  # None: this attribute is not spoken of
    reduced: float  # share of training steps whose caption is silent about one attribute

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """All of them, the one that is never shown included."""
        return list(product(*self.attributes.values()))

    @property
    def shown(self) -> list[tuple[str, ...]]:
        """Those that a model is trained on."""
        return [values for values in self.combinations if values != self.held_out]

    def labels(self, values: Sequence[str]) -> list[int]:
        """The number of each value within its attribute."""
        known = self.attributes.values()
        return [known_values.index(v) for known_values, v in zip(known, values, strict=True)]

    def without(self, values: Sequence[str], attribute: str) -> str:
        """The caption that is silent about one attribute."""
        names = self.attributes
        return self.caption([None if n == attribute else v for n, v in zip(names, values)])  # noqa: B905


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures and what each shows."""

    images: torch.Tensor  # [N, 3, 64, 64] float32 in [-1, 1]
    values: tuple[tuple[str, ...], ...]  # [N] a value of each attribute
    keys: tuple[str, ...]


def draw(
    world: World, combinations: Sequence[tuple[str, ...]], count: int, seed: Sequence[int]
) -> Pictures:
    """``count`` pictures, going round the combinations; fewer are the beginning of more."""
    values = [combinations[i % len(combinations)] for i in range(count)]
    pictures = [world.render(v, np.random.default_rng([*seed, i])) for i, v in enumerate(values)]
    return Pictures(to_tensor(pictures), tuple(values), tuple(f"{i:05d}" for i in range(count)))
