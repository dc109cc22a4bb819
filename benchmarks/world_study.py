"""A world's benchmark from end to end: models, gate, questions to every method, record.

OUT/models/...                 see `world_models.py`
OUT/NAME.md, NAME.parquet, ... see `record.py`
OUT/top10.png                  one picture of the unseen combination, every method's first ten
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from headwater.attribution import Model
from headwater.benchmarks import world_models
from headwater.benchmarks.measure import measure
from headwater.benchmarks.record import grid, write
from headwater.benchmarks.small_models import Settings
from headwater.benchmarks.small_training import Progress
from headwater.benchmarks.study import Configuration, Corpus, Study
from headwater.benchmarks.worlds import Pictures, World, questions


def run_world(
    world: World,
    out: Path,
    settings: Mapping[str, Any],
    configurations: Mapping[str, Configuration],
    intro: str,
    say: Callable[[str], object],
) -> pa.Table:
    """Train what is not there, gate it, ask, and write the record.

    Args:
        world: what is drawn.
        out: folder of the record and of the models, so that a broken run goes on.
        settings: `images`, `replicates`, `pictures`, `seeds`, `batch`, `device`, `dtype`,
            `training` (fields of `Settings`), `methods` (names; none for all) and `recipe`
            (fields that every method's recipe is given).
        configurations: the methods by name.
        intro: for the record, in Markdown.
        say: hears a line now and then.

    Raises:
        GateError: a model does not draw the combination that it never saw.
        ValueError: `methods` names one that is unknown, or `out` holds other models.
    """
    chosen = _chosen(configurations, settings)
    device = torch.device(settings["device"])
    pictures = world_models.corpus(world, settings["images"])
    folders = world_models.models(
        out / "models",
        world,
        pictures,
        Settings(**settings["training"]),
        settings["replicates"],
        device,
        Progress(say),
    )
    tables = []
    for replicate, folder in enumerate(folders):
        study = study_of(world, folder, pictures, replicate, settings)
        tables.append(measure(study, chosen, say))
        if replicate == 0:
            _top10(study, tables[0], pictures, out / "top10.png")
    table = pa.concat_tables(tables)
    metrics = {q.concept: "precision_at_10" for q in study.questions}
    write(out, world.name, settings, table, metrics, intro=intro, device=settings["device"])
    return table


def study_of(
    world: World, folder: Path, pictures: Pictures, replicate: int, settings: Mapping[str, Any]
) -> Study:
    """The questions about one model."""
    model = Model.from_pretrained(folder, device=settings["device"], dtype=settings["dtype"])
    x_0 = torch.cat([model.encode_images(part) for part in pictures.images.split(256)])
    captions = tuple(world.caption(values) for values in pictures.values)
    return Study(
        name=world.name,
        model=model,
        corpus=Corpus(x_0, captions, pictures.keys),
        questions=questions(world, pictures, settings["pictures"]),
        seeds=settings["seeds"],
        batch=settings["batch"],
        replicate=replicate,
    )


def _chosen(
    configurations: Mapping[str, Configuration], settings: Mapping[str, Any]
) -> list[Configuration]:
    names = settings["methods"] or list(configurations)
    unknown = [name for name in names if name not in configurations]
    if unknown:
        known = ", ".join(configurations)
        raise ValueError(f"method {unknown[0]!r} is unknown; choose from {known}")
    return [
        replace(configurations[n], recipe=replace(configurations[n].recipe, **settings["recipe"]))
        for n in names
    ]


def _top10(study: Study, table: pa.Table, pictures: Pictures, path: Path) -> None:
    """What each method finds, unasked for a lambda, for the first picture."""
    place = {key: number for number, key in enumerate(pictures.keys)}
    picture, prompt = study.asked[0]
    asked = _image(study.model.decode(study.pictures[:1])[0])
    lines = []
    for row in table.to_pylist():
        if row["picture"] == picture and row["label_free"]:
            truth = study.questions[row["question"]].truth
            hits = [(_image(pictures.images[place[k]]), bool(truth[place[k]])) for k in row["top"]]
            title = f"{row['concept']} of “{prompt}”: {row['method']}"
            lines.append((title, asked, hits))
    grid(lines, path)


def _image(pixels: torch.Tensor) -> Image.Image:
    array = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
