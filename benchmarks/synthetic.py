"""The benchmark `synthetic` (Concept-TRAK's): triangles and circles, red and blue, no red triangle.

A picture is 64 x 64 pixels of white with one shape of radius 10, outlined black 2 pixels wide, at
a random place. A red triangle is never shown; the model draws one all the same, and is asked which
training images taught it the shape and which the colour. No image carries both, so a ranking that
ignores the concept is right for at most one half, averaged over the two questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from headwater.benchmarks.world_study import SMALL, run_world
from headwater.benchmarks.worlds import World

__all__ = ["SMALL", "run"]

RADIUS, OUTLINE = 10.0, 2.0
_SUPERSAMPLE = 4  # drawn this much larger, then averaged down: Pillow's edges are hard
_FILL = {"red": (220, 30, 30), "blue": (30, 60, 220)}


def render(values: Sequence[str], rng: np.random.Generator) -> Image.Image:
    """A (shape, colour) at a random place, wholly inside the picture."""
    shape, colour = values
    side = 64 * _SUPERSAMPLE
    x, y = rng.uniform(RADIUS + OUTLINE, 64 - RADIUS - OUTLINE, size=2)
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    angles = [math.tau * i / 90 for i in range(90)] if shape == "circle" else _CORNERS
    # The outline lies half outside; a triangle's sides move by half as much as its corners.
    reach = OUTLINE / 2 if shape == "circle" else OUTLINE
    for radius, fill in ((RADIUS + reach, (0, 0, 0)), (RADIUS - reach, _FILL[colour])):
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        draw.polygon([(px * _SUPERSAMPLE, py * _SUPERSAMPLE) for px, py in points], fill=fill)
    return image.resize((64, 64), Image.Resampling.BOX)


_CORNERS = [math.radians(degrees) for degrees in (-90.0, 30.0, 150.0)]


def caption(values: Sequence[str | None]) -> str:
    """`a red triangle`, `a red shape` or `a triangle`: what is None is not said."""
    shape, colour = values
    return " ".join(["a", *([colour] if colour else []), shape or "shape"])


INTRO = """
A model was trained on white pictures of one triangle or circle, red or blue, and never saw a red
triangle. It draws one, and each method ranks the training images by how much they taught it the
shape, and by how much the colour ("unseen"); the same is asked of pictures of combinations that it
saw ("seen"). Eight of ten images are blue circles, one is a red circle, one a blue triangle. No
image carries both concepts of an unseen picture, so one ranking for both questions is right for at
most 1/2 on average. Captions name shape and colour, so caption search is right by construction;
what a method finds in an untrained model is caption matching, too. The autoencoder, which knows no
words and is asked nothing, has seen red triangles, or it could not decode one.

Published (Concept-TRAK, 2507.06547; its own model and scale, lambda chosen by test recall), seen /
unseen: Concept-TRAK 1.00 / .85, DAS 1.00 / .50, D-TRAK 1.00 / .50, TRAK .80 / .45; activation
trajectories (CADT) .928 unseen at 32 x 32 pixels.
"""
WORLD = World(
    name="synthetic",
    attributes={"shape": ("circle", "triangle"), "colour": ("blue", "red")},
    held_out=("triangle", "red"),
    render=render,
    caption=caption,
    reduced=0.2,
    usual={("circle", "blue"): 8},
)

# run(out, **settings): the settings and what is returned are those of `run_world`.
run = partial(run_world, WORLD, INTRO)
