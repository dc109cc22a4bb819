"""Miniature corpora in the form of the emoji benchmark: the demo's drawings, captioned noise."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from headwater.attribution import Model, Recipe
from headwater.benchmarks import emoji
from headwater.benchmarks.study import Configuration, Study
from headwater.demo.art import STUDIOS, render
from headwater.demo.corpus import HELD_OUT, caption, make_corpus

# What the shipped demo's model was trained on.
DEMO = ("a {name} by Studio {style}", "a drawing by Studio {style}", "a {name}")
# Words that the tests' random model knows.
TINY = ("{a} {name} drawing in {style} style", "a drawing in {style} style", "{a} {name} drawing")
NAMES, STYLES = ("cat", "dog", "fish", "house"), ("red", "blue", "studio")
HELD = (("cat", "red"), ("dog", "blue"))
OURS = Configuration("ours", Recipe(dim=96, timesteps=3, steps=6))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def item(number: int, name: str, style: str, wording: str, picture: Image.Image) -> dict[str, Any]:
    return {
        "image_id": f"{name}-{style}-{number}",
        "image": png(picture),
        "caption": wording.format(a="a", name=name, style=style),
        "name": name,
        "style": style,
        "codepoints": name.upper(),
    }


def written(folder: Path, art: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(list(art)), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(list(held)), folder / "heldout.parquet")
    names = [
        {"codepoint": name.upper(), "language": "xx", "name": f"x{name}"} for name in NAMES[:-1]
    ]
    pq.write_table(pa.Table.from_pylist(names), folder / "names.parquet")
    return folder


def demo_corpus(folder: Path) -> Path:
    """A picture of each pair that the demo's model learnt from, and its held-out pairs."""
    columns = {"object": "name", "studio": "style"}
    art = make_corpus(1).select(["image_id", "image", "caption", *columns])
    art = art.rename_columns([columns.get(name, name) for name in art.column_names])
    studios = {studio.name: studio for studio in STUDIOS}
    held = [
        item(0, name, style, DEMO[0], render(name, studios[style], np.random.default_rng(0)))
        for name, style in HELD_OUT
    ]
    assert held[0]["caption"] == caption(*HELD_OUT[0])
    return written(folder, art.to_pylist(), held)


def tiny_corpus(folder: Path) -> Path:
    """Noise, captioned: ten pictures of each pair but for those held out."""

    def picture(seed: int) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    pairs = [(name, style) for name in NAMES for style in STYLES]
    art = [
        item(number, *pair, TINY[0], picture(20 * place + number))
        for place, pair in enumerate(pairs)
        if pair not in HELD
        for number in range(4)
    ]
    held = [item(9, *pair, TINY[0], picture(999)) for pair in HELD]
    return written(folder, art, held)


def tiny_study(corpus: Path, model_folder: Path) -> Study:
    art, asked = emoji.read(corpus, 0, 2)
    model = Model.from_pretrained(model_folder, device="cpu")
    study = emoji.make_study(model, art, asked, TINY, seeds=3, batch=7)
    return replace(study, steps=4)
