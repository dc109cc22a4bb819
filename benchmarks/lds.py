"""Linear datamodelling score: do a method's scores foresee what retraining without pictures does?

Models are retrained on random halves of the pictures. For a picture asked about, a method's
scores of a half's members, added up, foresee a utility of the model retrained on that half; the
score of the method is their rank correlation over the halves (Park et al. 2023, TRAK; Zheng et al.
2024, D-TRAK). Utilities, each the higher the better the model knows what is asked:

loss        minus the denoising loss of the picture, averaged over noise levels
a concept   how far the retrained model's error goes the way in which the concept's words move the
            attributed model's prediction: the loss projected on Concept-TRAK's slider

Pictures asked about are unseen ones of the corpus's kind, and pictures that the attributed model
drew. Training seeds are averaged per half; the row "another training" says how well the utility of
one seed foresees that of the others, which no method can be expected to exceed by far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from headwater.attribution import Model, Recipe
from headwater.benchmarks import record
from headwater.benchmarks.correlation import scored
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.further import in_company
from headwater.benchmarks.material import Material, Pictures, base_model, evenly, material_of
from headwater.benchmarks.methods import chosen as methods_of
from headwater.benchmarks.noised import Noised, heard, noised, predicted
from headwater.benchmarks.retraining import Job, Say, Training, saved_model, text_states, train
from headwater.benchmarks.runs import begin, given
from headwater.benchmarks.stacked import chosen
from headwater.benchmarks.study import Configuration, Question, Study

LOSS = "loss"
UTILITY = "measured utility"
WHERE = ("validation", "generated")  # pictures kept apart, and drawn by the attributed model
FULL_SEED = 1000  # of the first model trained on everything: not one of the retrained models'
SMALL = {  # a version for two cores and some minutes
    "per_pair": 6,
    "subsets": 16,
    "seeds": 1,
    "replicates": 1,
    "questions": 12,
    "noises": 10,
    "widths": (16, 32),
    "steps": 400,
    "batch": 16,
    "dim": 1024,
    "query_seeds": 2,
}


@dataclass(frozen=True)
class Asked:
    """Pictures asked about, P of them."""

    pictures: Pictures
    where: tuple[str, ...]  # [P] validation or generated
    noised: Noised  # what their utility is measured on


def run(
    out: Path,
    *,
    corpus: str | None = None,
    model: str | None = None,
    styles: Sequence[str] = ("noto", "openmoji-black"),
    names: int = 0,
    per_pair: int = 20,
    pixels: int = 32,
    subsets: int = 64,
    seeds: int = 3,
    replicates: int = 3,
    questions: int = 24,
    noises: int = 50,
    widths: Sequence[int] = (32, 64),
    steps: int = 4000,
    batch: int = 32,
    learning_rate: float = 2e-3,
    methods: Sequence[str] = (),
    parameters: str = "auto",
    dim: int = 2048,
    query_seeds: int = 4,
    guidance: float = 7.5,
    at_once: int = 200,
    device: str = "auto",
    say: Say = print,
) -> pa.Table:
    """The whole benchmark; the record is left in `out`.

    Args:
        out: folder of the record, of the attributed models and of the utilities measured
            (utilities.parquet: a row for each replicate and question, halves x seeds).
        corpus: folder of the emoji corpus, with its `model`; none: the demo's drawings.
        model: pipeline that lends autoencoder and text encoder; the demo's if none is named.
        styles: of the emoji corpus, and `names` (0: all) that they share.
        per_pair: drawings of each object and studio.
        pixels: side of the pictures; 64 makes four times the work of 32.
        subsets: random halves of the pictures; a model is retrained on each, for each of `seeds`.
        replicates: attributed models, each trained on all pictures with another seed.
        questions: unseen pictures asked about, and as many that the attributed model draws.
        noises: noise levels, with a draw each, that a picture's utility is averaged over.
        widths, steps, batch, learning_rate: see `Training`.
        methods: names in the table of methods; none: all.
        parameters: weights whose gradients are taken; see `Recipe`.
        dim: width of a row.
        query_seeds: noise draws over each picture asked about.
        guidance: of the pictures that the attributed model draws.
        at_once: models trained together.
        device: a torch device, or auto.
        say: told of progress.

    Raises:
        BenchmarkError: an unknown method, or fewer than three subsets.
    """
    if subsets < 3:
        raise BenchmarkError(f"{subsets} subsets have no ranks to speak of; give 16 or more")
    settings = given(locals())
    named = with_images(methods_of(methods, Recipe(parameters=parameters, dim=dim)))
    base = base_model(model, device, corpus)
    material = material_of(
        base, corpus, styles=styles, names=names, per_pair=per_pair, unseen=questions, pixels=pixels
    )
    training = Training(tuple(widths), steps, batch, learning_rate)
    count = len(material.trained)
    halves = random_halves(count, subsets)
    jobs = [Job(torch.from_numpy(half.nonzero()[0]), s) for half in halves for s in range(seeds)]
    jobs += [Job(torch.arange(count), FULL_SEED + replicate) for replicate in range(replicates)]
    begun = begin(out, "lds", settings, model=base, corpus=material.digest, say=say)
    say(f"{count} pictures, {len(material.unseen)} unseen, {len(jobs)} models to train")

    def asked_of(attributed: Model) -> Asked:
        return asked_about(attributed, material, questions, noises, guidance)

    folders = [out / "models" / f"replicate-{replicate}" for replicate in range(replicates)]
    if not all(begun.parts.done(UTILITY, place) for place in range(replicates)):
        stacked = train(base, material.lessons(base), jobs, training, at_once=at_once, say=say)
        retrained = chosen(stacked, range(subsets * seeds))
        for replicate, folder in enumerate(folders):
            attributed = saved_model(base, stacked, subsets * seeds + replicate, training, folder)
            utility = utilities(base, retrained, attributed, asked_of(attributed))  # [Q, K seeds]
            # Kept when its model is: whoever goes on need not train again.
            listed = pa.table({"utility": utility.tolist()})
            begun.parts.keep(listed, UTILITY, replicate)
    kinds = (LOSS, *sorted(material.unseen.lacking))
    concepts = {f"{kind}, {where}": "lds" for kind in kinds for where in WHERE}
    intro = partial(_INTRO.format, pictures=count, models=len(jobs), **settings)
    record.follow(begun, concepts, intro=intro(bars=""))
    tables, utilities_kept = [], []
    for replicate, folder in enumerate(folders):
        attributed = Model.from_pretrained(folder, device=str(base.device), dtype="float32")
        study = study_of(attributed, material, asked_of(attributed), query_seeds, replicate)
        kept = begun.parts.done(UTILITY, replicate)
        assert kept is not None  # by an earlier run or above
        utilities_kept.append(kept.append_column("replicate", pa.repeat(replicate, len(kept))))
        known = np.array(kept["utility"].to_pylist())
        measured = known.reshape(len(known), subsets, seeds)
        tables.append(scored(study, measured, halves, named, say, begun.parts))
    table = pa.concat_tables(tables)
    record.write(begun, table, concepts, intro=intro(bars=bars(table.to_pylist())))
    # With the models, all that it takes to try another method on the same retrainings.
    pq.write_table(pa.concat_tables(utilities_kept), out / "utilities.parquet")
    begun.finish()
    return table


_INTRO = """
Rank correlation (Spearman) of predicted and true utility over {subsets} random halves of {pictures}
pictures, {seeds} training seeds averaged for each half; {models} models in all, {replicates} of
them trained on everything and attributed. `benchmarks/lds.py` says what the utilities are. Names
that end in "(image)" ask with the whole picture where the method itself asks with a concept. The
intervals hold the chance of pictures and attributed models, not that of the halves, which all
questions share.

{bars}
"""
OURS, RIVAL = ("headwater-image", "headwater-probe", "headwater"), "d-trak"


def bars(records: Sequence[Mapping[str, Any]]) -> str:
    """Ours against D-TRAK, label-free, a line for each concept; empty without both."""
    means: dict[tuple[str, str], list[float]] = {}
    for row in records:
        if row["label_free"]:
            means.setdefault((row["concept"], row["method"]), []).append(row["lds"])
    lines = []
    for concept in dict.fromkeys(concept for concept, _ in means):
        if (concept, RIVAL) not in means:
            continue
        theirs = float(np.mean(means[concept, RIVAL]))
        told = [f"{RIVAL} {theirs:.3f}"]
        for ours in OURS:
            if (concept, ours) in means:
                mine = float(np.mean(means[concept, ours]))
                times = f" ({mine / theirs:.2f} times)" if theirs > 0 else ""
                told.append(f"{ours} {mine:.3f}{times}")
        if len(told) > 1:
            lines.append(f"- {concept}: {', '.join(told)}")
    return "\n".join(lines)


def random_halves(count: int, subsets: int) -> npt.NDArray[np.bool_]:
    """Which pictures each subset holds, [K, N]: half of them, drawn without regard to labels."""
    generator = np.random.default_rng(0)
    halves = np.zeros((subsets, count), dtype=bool)
    for half in halves:
        half[generator.permutation(count)[: count // 2]] = True
    return halves


def with_images(methods: Sequence[Configuration]) -> list[Configuration]:
    """The methods, and those that ask about a concept once more, asking with the whole picture."""
    found = []
    for method in methods:
        found.append(method)
        image = replace(method, name=f"{method.name} (image)", query="image")
        known = {(other.recipe, other.similarity) for other in found if other.query == "image"}
        if method.query != "image" and (method.recipe, method.similarity) not in known:
            found.append(image)
    return found


def asked_about(
    attributed: Model, material: Material, questions: int, noises: int, guidance: float
) -> Asked:
    """Unseen pictures, evenly taken, and as many that the model draws for their captions."""
    unseen = material.unseen
    few = unseen.rows(evenly(range(len(unseen)), questions))
    nothing = np.zeros(len(material.trained), dtype=bool)
    wanted = tuple(
        Question(LOSS, caption, "", key, nothing)
        for caption, key in zip(few.captions, few.keys, strict=True)
    )
    corpus = material.trained.corpus
    drawn = Study("drawn", attributed, corpus, wanted, seeds=1, guidance=guidance).pictures
    pictures = Pictures(
        torch.cat([few.x_0, drawn]),
        few.captions * 2,
        (*few.keys, *(f"{key} drawn" for key in few.keys)),
        {kind: labels * 2 for kind, labels in few.labels.items()},
        {kind: lines * 2 for kind, lines in few.lacking.items()},
    )
    where = tuple(place for place in WHERE for _ in range(len(few)))
    return Asked(pictures, where, noised(attributed, pictures, noises))


def study_of(
    attributed: Model, material: Material, asked: Asked, seeds: int, replicate: int
) -> Study:
    """A question for each utility and picture: `loss` first, then each kind of concept."""
    pictures = asked.pictures
    questions = []
    for kind in (LOSS, *sorted(pictures.lacking)):
        for place, (caption, key) in enumerate(zip(pictures.captions, pictures.keys, strict=True)):
            # The whole caption against nothing, when it is about the whole picture.
            contrast, alone = "", caption
            truth = np.zeros(len(material.trained), dtype=bool)
            if kind != LOSS:
                contrast, alone = pictures.lacking[kind][place], pictures.alone(kind)[place]
                truth = material.trained.carriers(kind, pictures.labels[kind][place])
            concept = f"{kind}, {asked.where[place]}"
            questions.append(Question(concept, caption, contrast, key, truth, alone))
    return Study(
        "lds",
        attributed,
        material.trained.corpus,
        in_company(questions, material.trained.corpus),
        seeds=seeds,
        batch=256,
        given=dict(zip(pictures.keys, pictures.x_0, strict=True)),
        replicate=replicate,
    )


def utilities(base: Model, retrained: nn.Module, attributed: Model, asked: Asked) -> Tensor:
    """How well each of M stacked models knows what each question asks, [Q, M] float64.

    Questions are in the order of `study_of`. With r = e(x_t, c) - eps of the retrained model and
    g = e(x_t, c) - e(x_t, c-) of the attributed one, each over all levels together, the loss's
    utility is -|r|^2 / n and a concept's is r . g / |g|: levels at which words say little count
    little. A model that predicts e(x_t, c-), deaf to the concept's words, has |g| less of it than
    the attributed model.
    """
    pictures, kinds = asked.pictures, sorted(asked.pictures.lacking)
    models = len(next(retrained.parameters()))
    shape = (1 + len(kinds), len(pictures), models)
    total = torch.zeros(shape, dtype=torch.float64, device=base.device)
    energy = torch.zeros(len(kinds), len(pictures), 1, dtype=torch.float64, device=base.device)
    lacking = [text_states(base, pictures.lacking[kind]) for kind in kinds]
    for batch in predicted(base, retrained, asked.noised):
        p = batch.picture
        total[0].index_add_(0, p, -batch.residual.square().mean(2).double())
        full = attributed.noise(batch.x_t, batch.t, heard(asked.noised.states[p]))
        for place, states in enumerate(lacking):
            without = attributed.noise(batch.x_t, batch.t, heard(states[p]))
            along = (full - without).flatten(1)[..., None]  # [b, n, 1]
            total[1 + place].index_add_(0, p, (batch.residual @ along)[..., 0].double())
            energy[place].index_add_(0, p, along.square().sum(1).double())
    total[0] /= len(asked.noised.t)
    total[1:] /= energy.sqrt()
    return total.flatten(0, 1)
