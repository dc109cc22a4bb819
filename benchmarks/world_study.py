"""A world's benchmark from end to end: models, gate, questions to every method, record.

OUT/models/...                 see `world_models.py`
OUT/NAME.md, NAME.parquet, ... see `record.py`
OUT/top10.png                  one picture of the unseen combination, every method's first ten
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image

from headwater.attribution import Model, Recipe
from headwater.attribution.model import DTYPES, usable_device
from headwater.benchmarks import record, world_models
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.further import in_company
from headwater.benchmarks.measure import BASELINES, chance, measure
from headwater.benchmarks.methods import chosen as methods_of
from headwater.benchmarks.runs import begin, digest, given
from headwater.benchmarks.small_models import Settings
from headwater.benchmarks.small_training import Progress
from headwater.benchmarks.study import Configuration, Corpus, Say, Study
from headwater.benchmarks.worlds import Pictures, World, questions

# The autoencoder is the demo's, fitted a little.
TRAINING = {"vae_steps": 1000, "vae_learning_rate": 5e-4, "gate_images": 100}
# For two cores and minutes: a UNet of a million parameters.
SMALL: dict[str, Any] = {
    "images": 2000,
    "replicates": 1,
    "pictures": 4,
    "seeds": 2,
    "batch": 64,
    "training": {
        "vae_steps": 100,
        "vae_batch_size": 16,
        "steps": 3600,
        "batch_size": 32,
        "unet_widths": [32, 48, 48],
        "text_width": 32,
        "classifier_images": 600,
        "classifier_steps": 600,
        "classifier_width": 8,
        "gate_images": 40,
    },
    "methods": ["trak", "d-trak", "das-l1", "concept-trak", "headwater"],
    "recipe": {"dim": 1024, "timesteps": 5, "steps": 10},
}


def run_world(
    world: World,
    intro: str,
    out: Path,
    *,
    images: int = 10_000,
    replicates: int = 5,
    attempts: int | None = None,
    pictures: int = 8,
    seeds: int = 4,
    batch: int = 512,
    training: Mapping[str, Any] | None = None,
    methods: Sequence[str] = (),
    controls: Sequence[str] = ("headwater",),
    recipe: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    say: Say = print,
) -> pa.Table:
    """Train what is not there, gate it, ask every method, and write the record.

    Args:
        world: what is drawn.
        intro: for the record, in Markdown.
        out: folder of the record and of the models; a run that was broken off goes on.
        images: in the training set.
        replicates: training seeds, each a model that draws the combination that it never saw.
        attempts: seeds at most, as those whose models do not are void; None: three times as many.
        pictures: asked about, of each combination.
        seeds: drawings of each picture, averaged in a query.
        batch: images per forward pass.
        training: fields of `small_models.Settings` that differ from its defaults and `TRAINING`.
        methods: names in `methods.METHODS_TABLE`; none for all.
        controls: methods that are asked of an untrained model, too: what they find there is
            caption matching, not influence.
        recipe: fields that the recipes of all methods share.
        device: where everything runs.
        dtype: of the passes that attribute; `auto` is bfloat16 on a GPU.
        say: hears a line now and then.

    Returns:
        A row for each method, question and damping, by `measure.SCHEMA`.

    Raises:
        GateError: too few models draw the combination that they never saw; the run is void.
        BenchmarkError: an unknown method or setting of training, a count below 1, or `out` holds
            models trained with other settings.
    """
    settings = given(locals())
    for name in ("images", "replicates", "pictures", "seeds", "batch"):
        if settings[name] < 1:
            raise BenchmarkError(f"{name} is {settings[name]}; it must be at least 1")
    attempts = 3 * replicates if attempts is None else attempts
    if attempts < replicates:
        raise BenchmarkError(f"attempts is {attempts}; {replicates} replicates need as many")
    base = Recipe.from_dict(recipe or {})
    chosen = methods_of(methods, base)
    cfg = _training({**TRAINING, **(training or {})})
    corpus = world_models.corpus(world, images)
    where = usable_device(device)
    begun = begin(out, world.name, settings, device=where, corpus=_digest(corpus), say=say)
    folders, void = world_models.models(
        out / "models", world, corpus, cfg, replicates, attempts, where, Progress(say)
    )
    intro = intro.rstrip() + _of_void(void)
    asked = questions(world, corpus, pictures)
    metrics = {question.concept: "precision_at_10" for question in asked}
    by_chance = chance(asked, metrics)
    record.follow(begun, metrics, intro=intro, chance=by_chance)
    tables = []
    for replicate, folder in folders.items():
        model = Model.from_pretrained(folder, device=str(where), dtype=dtype)
        seen = _as_seen(world, model, corpus)
        study = Study(
            name=world.name,
            model=model,
            corpus=seen,
            questions=in_company(asked, seen),
            seeds=seeds,
            batch=batch,
            replicate=replicate,
            steps=cfg.sampling_steps,  # drawn as at the gate
            guidance=cfg.guidance,
        )
        tables.append(measure(study, chosen, say, parts=begun.parts))
        if controls:
            control, untaught = _control(world, folder, study, controls, base, cfg)
            tables.append(measure(control, untaught, say, baselines={}, parts=begun.parts))
        if replicate == min(folders):
            _top10(study, tables[0], corpus, out / "top10.png")
    table = pa.concat_tables(tables)
    record.write(begun, table, metrics, intro=intro, chance=by_chance)
    begun.finish()
    return table


def _of_void(records: Mapping[int, Mapping[str, Any]]) -> str:
    """The models that failed the gate, for the record's introduction; nothing of none."""
    told = [
        f"seed {seed} ({gate['asked']!r} recognised in {gate['joint_rate']:.2f} of its pictures)"
        for seed, gate in records.items()
    ]
    return f"\n\nVoid, as they failed the gate: models of {', '.join(told)}." if told else ""


def _digest(corpus: Pictures) -> str:
    shown = [image.numpy().tobytes() for image in corpus.images]
    return digest(pa.table({"key": corpus.keys, "image": shown, "values": corpus.values}))


def _as_seen(world: World, model: Model, corpus: Pictures) -> Corpus:
    """The training images in the model's latents, with their full captions."""
    x_0 = torch.cat([model.encode_images(part) for part in corpus.images.split(256)])
    captions = tuple(world.caption(values) for values in corpus.values)
    return Corpus(x_0, captions, corpus.keys)


def _control(
    world: World,
    folder: Path,
    study: Study,
    methods: Sequence[str],
    base: Recipe,
    cfg: Settings,
) -> tuple[Study, list[Configuration]]:
    """The questions about the same pictures to a model that was taught nothing, and methods."""
    pipe = world_models.untrained(world, folder, replace(cfg, seed=study.replicate))
    dtype = next(name for name, kind in DTYPES.items() if kind is study.model.dtype)
    model = Model.from_pipeline(pipe, device=str(study.model.device), dtype=dtype)
    first = study.pictures.view(len(study.asked), study.seeds, *study.pictures.shape[1:])[:, 0]
    given = {picture: x_0 for (picture, _), x_0 in zip(study.asked, first, strict=True)}
    control = replace(study, model=model, given=given)
    asked = [replace(c, name=f"{c.name}, untrained model") for c in methods_of(methods, base)]
    return control, asked


def _training(values: Mapping[str, Any]) -> Settings:
    known = [field.name for field in fields(Settings)]
    if unknown := sorted(set(values) - set(known)):
        raise BenchmarkError(
            f"training has no setting {unknown[0]!r}; choose from {', '.join(known)}"
        )
    return Settings(**values)


def _top10(study: Study, table: pa.Table, corpus: Pictures, path: Path) -> None:
    """What each method finds for the first picture, with the lambda that it chooses itself."""
    picture, _ = study.asked[0]
    rows = [
        row
        for row in table.to_pylist()
        if row["picture"] == picture and row["label_free"] and row["method"] not in BASELINES
    ]
    rows.sort(key=lambda row: row["question"])  # stable: methods in their order
    record.grid(record.top_ten(study, rows, lambda i: _image(corpus.images[i])), path)


def _image(pixels: torch.Tensor) -> Image.Image:
    array = pixels.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)
