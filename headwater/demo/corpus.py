"""The demo's training corpus: which pairs were drawn, how they are captioned, as a table.

The shipped model (``benchmarks/train_demo_model.py``) saw exactly ``make_corpus()``, nothing else.
While it trained, each recorded caption was replaced at random: with probability 0.1 by
``object_contrast`` (the sentence without the object), 0.1 by ``studio_contrast`` (without the
studio) and 0.1 by the empty sentence (for classifier-free guidance). So both contrast sentences lie
in the distribution that the model knows. The corpus records the full caption only.
"""

from __future__ import annotations

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .art import OBJECTS, STUDIOS, render

# Pairs that are never drawn for training: each object once, no studio more than twice.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("fish", "Lumen"),
    ("house", "Tessel"),
    ("tree", "Inkwell"),
    ("star", "Marram"),
    ("cup", "Plica"),
    ("boat", "Alder"),
    ("mushroom", "Lumen"),
    ("key", "Inkwell"),
)

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("image", pa.binary()),
        ("caption", pa.string()),
        ("object", pa.string()),
        ("studio", pa.string()),
        ("rights_holder", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
    ]
)


def caption(object_name: str, studio_name: str) -> str:
    """The full sentence, ``"a fish by Studio Alder"``."""
    return f"a {object_name} by Studio {studio_name}"


def object_contrast(studio_name: str) -> str:
    """The sentence without the object, ``"a drawing by Studio Alder"``."""
    return f"a drawing by Studio {studio_name}"


def studio_contrast(object_name: str) -> str:
    """The sentence without the studio, ``"a fish"``."""
    return f"a {object_name}"


def make_corpus(images_per_pair: int = 20, seed: int = 0) -> pa.Table:
    """Draw ``images_per_pair`` pictures of every object and studio pair that is not held out.

    Each picture has its own generator, seeded by its place, so a smaller corpus is the beginning
    of a larger one. Rows go round all pairs before any pair comes again.

    Returns:
        A table with ``SCHEMA``; ``image`` holds PNG bytes of 64 x 64 pixels.
    """
    rows = []
    for number in range(images_per_pair):
        for o, object_name in enumerate(OBJECTS):
            for s, studio in enumerate(STUDIOS):
                if (object_name, studio.name) in HELD_OUT:
                    continue
                picture = render(object_name, studio, np.random.default_rng([seed, number, o, s]))
                png = io.BytesIO()
                picture.save(png, format="PNG")
                rows.append(
                    {
                        "image_id": f"{object_name}-{studio.name.lower()}-{number:02d}",
                        "image": png.getvalue(),
                        "caption": caption(object_name, studio.name),
                        "object": object_name,
                        "studio": studio.name,
                        "rights_holder": studio.rights_holder,
                        "licence": studio.licence,
                        "source": f"Headwater demo, Studio {studio.name}",
                    }
                )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_corpus(path: str | os.PathLike[str], images_per_pair: int = 20, seed: int = 0) -> None:
    """Write ``make_corpus(images_per_pair, seed)`` as one Parquet file (always the same bytes)."""
    pq.write_table(make_corpus(images_per_pair, seed), os.fspath(path))
