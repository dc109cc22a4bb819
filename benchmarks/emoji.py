"""The benchmark `emoji`: real art in thirteen styles, asked about pairs that were held out.

For each held-out pair of object and style the model draws pictures, which it can only do by putting
together what other pictures taught it. Which training images taught the object (carriers: the same
object in other styles, recall@min(10, n)), and which the style (carriers: the same style,
precision@10)?

The corpus is a folder with `train.parquet` and `heldout.parquet`: image_id, image, caption, name
and style of every picture, and its codepoints where captions are to be translated. The model must
have been trained on the first, and on nothing of the second.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from headwater.attribution import Model
from headwater.benchmarks import record
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.further import in_company
from headwater.benchmarks.measure import chance, measure
from headwater.benchmarks.methods import chosen as methods_of
from headwater.benchmarks.methods import configurations
from headwater.benchmarks.runs import begin, digest, given
from headwater.benchmarks.study import Configuration, Corpus, Question, Say, Study

OURS = "headwater"
# How captions are worded: in full, without the object, without the style. {a} is the caption's own
# article, "a" or "an".
EMOJI = ("{a} {name} emoji in {style} style", "an emoji in {style} style", "{a} {name} emoji")
SMALL = {"rows": 300, "pairs": 8, "seeds": 1, "batch": 32, "methods": [OURS], "pictured": 4}
METRICS = {"object": "recall_at_10", "style": "precision_at_10"}
PICTURED = (OURS, "concept-trak")  # methods whose top tens are shown
CONTEXTS = 12  # of a question, beside its own: every other style of thirteen
_SLICE = 512  # pictures decoded at a time


def run(
    out: Path,
    *,
    corpus: str,
    model: str,
    rows: int = 0,
    pairs: int = 106,
    seeds: int = 8,
    batch: int = 1024,
    methods: Sequence[str] = (),
    pictured: int = 8,
    wording: Sequence[str] = EMOJI,
    dtype: str = "auto",
    device: str = "auto",
    say: Say,
) -> pa.Table:
    """Put the questions to every method and write the record.

    Args:
        out: folder of the record.
        corpus: folder of the corpus.
        model: pipeline folder of the model that was trained on it.
        rows: training images, up to half of them carriers of the asked objects; 0 for all.
        pairs: held-out pairs, evenly spread; each is asked twice.
        seeds: pictures drawn for each pair.
        batch: images per forward pass.
        methods: names of `methods.configurations`; none for all.
        pictured: questions in the sheets of top tens.
        wording: of captions: as the corpus has them, without the object, without the style.
        dtype: precision of the denoiser's passes.
        device: cuda, cpu, or auto.
        say: is told each result.

    Returns:
        Every ranking, by `measure.SCHEMA`.
    """
    settings = given(locals())
    chosen = named(methods)
    network = Model.from_pretrained(model, device=device, dtype=dtype)
    art, asked = read(Path(corpus), rows, pairs)
    source = digest(art, pa.Table.from_pylist(asked))
    begun = begin(out, "emoji", settings, model=network, corpus=source, say=say)
    study = make_study(network, art, asked, wording, seeds=seeds, batch=batch)
    intro = (
        f"{len(art):,} emoji in {len(set(art['style'].to_pylist()))} styles; {len(asked)} pairs of "
        f"object and style that the model never saw, {seeds} pictures drawn of each. Object: the "
        "same object in other styles. Style: the same style. No image carries both."
    )
    by_chance = chance(study.questions, METRICS)
    record.follow(begun, METRICS, intro=intro, chance=by_chance)
    table = measure(study, chosen, say, parts=begun.parts)
    record.write(begun, table, METRICS, intro=intro, chance=by_chance)
    with (out / "emoji.md").open("a") as page:
        page.write("\n".join(["", *misses(study, art, table), ""]))

    def shown(place: int) -> Image.Image:
        return picture(art["image"][place].as_py(), network)

    for method in (c.name for c in chosen if c.name in PICTURED):
        lines = record.top_ten(study, record.spread(table, method, pictured), shown)
        record.grid(lines, out / f"top10-{method}.png")
    begun.finish()
    return table


def named(methods: Sequence[str]) -> list[Configuration]:
    """The configurations of these names, ours and what shares its rows first; all for none."""
    ours = configurations()[OURS].recipe
    return sorted(methods_of(methods), key=lambda configuration: configuration.recipe != ours)


def read(folder: Path, rows: int, pairs: int) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The training images and the held-out pairs that a run of this size is about.

    Raises:
        BenchmarkError: the folder is no such corpus, or smaller than asked for.
    """
    for name in ("train.parquet", "heldout.parquet"):
        if not (folder / name).is_file():
            raise BenchmarkError(f"{folder} holds no {name}; give the folder of the emoji corpus")
    art, held_out = (pq.read_table(folder / name) for name in ("train.parquet", "heldout.parquet"))
    for count, there, what in (
        (rows or len(art), len(art), "images"),
        (pairs, len(held_out), "held-out pairs"),
    ):
        if not 1 <= count <= there:
            raise BenchmarkError(
                f"{folder} holds {there} {what}, {count} were asked for; ask for 1 to {there}"
            )
    listed = held_out.drop(["image"]).to_pylist()
    asked = listed[:: len(listed) // pairs][:pairs]
    if rows:
        # Up to half are the asked objects' carriers: few rows at random hold hardly one of each.
        order = np.random.default_rng(0).permutation(len(art))
        carriers = np.isin(art["name"].to_pylist(), [pair["name"] for pair in asked])[order]
        sure = order[carriers][: rows // 2]
        others = order[~np.isin(order, sure)][: rows - len(sure)]
        art = art.take(np.sort(np.concatenate([sure, others])))
    return art, asked


def make_study(
    model: Model,
    art: pa.Table,
    pairs: Sequence[dict[str, Any]],
    wording: Sequence[str] = EMOJI,
    *,
    seeds: int,
    batch: int,
) -> Study:
    """Object and style of every pair, asked about the pictures that the model draws of it."""
    captions, keys = (tuple(art[column].to_pylist()) for column in ("caption", "image_id"))
    corpus = Corpus(encoded(model, art), captions, keys)
    asked = in_company(questions(art, pairs, wording), corpus)
    return Study("emoji", model, corpus, asked, seeds=seeds, batch=batch)


def questions(
    art: pa.Table, pairs: Sequence[dict[str, Any]], wording: Sequence[str] = EMOJI
) -> tuple[Question, ...]:
    """Of every pair its object, then its style.

    An object's contexts are other styles, a style's are objects that are not asked about: as many
    for both, drawn for each pair by its name.
    """
    full, no_object, no_style = wording
    names, styles = (np.array(art[column].to_pylist()) for column in ("name", "style"))
    # Only captions in full say an object's article.
    told = art.select(["name", "style", "caption"]).to_pylist()
    objects = {row["name"]: row for row in told if row["caption"] == worded(full, row)}
    for pair in pairs:
        objects.pop(pair["name"], None)
    known, looks = sorted(objects), sorted(set(styles))
    count = min(CONTEXTS, len(known), len(looks) - 1)
    found = []
    for pair in pairs:
        asked, picture, style = pair["caption"], pair["image_id"], pair["style"]
        styled, named = worded(no_object, pair), worded(no_style, pair)
        chance = np.random.default_rng([*picture.encode()])
        others = chance.permutation([look for look in looks if look != style])[:count]
        restyled = [pair | {"style": other} for other in others]
        renamed = [objects[name] | {"style": style} for name in chance.permutation(known)[:count]]
        of_object = tuple((worded(full, row), worded(no_object, row)) for row in restyled)
        of_style = tuple((worded(full, row), worded(no_style, row)) for row in renamed)
        same_object, same_style = names == pair["name"], styles == style
        found += [
            Question("object", asked, styled, picture, same_object, named, of_object),
            Question("style", asked, named, picture, same_style, styled, of_style),
        ]
    return tuple(found)


def worded(template: str, item: Mapping[str, Any]) -> str:
    """A caption of a picture in one of the wordings."""
    article = item["caption"].partition(" ")[0]
    return template.format(a=article, name=item["name"], style=item["style"])


def encoded(model: Model, art: pa.Table) -> Tensor:
    """Every picture as the model sees it, [N, C, h, w]."""
    images = art["image"].to_pylist()
    parts = []
    for start in range(0, len(images), _SLICE):
        pictures = [picture(data, model) for data in images[start : start + _SLICE]]
        parts.append(model.encode_pictures(np.stack([np.asarray(p) for p in pictures])))
    return torch.cat(parts)


def picture(data: bytes, model: Model) -> Image.Image:
    """A picture of the corpus in the size that the model was made for."""
    height, width = model.image_size
    found = Image.open(io.BytesIO(data)).convert("RGB")
    if found.size != (width, height):
        raise BenchmarkError(
            f"a picture of the corpus is {found.width} x {found.height}, the model makes "
            f"{width} x {height}; give the model that was trained on this corpus"
        )
    return found


def misses(study: Study, art: pa.Table, table: pa.Table) -> list[str]:
    """What stands in the label-free top tens of object questions in the place of carriers."""
    place = {key: i for i, key in enumerate(study.corpus.keys)}
    names = art["name"].to_pylist()
    wrong: dict[str, list[tuple[bool, bool]]] = {}
    for row in table.to_pylist():
        number = row["question"]
        question = study.questions[number]
        if not row["label_free"] or question.concept != "object":
            continue
        words = set(question.prompt.split()) - set(question.contrast.split())
        of_style = study.questions[number + 1].truth
        wrong.setdefault(row["method"], []).extend(
            (bool(of_style[i]), bool(words & set(names[i].split())))
            for i in (place[key] for key in row["top"])
            if not question.truth[i]
        )
    lines = [
        "## Wrong images in the top tens of objects",
        "",
        "Shares of them that are in the style of the picture asked about (the other concept leaked "
        "in), and that show an object whose name shares a word with the asked one's.",
        "",
        "| method | wrong images | in the picture's style | of a name with a word in common |",
        "|---|---|---|---|",
    ]
    for method, found in wrong.items():
        shares = np.array(found).mean(0) if found else (np.nan, np.nan)
        lines.append(f"| {method} | {len(found):,} | {shares[0]:.3f} | {shares[1]:.3f} |")
    return lines
