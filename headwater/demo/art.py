"""Draws the demo's pictures: eight objects, each in the drawing styles of six fictional studios.

A drawing is plain geometry (polygons in the square [-1, 1] x [-1, 1], y down) painted by the
studio's style. Position, size, tilt and hue come from the generator that the caller passes, so the
same seed gives the same pixels. No fonts and no image files are involved.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
Point = tuple[float, float]
Role = Literal["body", "accent", "hole"]

# Drawn this much larger, then averaged down: PIL's own polygons have hard, uneven edges.
_SUPERSAMPLE = 4
# Tiles of the mosaic style along one side: 4 pixels each at size 64, the grid of the model's
# 16 x 16 latents, so that a small autoencoder keeps them sharp.
_TILES = 16


@dataclass(frozen=True)
class Studio:
    """A fictional studio: a drawing style, who holds the rights and under which licence."""

    name: str
    style: str
    rights_holder: str
    licence: str


STUDIOS: tuple[Studio, ...] = (
    Studio("Alder", "flat colour on a pale ground", "Alder and Daughters", "CC-BY-4.0"),
    Studio("Inkwell", "thick black outline on white", "Inkwell Cooperative", "CC-BY-NC-4.0"),
    Studio("Lumen", "neon outline on near-black", "Lumen Night Works", "CC-BY-SA-4.0"),
    Studio("Tessel", "mosaic of square tiles", "Tessel Tilemakers", "CC0-1.0"),
    Studio("Marram", "diagonal hatching on kraft paper", "Marram Etching House", "CC-BY-ND-4.0"),
    Studio("Plica", "white paper cut-out with a shadow", "Plica Papercraft", "LicenseRef-Plica"),
)


@dataclass(frozen=True)
class _Part:
    role: Role
    points: tuple[Point, ...]


def _polygon(role: Role, *points: Point) -> _Part:
    return _Part(role, points)


def _ellipse(
    role: Role,
    centre: Point,
    radii: Point,
    *,
    start: float = 0.0,
    stop: float = 360.0,
) -> _Part:
    """An ellipse, or the part of it between two angles (degrees, clockwise from the right)."""
    angles = np.radians(np.linspace(start, stop, 41))
    return _Part(
        role,
        tuple(
            (centre[0] + radii[0] * math.cos(a), centre[1] + radii[1] * math.sin(a)) for a in angles
        ),
    )


def _star(role: Role, outer: float, inner: float) -> _Part:
    points = []
    for i in range(10):
        radius = outer if i % 2 == 0 else inner
        angle = math.radians(36 * i - 90)
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.06))
    return _Part(role, tuple(points))


# Painted in order; a hole shows the ground again.
_SHAPES: dict[str, tuple[_Part, ...]] = {
    "fish": (
        _polygon("accent", (0.42, 0.0), (1.0, -0.55), (0.86, 0.0), (1.0, 0.55)),
        _ellipse("body", (-0.22, 0.0), (0.78, 0.5)),
        _ellipse("hole", (-0.6, -0.1), (0.13, 0.13)),
    ),
    "house": (
        _polygon("body", (-0.7, -0.12), (0.7, -0.12), (0.7, 0.9), (-0.7, 0.9)),
        _polygon("accent", (-0.98, -0.08), (0.0, -0.95), (0.98, -0.08)),
        _polygon("accent", (-0.2, 0.9), (-0.2, 0.3), (0.2, 0.3), (0.2, 0.9)),
    ),
    "tree": (
        _polygon("accent", (-0.16, 0.45), (0.16, 0.45), (0.16, 1.0), (-0.16, 1.0)),
        _polygon("body", (-0.82, 0.62), (0.0, -0.2), (0.82, 0.62)),
        _polygon("body", (-0.66, 0.12), (0.0, -0.6), (0.66, 0.12)),
        _polygon("body", (-0.48, -0.36), (0.0, -1.0), (0.48, -0.36)),
    ),
    "star": (_star("body", 1.0, 0.44), _ellipse("accent", (0.0, 0.06), (0.24, 0.24))),
    "cup": (
        _ellipse("body", (0.52, -0.02), (0.44, 0.42)),
        _ellipse("hole", (0.54, -0.02), (0.2, 0.19)),
        _polygon("body", (-0.85, -0.6), (0.55, -0.6), (0.38, 0.68), (-0.68, 0.68)),
        _polygon("accent", (-0.92, 0.66), (0.62, 0.66), (0.45, 0.9), (-0.75, 0.9)),
    ),
    "boat": (
        _polygon("accent", (-0.1, -0.98), (-0.1, 0.24), (-0.82, 0.24)),
        _polygon("accent", (0.08, -0.78), (0.78, 0.24), (0.08, 0.24)),
        _polygon("body", (-1.0, 0.36), (1.0, 0.36), (0.62, 0.88), (-0.62, 0.88)),
    ),
    "mushroom": (
        _polygon("accent", (-0.26, 0.0), (0.26, 0.0), (0.38, 0.95), (-0.38, 0.95)),
        _ellipse("body", (0.0, 0.12), (0.95, 0.98), start=180.0, stop=360.0),
        _ellipse("hole", (-0.42, -0.24), (0.17, 0.17)),
        _ellipse("hole", (0.24, -0.42), (0.19, 0.19)),
    ),
    "key": (
        _polygon("body", (-0.2, -0.13), (1.0, -0.13), (1.0, 0.13), (-0.2, 0.13)),
        _polygon("accent", (0.36, 0.13), (0.56, 0.13), (0.56, 0.5), (0.36, 0.5)),
        _polygon("accent", (0.78, 0.13), (1.0, 0.13), (1.0, 0.5), (0.78, 0.5)),
        _ellipse("body", (-0.5, 0.0), (0.5, 0.5)),
        _ellipse("hole", (-0.54, 0.0), (0.22, 0.22)),
    ),
}

OBJECTS: tuple[str, ...] = tuple(_SHAPES)


def render(
    object_name: str, studio: Studio, rng: np.random.Generator, size: int = 64
) -> Image.Image:
    """Draw one object in one studio's style as an RGB picture of ``size`` x ``size`` pixels.

    ``rng`` decides position, size, tilt and hue and is advanced by the same number of draws
    whatever the object or studio.

    Raises:
        ValueError: an object or studio that the demo does not have.
    """
    if object_name not in _SHAPES:
        raise ValueError(f"no object named {object_name!r}; choose from {', '.join(OBJECTS)}")
    if studio.name not in _STYLES:
        raise ValueError(
            f"no studio named {studio.name!r}; choose from {', '.join(s.name for s in STUDIOS)}"
        )
    shift_x, shift_y = rng.uniform(-0.1, 0.1, size=2)
    scale = rng.uniform(0.58, 0.74)
    tilt = math.radians(rng.uniform(-7.0, 7.0))
    hue = float(rng.uniform())
    side = size * _SUPERSAMPLE
    cos, sin = math.cos(tilt), math.sin(tilt)

    def place(point: Point) -> Point:
        x = scale * (cos * point[0] - sin * point[1]) + shift_x
        y = scale * (sin * point[0] + cos * point[1]) + shift_y
        return (0.5 + 0.5 * x) * side, (0.5 + 0.5 * y) * side

    parts = tuple(
        _Part(part.role, tuple(place(p) for p in part.points)) for part in _SHAPES[object_name]
    )
    drawing = _STYLES[studio.name](parts, side, hue)
    return drawing.resize((size, size), Image.Resampling.BOX)


def _colour(hue: float, lightness: float, saturation: float) -> Colour:
    red, green, blue = colorsys.hls_to_rgb(hue % 1.0, lightness, saturation)
    return round(255 * red), round(255 * green), round(255 * blue)


def _mask(parts: tuple[_Part, ...], side: int, *roles: Role) -> Image.Image:
    """Where the given roles are on top, as an L image of 0 and 255."""
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    for part in parts:
        draw.polygon(part.points, fill=255 if part.role in roles else 0)
    return mask


def _stroke(draw: ImageDraw.ImageDraw, part: _Part, colour: Colour, width: int) -> None:
    # The second point again at the end rounds the joint at the start.
    draw.line([*part.points, *part.points[:2]], fill=colour, width=width, joint="curve")


def _flat(parts: tuple[_Part, ...], side: int, hue: float) -> Image.Image:
    image = Image.new("RGB", (side, side), _colour(hue + 0.45, 0.93, 0.55))
    image.paste(_colour(hue, 0.52, 0.72), mask=_mask(parts, side, "body"))
    image.paste(_colour(hue + 0.09, 0.34, 0.62), mask=_mask(parts, side, "accent"))
    return image


def _ink(parts: tuple[_Part, ...], side: int, hue: float) -> Image.Image:
    image = Image.new("RGB", (side, side), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for part in parts:
        fill = _colour(hue, 0.72, 0.85) if part.role == "accent" else (255, 255, 255)
        draw.polygon(part.points, fill=fill)
        _stroke(draw, part, (12, 12, 14), round(side * 0.05))
    return image


def _neon(parts: tuple[_Part, ...], side: int, hue: float) -> Image.Image:
    lines = Image.new("RGB", (side, side), (0, 0, 0))
    draw = ImageDraw.Draw(lines)
    for part in parts:
        tint = hue + 0.4 if part.role == "accent" else hue
        draw.polygon(part.points, fill=(0, 0, 0))
        _stroke(draw, part, _colour(tint, 0.62, 1.0), round(side * 0.042))
    glow = lines.filter(ImageFilter.GaussianBlur(side * 0.04))
    night = Image.new("RGB", (side, side), (13, 10, 30))
    return ImageChops.screen(ImageChops.screen(night, glow), lines)


def _mosaic(parts: tuple[_Part, ...], side: int, hue: float) -> Image.Image:
    def tiles(*roles: Role) -> np.ndarray:
        cells = _mask(parts, side, *roles).resize((_TILES, _TILES), Image.Resampling.BOX)
        return np.asarray(cells) > 115

    body, accent = tiles("body", "accent"), tiles("accent")
    # A chequerboard of two shades makes the tiles visible without lines between them.
    odd = np.indices((_TILES, _TILES)).sum(axis=0) % 2
    shades = np.empty((_TILES, _TILES, 3), dtype=np.uint8)
    for parity, lift in ((0, 0.045), (1, -0.045)):
        here = odd == parity
        shades[here] = _colour(0.57, 0.68 + lift, 0.16)
        shades[here & body] = _colour(hue, 0.46 + lift, 0.8)
        shades[here & accent] = _colour(hue + 0.12, 0.22 + lift, 0.6)
    return Image.fromarray(shades).resize((side, side), Image.Resampling.NEAREST)


def _hatching(parts: tuple[_Part, ...], side: int, hue: float) -> Image.Image:
    paper = (203, 170, 124)
    image = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(image)
    dark = _colour(hue, 0.24, 0.75)
    y, x = np.indices((side, side))
    period = side // 8
    stripes = {
        "body": Image.fromarray((((x + y) % period) < 0.45 * period).astype(np.uint8) * 255),
        "accent": Image.fromarray((((x - y) % period) < 0.45 * period).astype(np.uint8) * 255),
    }
    for part in parts:
        if part.role == "hole":
            draw.polygon(part.points, fill=paper)
        else:
            draw.polygon(part.points, fill=(243, 230, 205))
            inside = _mask((part,), side, part.role)
            image.paste(dark, mask=ImageChops.multiply(inside, stripes[part.role]))
        _stroke(draw, part, dark, round(side * 0.022))
    return image


def _papercut(parts: tuple[_Part, ...], side: int, hue: float) -> Image.Image:
    ground = Image.new("RGB", (side, side), _colour(hue, 0.5, 0.55))
    paper = _mask(parts, side, "body", "accent")
    offset = round(side * 0.045)
    shadow = ImageChops.offset(paper, offset, offset).filter(ImageFilter.GaussianBlur(side * 0.02))
    ground.paste(_colour(hue, 0.2, 0.6), mask=shadow.point(lambda value: round(0.85 * value)))
    ground.paste((250, 247, 240), mask=paper)
    ground.paste(_colour(hue, 0.82, 0.45), mask=_mask(parts, side, "accent"))
    return ground


_STYLES: dict[str, Callable[[tuple[_Part, ...], int, float], Image.Image]] = {
    "Alder": _flat,
    "Inkwell": _ink,
    "Lumen": _neon,
    "Tessel": _mosaic,
    "Marram": _hatching,
    "Plica": _papercut,
}
