"""Counterfactual removal: does a model retrained without a method's top pictures lose the concept?

Models are trained on everything, each method ranks the pictures for a concept, the first 5, 10 and
20 % of the corpus are left out, and a model of the same seed is trained on the rest. It draws the
same captions from the same noise as the first; a classifier trained on real pictures says how much
of each concept is left. Removals are a share of the corpus, not of the carriers: every method takes
away as many pictures, enough for an effect, and one that ranks others above carriers pays for it.

drop             of the concept in drawn pictures: in the probability that the classifier gives it
collateral       the mean drop of all other concepts, which should stay
loss_rise        of the denoising loss on unseen pictures of the concept
loss_collateral  the same on pictures of all other concepts

"random" removes any pictures, "random carriers" those of the concept first, which takes labels: a
method that does no better than that has found membership, not influence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from headwater.attribution import Model, Recipe, ddim_grid, generation_path, kept, seeded_noise
from headwater.benchmarks.attributed import answers_of, heard, on_levels, saved_model
from headwater.benchmarks.latent_classifier import LatentClassifier, trained_classifier
from headwater.benchmarks.material import Pictures, base_model, drawings, emoji
from headwater.benchmarks.measure import BASELINES
from headwater.benchmarks.methods import configurations
from headwater.benchmarks.removal_record import SCHEMA, write
from headwater.benchmarks.retraining import Job, Say, Training, text_states, train, with_denoiser
from headwater.benchmarks.study import Question, Study

CARRIERS = "random carriers"
GATE = 0.9  # of the classifier, on pictures that it was not trained on
_SAMPLES = 4096  # through all models of a stack at once


@dataclass(frozen=True)
class Removal:
    """Pictures to leave out of a training."""

    seed: int  # of the training
    method: str
    kind: str
    label: str
    fraction: float
    removed: npt.NDArray[np.int64]


def run(
    out: Path,
    *,
    corpus: str | None = None,
    model: str | None = None,
    styles: Sequence[str] = ("noto", "openmoji-black", "fluent-3d", "fluent-flat"),
    names: int = 0,
    per_pair: int = 20,
    unseen: int = 1600,
    pixels: int = 64,
    kinds: Sequence[str] = ("object", "studio"),
    concepts: int = 2,
    fractions: Sequence[float] = (0.05, 0.1, 0.2),
    seeds: int = 3,
    contexts: int = 3,
    query_seeds: int = 8,
    captions: int = 40,
    draws: int = 4,
    sampling_steps: int = 25,
    guidance: float = 4.0,
    noises: int = 10,
    widths: Sequence[int] = (32, 64),
    steps: int = 2000,
    batch: int = 32,
    learning_rate: float = 2e-3,
    methods: Sequence[str] = (),
    parameters: str = "auto",
    dim: int = 2048,
    classifier_steps: int = 1500,
    at_once: int = 256,
    device: str = "auto",
    say: Say = print,
) -> pa.Table:
    """The whole benchmark; the record is left in `out`.

    Args:
        out: folder of the record and of the models trained on everything.
        corpus: Parquet file of the emoji corpus, with its `model`; else the demo's drawings.
        model: pipeline that lends autoencoder and text encoder; the demo's if none is named.
        styles: of the emoji corpus, and `names` (0: all) that they share.
        per_pair: drawings to train on, of each object and studio.
        unseen: pictures that no model sees, for the classifier and the loss.
        pixels: side of the pictures; 32 makes a quarter of the work of 64.
        kinds: of concepts; of the emoji only "style" has carriers enough.
        concepts: of each kind, evenly taken.
        fractions: of the corpus that are removed.
        seeds: trainings; each has a model trained on everything, which is attributed.
        contexts: captions with the concept that a method is asked about, averaged.
        query_seeds: pictures drawn for each of them.
        captions: that every retrained model draws, evenly taken, with `draws` pictures of each.
        sampling_steps: of these drawings, and their `guidance`.
        noises: noise levels, with a draw each, that a picture's loss is averaged over.
        widths: see `Training`; so `steps`, `batch` and `learning_rate`.
        methods: names in the table of methods; none: all.
        parameters: see `Recipe`; so `dim`.
        classifier_steps: of the classifier's training.
        at_once: models trained together.
        device: a torch device, or auto.
        say: told of progress.

    Raises:
        ValueError: the classifier is not good enough to be a judge, or an unknown method.
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "say", "device")}
    named = chosen_methods(methods, Recipe(parameters=parameters, dim=dim))
    base = base_model(model, device)
    if corpus is None:
        material = drawings(base, per_pair=per_pair, unseen=unseen, pixels=pixels)
    else:
        material = emoji(
            base, Path(corpus), styles=styles, names=names, unseen=unseen, pixels=pixels
        )
    trained = material.trained
    judge, accuracy = judged(trained, material.unseen, kinds, classifier_steps)
    say(f"{len(trained)} pictures; the classifier is right on {accuracy} of unseen ones")
    lessons, training = material.lessons(base), Training(tuple(widths), steps, batch, learning_rate)
    everything = [Job(torch.arange(len(trained)), seed) for seed in range(seeds)]
    whole = train(base, lessons, everything, training, at_once=at_once, say=say)
    probe = Probe.of(
        base,
        judge,
        trained,
        material.unseen,
        captions=captions,
        draws=draws,
        sampling_steps=sampling_steps,
        guidance=guidance,
        noises=noises,
    )
    before = probe.measured(whole)
    removals: list[Removal] = []
    for seed in range(seeds):
        folder = out / "models" / f"replicate-{seed}"
        attributed = saved_model(base, whole, seed, training, trained.x_0.shape[-1], folder)
        study, aims = study_of(attributed, trained, kinds, concepts, contexts, query_seeds, seed)
        for method, scores in scores_of(study, named):
            for place, (kind, label) in enumerate(aims):
                mine = [q for q, of in enumerate(study.questions) if of.concept == f"{kind} {label}"]
                order = ranked(scores[:, mine].mean(1), [seed, place])
                removals += [
                    Removal(seed, method, kind, label, part, order[: round(part * len(trained))])
                    for part in fractions
                ]
            say(f"seed {seed}: {method} has ranked")
    say(f"{len(removals)} models to retrain")
    after = []
    for start in range(0, len(removals), at_once):  # the models themselves are not kept
        jobs = [left(len(trained), removal) for removal in removals[start : start + at_once]]
        stacked = train(base, lessons, jobs, training, at_once=at_once, say=say)
        after.append(probe.measured(stacked))
    presence, loss = (torch.cat(parts) for parts in zip(*after, strict=True))
    records = [
        probe.record(removal, trained, (before[0][removal.seed], before[1][removal.seed]), found)
        for removal, *found in zip(removals, presence, loss, strict=True)
    ]
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    write(out, settings, table, accuracy, base.device.type)
    return table


def chosen_methods(names: Sequence[str], recipe: Recipe) -> list[Any]:
    """The methods of these names; none: all.

    Raises:
        ValueError: a name that the table of methods does not have.
    """
    known = configurations(recipe)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no method {', '.join(unknown)}; choose from {', '.join(known)}")
    return [configuration for name, configuration in known.items() if not names or name in names]
