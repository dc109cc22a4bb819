"""Worlds of rendered pictures that differ in a few attributes, one combination never shown.

Pictures with their captions, the questions that are asked about what a model draws, and which of
the pictures are right. `synthetic.py` and `faces.py` are such worlds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from PIL import Image

from headwater.benchmarks.small_models import to_tensor
from headwater.benchmarks.study import Question

EMPTY = 0.1  # share of training steps that show an image without words: guidance needs it


@dataclass(frozen=True)
class World:
    """What a picture can show, how it is drawn and what is said of it."""

    name: str
    attributes: Mapping[str, tuple[str, ...]]  # attribute -> its values
    held_out: tuple[str, ...]  # the combination that is never shown, a value of each attribute
    render: Callable[[Sequence[str], np.random.Generator], Image.Image]  # 64 x 64 pixels, RGB
    caption: Callable[[Sequence[str | None]], str]  # None: this attribute is not spoken of
    reduced: float  # share of training steps whose caption is silent about one attribute
    # How many times as often as others a combination is shown. Where each of two values is only
    # ever seen with one partner, that partner must be usual without it, or a word comes to mean
    # both: "triangle" a blue triangle.
    usual: Mapping[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """All of them, the one that is never shown included."""
        return list(product(*self.attributes.values()))

    @property
    def shown(self) -> list[tuple[str, ...]]:
        """Those that a model is trained on."""
        return [values for values in self.combinations if values != self.held_out]

    @property
    def round(self) -> list[tuple[str, ...]]:
        """What a corpus shows in turn."""
        return [values for values in self.shown for _ in range(self.usual.get(values, 1))]

    def labels(self, values: Sequence[str]) -> list[int]:
        """The number of each value within its attribute."""
        known = zip(self.attributes.values(), values, strict=True)
        return [names.index(value) for names, value in known]

    def silent(self, values: Sequence[str], place: int) -> str:
        """The caption that does not speak of the attribute at `place`."""
        return self.caption([None if i == place else value for i, value in enumerate(values)])

    def alone(self, values: Sequence[str], place: int) -> str:
        """The caption that speaks of the attribute at `place` only."""
        return self.caption([value if i == place else None for i, value in enumerate(values)])

    def contexts(self, values: Sequence[str], place: int) -> tuple[tuple[str, str], ...]:
        """The value at `place` in all other company: captions that speak of it and that do not."""
        others = [v for v in self.combinations if v[place] == values[place] and v != tuple(values)]
        return tuple((self.caption(v), self.silent(v, place)) for v in others)

    def training_captions(self, values: Sequence[str]) -> list[str]:
        """What an image is shown with while a model trains, in the order of `shares`.

        A caption is silent about an attribute only where pictures of both kinds are shown that it
        is true of: if "a triangle" were said of blue ones alone, "triangle" would come to mean
        blue, and nothing would be left for "red" to say of one that was never shown.
        """
        reduced = []
        for place in range(len(values)) if self.reduced else ():
            alike = [v for v in self.shown if _without(v, place) == _without(values, place)]
            reduced.append(self.silent(values, place) if len(alike) > 1 else self.caption(values))
        return [self.caption(values), *reduced, ""]

    @property
    def shares(self) -> list[float]:
        """How often each of `training_captions` is used."""
        count = len(self.attributes) if self.reduced else 0
        return [1 - EMPTY - self.reduced, *[self.reduced / max(count, 1)] * count, EMPTY]

    def sentences(self) -> list[str]:
        """Everything that is ever said or asked in this world."""
        silent = [self.silent(v, i) for v in self.combinations for i in range(len(v))]
        return sorted({"", *map(self.caption, self.combinations), *silent})


def _without(values: Sequence[str], place: int) -> list[str]:
    return [value for i, value in enumerate(values) if i != place]


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures and what each shows."""

    images: torch.Tensor  # [N, 3, 64, 64] float32 in [-1, 1]
    values: tuple[tuple[str, ...], ...]  # [N] a value of each attribute
    keys: tuple[str, ...]  # [N]


def draw(world: World, combinations: Sequence[tuple[str, ...]], count: int, *seed: int) -> Pictures:
    """`count` pictures, going round the combinations; fewer are the beginning of more."""
    values = [combinations[i % len(combinations)] for i in range(count)]
    pictures = [world.render(v, np.random.default_rng([*seed, i])) for i, v in enumerate(values)]
    return Pictures(to_tensor(pictures), tuple(values), tuple(f"{i:05d}" for i in range(count)))


def questions(world: World, corpus: Pictures, pictures: int) -> tuple[Question, ...]:
    """Which images taught the model each concept of a picture that it draws?

    For every combination `pictures` pictures, and for each a question about every attribute that
    its caption names. The kind of concept says whether the combination was never shown to the
    model ("shape, unseen") or was ("shape, seen"); right are the images that carry the value.
    """
    found = []
    for values in [world.held_out, *world.shown]:
        seen = "unseen" if values == world.held_out else "seen"
        prompt = world.caption(values)
        for number in range(pictures):
            for place, attribute in enumerate(world.attributes):
                if (contrast := world.silent(values, place)) == prompt:
                    continue  # its absence is what the caption is silent about
                truth = np.array([shown[place] == values[place] for shown in corpus.values])
                concept = f"{attribute}, {seen}"
                alone, picture = world.alone(values, place), f"{prompt} {number}"
                contexts = world.contexts(values, place)
                found.append(Question(concept, prompt, contrast, picture, truth, alone, contexts))
    return tuple(found)
