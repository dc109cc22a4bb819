"""What models are retrained on: labelled pictures, and others of their kind that no model sees.

Either the demo's own drawings (eight objects by six studios), or two or more styles of the emoji
corpus with the names that all of them have. A given pipeline lends its autoencoder and its text
encoder.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from headwater.attribution import Model
from headwater.benchmarks.emoji import EMOJI, worded
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.retraining import Lessons, lessons_of
from headwater.benchmarks.runs import digest
from headwater.benchmarks.study import Corpus
from headwater.demo.art import OBJECTS, STUDIOS
from headwater.demo.corpus import HELD_OUT, make_corpus, object_contrast, studio_contrast

# The caption, the same without each of its concepts, nothing: how often each is shown.
SHARES = (0.7, 0.1, 0.1, 0.1)
_EMOJI = {"object": "name", "style": "style"}  # kind of concept -> the corpus's column
_APART = 7  # seed of what is kept apart
_AT_ONCE = 256  # pictures encoded together


@dataclass(frozen=True)
class Pictures:
    """Pictures, what is said of them and what they show."""

    x_0: Tensor  # [N, C, h, w] clean samples
    captions: tuple[str, ...]
    keys: tuple[str, ...]
    labels: Mapping[str, tuple[str, ...]]  # kind of concept -> what each picture shows of it
    lacking: Mapping[str, tuple[str, ...]]  # kind of concept -> each caption without it

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def corpus(self) -> Corpus:
        """As a study takes them."""
        return Corpus(self.x_0, self.captions, self.keys)

    def carriers(self, kind: str, label: str) -> npt.NDArray[np.bool_]:
        """Which of them show it, [N]."""
        return np.array([own == label for own in self.labels[kind]])

    def alone(self, kind: str) -> tuple[str, ...]:
        """Each caption of this concept and nothing else: without the other, where there are two."""
        others = [lines for other, lines in self.lacking.items() if other != kind]
        return others[0] if len(others) == 1 else ("",) * len(self)

    def rows(self, chosen: Sequence[int]) -> Pictures:
        """Those at the given positions."""

        def pick(values: Sequence[str]) -> tuple[str, ...]:
            return tuple(values[i] for i in chosen)

        return Pictures(
            self.x_0[torch.tensor(chosen, device=self.x_0.device)],
            pick(self.captions),
            pick(self.keys),
            {kind: pick(values) for kind, values in self.labels.items()},
            {kind: pick(values) for kind, values in self.lacking.items()},
        )


def joined(left: Pictures, right: Pictures) -> Pictures:
    """One after the other."""
    return Pictures(
        torch.cat([left.x_0, right.x_0]),
        left.captions + right.captions,
        left.keys + right.keys,
        {kind: left.labels[kind] + right.labels[kind] for kind in left.labels},
        {kind: left.lacking[kind] + right.lacking[kind] for kind in left.lacking},
    )


@dataclass(frozen=True)
class Material:
    """Pictures to train on, and others of the same kinds that no model sees."""

    trained: Pictures
    unseen: Pictures

    @property
    def digest(self) -> str:
        """Of all pictures' keys and captions."""
        both = joined(self.trained, self.unseen)
        return digest(pa.table({"key": both.keys, "caption": both.captions}))

    def lessons(self, base: Model) -> Lessons:
        """What can be trained on; concepts are left out of captions as often as `SHARES` says."""
        pictures = self.trained
        kinds = sorted(pictures.lacking)
        said = zip(pictures.captions, *(pictures.lacking[kind] for kind in kinds), strict=True)
        return lessons_of(base, pictures.x_0, [[*lines, ""] for lines in said], SHARES)


def base_model(folder: str | None, device: str, corpus: str | None) -> Model:
    """The pipeline that lends its autoencoder and text encoder; the demo's if none is named.

    Raises:
        BenchmarkError: a corpus without a model; the demo's knows the words of its own only.
    """
    if corpus is not None and folder is None:
        raise BenchmarkError(f"--corpus {corpus} needs --model, whose text encoder knows its words")
    if folder is not None:
        return Model.from_pretrained(folder, device=device, dtype="float32")
    with as_file(files("headwater.demo") / "model") as shipped:
        return Model.from_pretrained(shipped, device=device, dtype="float32")


def evenly(items: Sequence[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def material_of(
    base: Model,
    corpus: str | None,
    *,
    styles: Sequence[str],
    names: int,
    per_pair: int,
    unseen: int,
    pixels: int,
) -> Material:
    """The emoji corpus's, or the demo's `drawings` where none is named."""
    if corpus is None:
        return drawings(base, per_pair=per_pair, unseen=unseen, pixels=pixels)
    return emoji(base, Path(corpus), styles=styles, names=names, unseen=unseen, pixels=pixels)


def drawings(base: Model, *, per_pair: int, unseen: int, pixels: int) -> Material:
    """The demo's drawings, encoded by the base: object and studio are the concepts.

    `per_pair` of each pair that the demo's corpus has are trained on; `unseen` others of these
    pairs are drawn with other numbers.
    """
    pairs = len(OBJECTS) * len(STUDIOS) - len(HELD_OUT)

    def encoded(per_pair: int, count: int, seed: int, within: str = "") -> Pictures:
        rows = make_corpus(per_pair, seed).to_pylist()
        whole = count - count % pairs  # rounds of all pairs, then an even part of them
        rows = rows[:whole] + [rows[i] for i in evenly(range(whole, len(rows)), count - whole)]
        # Keys name noise: those of two drawings must differ.
        rows = [row | {"image_id": within + row["image_id"]} for row in rows]
        return _pictures(
            base,
            rows,
            pixels,
            labels={kind: [row[kind] for row in rows] for kind in ("object", "studio")},
            lacking={
                "object": [object_contrast(row["studio"]) for row in rows],
                "studio": [studio_contrast(row["object"]) for row in rows],
            },
        )

    return Material(
        encoded(per_pair, per_pair * pairs, 0),
        encoded(-(-unseen // pairs), unseen, _APART, "unseen/"),
    )


def emoji(
    base: Model, corpus: Path, *, styles: Sequence[str], names: int, unseen: int, pixels: int
) -> Material:
    """Names that all the styles have, `names` of them (0: all); `unseen` pictures are kept apart.

    Raises:
        BenchmarkError: no such file, or a style or names that it has not.
    """
    file = corpus / "train.parquet"
    if not file.is_file():
        raise BenchmarkError(f"{file} does not exist; --corpus names the emoji corpus's folder")
    rows = [row for row in pq.read_table(file).to_pylist() if row["style"] in styles]
    known = [{row["name"] for row in rows if row["style"] == style} for style in styles]
    shared = sorted(set.intersection(*known)) if known else []
    generator = np.random.default_rng(_APART)
    if names:
        shared = sorted(generator.permutation(shared)[:names].tolist())
    if not shared or len(shared) * len(styles) <= unseen:
        raise BenchmarkError(
            f"{file} has {len(shared)} names in all of the styles {', '.join(styles)}, too few "
            f"to keep {unseen} pictures apart; choose other styles"
        )
    first = {(row["name"], row["style"]): row for row in reversed(rows)}  # one of each
    rows = [first[name, style] for name in shared for style in styles]
    pictures = _pictures(
        base,
        rows,
        pixels,
        labels={kind: [row[column] for row in rows] for kind, column in _EMOJI.items()},
        lacking={
            "object": [worded(EMOJI[1], row) for row in rows],
            "style": [worded(EMOJI[2], row) for row in rows],
        },
    )
    apart = set(generator.permutation(len(rows))[:unseen].tolist())
    return Material(
        trained=pictures.rows([i for i in range(len(rows)) if i not in apart]),
        unseen=pictures.rows(sorted(apart)),
    )


def _pictures(
    base: Model,
    rows: Sequence[Mapping[str, Any]],
    pixels: int,
    labels: Mapping[str, Sequence[str]],
    lacking: Mapping[str, Sequence[str]],
) -> Pictures:
    size = (pixels, pixels)
    arrays = [
        np.asarray(
            Image.open(io.BytesIO(row["image"])).convert("RGB").resize(size, Image.Resampling.BOX)
        )
        for row in rows
    ]
    parts = [
        base.encode_pictures(np.stack(arrays[start : start + _AT_ONCE]))
        for start in range(0, len(arrays), _AT_ONCE)
    ]
    return Pictures(
        torch.cat(parts),
        tuple(row["caption"] for row in rows),
        tuple(row["image_id"] for row in rows),
        {kind: tuple(values) for kind, values in labels.items()},
        {kind: tuple(values) for kind, values in lacking.items()},
    )
