"""Twelve latents of their own colours, two of them for each word: learnt in seconds by heart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwater.benchmarks.material import Material, Pictures

WORDS = ("cat", "dog", "fish", "house", "studio", "drawing")
COLOURS = ("red", "blue")


def pictures(noise: float = 0.5, seed: int = 0, words: Sequence[str] = WORDS) -> Pictures:
    """A latent [4, 8, 8] for each word and colour: the pair's own flat colour, and some noise."""
    flat = torch.randn(len(WORDS) * 2, 4, 1, 1, generator=torch.Generator().manual_seed(0))
    speckle = torch.randn(len(flat), 4, 8, 8, generator=torch.Generator().manual_seed(1 + seed))
    pairs = [(word, colour) for word in WORDS for colour in COLOURS]
    whole = Pictures(
        x_0=flat + noise * speckle,
        captions=tuple(f"a {colour} {word}" for word, colour in pairs),
        keys=tuple(f"{colour}-{word}-{seed}" for word, colour in pairs),
        labels={
            "object": tuple(word for word, _ in pairs),
            "style": tuple(colour for _, colour in pairs),
        },
        lacking={
            "object": tuple(f"a {colour} style" for _, colour in pairs),
            "style": tuple(f"a {word}" for word, _ in pairs),
        },
    )
    return whole.rows([place for place, (word, _) in enumerate(pairs) if word in words])


def material() -> Material:
    """The twelve to train on, and the same with other noise, unseen."""
    return Material(pictures(), pictures(seed=1))
