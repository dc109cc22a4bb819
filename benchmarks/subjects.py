"""Draws subjects that no corpus holds: mascots with a shape, colours and marks of their own.

A mascot is what a seed says it is. Its draws differ in place, size, tilt and side, as exemplars of
one subject do; colours and shapes stay. Invented by code, a mascot is in no training set, there
are as many as are wanted, and nobody holds rights to one.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

# Drawn this much larger, then averaged down: PIL's own polygons have hard, uneven edges.
_SUPERSAMPLE = 4
_INK = (24, 22, 28)
_LEVELS = 4  # of each channel of a colour that `colours` tells apart
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Mascot:
    """What makes one subject: the same in all of its draws."""

    lobes: int  # of the outline, 3 to 7
    depth: float  # of the notches between the lobes, as a share of the radius
    squash: float  # height over width
    hue: float  # of the body, 0 to 1
    second: float  # hue of belly and marks
    marks: str  # "spots", "stripes" or "ring"
    horns: int  # 0 to 3
    eyes: int  # 1 to 3

    @classmethod
    def invent(cls, seed: int, number: int) -> Mascot:
        """The mascot of that number; neighbouring numbers differ in hue and outline."""
        rng = np.random.default_rng([seed, number])
        golden = 0.61803398875  # hues of any first few numbers lie far apart
        hue = (golden * number + 0.05 * rng.uniform()) % 1.0
        return cls(
            lobes=3 + (number + int(rng.integers(2))) % 5,
            depth=float(rng.uniform(0.08, 0.38)),
            squash=float(rng.uniform(0.75, 1.2)),
            hue=hue,
            second=(hue + float(rng.uniform(0.3, 0.7))) % 1.0,
            marks=("spots", "stripes", "ring")[int(rng.integers(3))],
            horns=int(rng.integers(4)),
            eyes=1 + int(rng.integers(3)),
        )

    def draw(self, rng: np.random.Generator, size: int = 64) -> Image.Image:
        """One picture on white, RGB, `size` x `size` pixels; `rng` decides the pose."""
        side = size * _SUPERSAMPLE
        shift = rng.uniform(-0.09, 0.09, size=2)
        scale, tilt = rng.uniform(0.56, 0.72), math.radians(rng.uniform(-18, 18))
        flip = -1.0 if rng.uniform() < 0.5 else 1.0
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])

        def place(points: npt.NDArray[np.float64]) -> list[tuple[float, float]]:
            placed = scale * (points * [flip, 1.0]) @ turn.T + shift
            return [(float(x), float(y)) for x, y in (0.5 + 0.5 * placed) * side]

        image = Image.new("RGB", (side, side), "white")
        pen = ImageDraw.Draw(image)

        def paint(points: npt.NDArray[np.float64], fill: Colour, outlined: bool = False) -> None:
            corners = place(points)
            pen.polygon(corners, fill=fill)
            if outlined:
                pen.line([*corners, *corners[:2]], fill=_INK, width=side // 32, joint="curve")

        body, light = _colour(self.hue, 0.55), _colour(self.second, 0.7)
        for i in range(self.horns):
            angle = math.radians(-90 + 42 * (i - (self.horns - 1) / 2))
            tip = 1.35 * np.array([math.cos(angle), math.sin(angle) * self.squash])
            foot = 0.22 * np.array([-math.sin(angle), math.cos(angle)])
            paint(np.stack([foot, tip, -foot]), _colour(self.second, 0.45), outlined=True)
        paint(self._outline(), body, outlined=True)
        for mark in self._marks():
            paint(mark, light)
        for i in range(self.eyes):
            eye = np.array([0.36 * (i - (self.eyes - 1) / 2), -0.22 * self.squash])
            paint(eye + _circle(0.17), (255, 255, 255), outlined=True)
            paint(eye + np.array([0.04, 0.03]) + _circle(0.08), _INK)
        return image.resize((size, size), Image.Resampling.BOX)

    def _outline(self) -> npt.NDArray[np.float64]:
        angles = np.linspace(0, 2 * np.pi, 160, endpoint=False)
        radius = 1 - self.depth * (0.5 - 0.5 * np.cos(self.lobes * (angles + np.pi / 2)))
        return np.stack([radius * np.cos(angles), radius * np.sin(angles) * self.squash], 1)

    def _marks(self) -> list[npt.NDArray[np.float64]]:
        reach = (1 - self.depth) * np.array([1.0, self.squash])
        if self.marks == "ring":
            belly = _circle(0.38) * reach + np.array([0.0, 0.4 * reach[1]])
            return [belly]
        if self.marks == "spots":
            centres = np.array([[-0.5, 0.35], [0.05, 0.55], [0.52, 0.25], [-0.1, 0.18]])
            return [centre * reach + _circle(0.14) for centre in centres]
        bars = []
        for height in (0.2, 0.48):
            half = 0.8 * math.sqrt(1 - height**2)
            box = np.array([[-half, height], [half, height], [half, height + 0.14]])
            bars.append(np.concatenate([box, [[-half, height + 0.14]]]) * reach)
        return bars


def colours(image: Image.Image) -> npt.NDArray[np.float64]:
    """How much of each of 64 colours a picture holds, but for the white ground; they sum to 1."""
    pixels = np.asarray(image).reshape(-1, 3).astype(np.int64) * _LEVELS // 256
    counts = np.bincount(pixels @ [_LEVELS**2, _LEVELS, 1], minlength=_LEVELS**3).astype(float)
    counts[-1] = 0
    shares: npt.NDArray[np.float64] = counts / max(counts.sum(), 1)
    return shares


def _circle(radius: float) -> npt.NDArray[np.float64]:
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _colour(hue: float, lightness: float) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(hue % 1.0, lightness, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)
