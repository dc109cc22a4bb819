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
method that does no better than that has found membership, not influence. "asked captions first"
removes, of the carriers, those under the captions that are asked with first: a method that does no
better than that owes its effect to taking all of a few captions' pictures, not to which they are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import nn

from headwater.attribution import Model, Recipe
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.further import in_company
from headwater.benchmarks.latent_classifier import LatentClassifier, labels_of, trained_classifier
from headwater.benchmarks.material import Pictures, base_model, evenly, joined, material_of
from headwater.benchmarks.measure import BASELINES, answerable
from headwater.benchmarks.methods import chosen as methods_of
from headwater.benchmarks.parts import Parts
from headwater.benchmarks.presence import Sampling, losses, presence, probe_of
from headwater.benchmarks.removal_record import ASKED_FIRST, CARRIERS, SCHEMA, write
from headwater.benchmarks.retraining import Job, Say, Training, saved_model, train
from headwater.benchmarks.runs import begin, given
from headwater.benchmarks.study import Configuration, Question, Study, answer

Scoring = Callable[[], npt.NDArray[np.float64]]  # scores [N, Q]
METHODS = (
    "trak",
    "d-trak",
    "das",
    "concept-trak",
    "headwater",
    "headwater-ip",
    "headwater-effect",
    "headwater-image",
    "headwater-probe",
)
GATE = 0.9  # of the classifier, on pictures that it was not trained on
SMALL = {  # a version for two cores and some minutes
    "per_pair": 6,
    "unseen": 400,
    "concepts": 1,
    "fractions": (0.1,),
    "seeds": 2,
    "query_seeds": 4,
    "captions": 20,
    "draws": 2,
    "sampling_steps": 10,
    "loss_pictures": 40,
    "noises": 4,
    "widths": (16, 32),
    "steps": 400,
    "batch": 16,
    "dim": 1024,
    "classifier_steps": 400,
}


@dataclass(frozen=True)
class Removal:
    """Pictures to leave out of a training."""

    seed: int  # of the training
    method: str
    kind: str
    label: str
    fraction: float
    rows: npt.NDArray[np.int64]

    @property
    def key(self) -> tuple[int, bytes]:
        """What two removals share after which the same model is trained."""
        return self.seed, np.sort(self.rows).tobytes()

    def job(self, count: int) -> Job:
        """The training on the rest of `count` pictures."""
        return Job(torch.from_numpy(np.setdiff1d(np.arange(count), self.rows)), self.seed)

    def carriers(self, trained: Pictures) -> float:
        """Share of the concept's pictures that are removed."""
        shows = trained.carriers(self.kind, self.label)
        return float(shows[self.rows].sum() / shows.sum())


def run(
    out: Path,
    *,
    corpus: str | None = None,
    model: str | None = None,
    styles: Sequence[str] = ("noto", "openmoji-black", "fluent-3d", "fluent-flat"),
    names: int = 0,
    per_pair: int = 20,
    unseen: int = 1600,
    pixels: int = 32,
    kinds: Sequence[str] = ("object", "studio"),
    concepts: int = 2,
    fractions: Sequence[float] = (0.05, 0.1, 0.2),
    seeds: int = 3,
    first_seed: int = 0,
    contexts: int = 3,
    query_seeds: int = 8,
    captions: int = 40,
    draws: int = 8,
    sampling_steps: int = 25,
    guidance: float = 7.5,
    loss_pictures: int = 160,
    noises: int = 10,
    widths: Sequence[int] = (32, 64),
    steps: int = 3000,
    batch: int = 32,
    learning_rate: float = 2e-3,
    methods: Sequence[str] = METHODS,
    parameters: str = "auto",
    dim: int = 2048,
    classifier_steps: int = 1500,
    at_once: int = 192,
    device: str = "auto",
    say: Say = print,
) -> pa.Table:
    """The whole benchmark; the record is left in `out`.

    Args:
        out: folder of the record and of the models trained on everything.
        corpus: folder of the emoji corpus, with its `model`; none: the demo's drawings.
        model: pipeline that lends autoencoder and text encoder; the demo's if none is named.
        styles: of the emoji corpus, and `names` (0: all) that they share.
        per_pair: drawings to train on, of each object and studio.
        unseen: pictures that no model sees: half teach the classifier too, half try it.
        pixels: side of the pictures; 64 makes four times the work of 32.
        kinds: of concepts; of the emoji only "style" has carriers enough.
        concepts: of each kind, evenly taken.
        fractions: of the corpus that are removed.
        seeds: trainings; each has a model trained on everything, which is attributed.
        first_seed: of them; the others follow it, so that a later run can add to a record.
        contexts: captions with the concept that a method is asked about, averaged.
        query_seeds: pictures drawn for each of them.
        captions: that every retrained model draws, evenly taken, with `draws` pictures of each.
        sampling_steps: of these drawings, and their `guidance`.
        loss_pictures: of the unseen whose loss is taken, each at `noises` noise levels.
        noises: see there.
        widths: see `Training`; so `steps`, `batch` and `learning_rate`.
        methods: names in the table of methods; none: all.
        parameters: see `Recipe`; so `dim`.
        classifier_steps: of the classifier's training.
        at_once: models trained together.
        device: a torch device, or auto.
        say: told of progress.

    Raises:
        BenchmarkError: the classifier is not good enough to be a judge; an unknown method or kind
            of concept; too few captions or unseen pictures to measure every label on.
    """
    settings = given(locals())
    named = methods_of(methods, Recipe(parameters=parameters, dim=dim))
    training = Training(tuple(widths), steps, batch, learning_rate)
    base = base_model(model, device, corpus)
    material = material_of(
        base, corpus, styles=styles, names=names, per_pair=per_pair, unseen=unseen, pixels=pixels
    )
    trained, lessons = material.trained, material.lessons(base)
    begun = begin(out, "counterfactual", settings, model=base, corpus=material.digest, say=say)
    judge, accuracy = kept_judge(begun.parts, trained, material.unseen, kinds, classifier_steps)
    say(f"{len(trained)} pictures; the classifier is right on {accuracy} of unseen ones")
    sampling = Sampling(captions, draws, sampling_steps, guidance)
    some = np.random.default_rng(0).permutation(len(material.unseen))[:loss_pictures]
    lost = material.unseen.rows(some.tolist())
    probe = probe_of(base, judge, trained, lost, sampling, noises)
    chosen = range(first_seed, first_seed + seeds)
    folders = {seed: out / "models" / f"replicate-{seed}" for seed in chosen}

    def knowledge(stacked: nn.Module) -> pa.Table:
        known = presence(probe, stacked), losses(probe, stacked)
        return pa.table(dict(zip(("presence", "loss"), (k.tolist() for k in known), strict=True)))

    def whole() -> pa.Table:
        everything = [Job(torch.arange(len(trained)), seed) for seed in folders]
        stacked = train(base, lessons, everything, training, at_once=at_once, say=say)
        for place, folder in enumerate(folders.values()):
            saved_model(base, stacked, place, training, folder)
        return knowledge(stacked)

    def rankings(study: Study, method: str, make: Scoring) -> pa.Table:
        of_method = removed(study, trained, method, make(), fractions)
        return pa.Table.from_pylist([asdict(removal) for removal in of_method])

    # Kept when the models are: whoever goes on need not train again.
    before = dict(zip(folders, begun.parts.once(whole, "before").to_pylist(), strict=True))
    removals: list[Removal] = []
    for seed, folder in folders.items():
        attributed = Model.from_pretrained(folder, device=str(base.device), dtype="float32")
        study = study_of(attributed, trained, kinds, concepts, contexts, query_seeds, seed)
        for method, make in scores_of(study, named, say):
            ranked = partial(rankings, study, method, make)
            rows = begun.parts.once(ranked, "removals", seed, method).to_pylist()
            mine = [Removal(**row | {"rows": np.array(row["rows"], int)}) for row in rows]
            removals += mine
            say(f"seed {seed}, {method}: {told(mine, trained)}")
    # Methods may remove the same.
    different = {removal.key: removal.job(len(trained)) for removal in removals}
    jobs = list(different.values())
    say(f"{len(removals)} removals, {len(jobs)} different ones to retrain after")
    after: list[dict[str, list[float]]] = []
    for start in range(0, len(jobs), at_once):  # the models themselves are not kept

        def retrained(part: Sequence[Job] = jobs[start : start + at_once]) -> pa.Table:
            return knowledge(train(base, lessons, part, training, at_once=at_once, say=say))

        which = hashlib.sha256(repr(list(different)[start : start + at_once]).encode()).hexdigest()
        after += begun.parts.once(retrained, "after", start, which).to_pylist()
    place = {key: number for number, key in enumerate(different)}
    records = [
        {
            "replicate": removal.seed,
            "method": removal.method,
            "concept": removal.kind,
            "picture": removal.label,
            "fraction": removal.fraction,
            "removed": len(removal.rows),
            "carriers_removed": removal.carriers(trained),
            **effects(
                judge.named.index((removal.kind, removal.label)),
                before[removal.seed],
                after[place[removal.key]],
            ),
        }
        for removal in removals
    ]
    table = pa.Table.from_pylist(records, schema=SCHEMA)
    write(begun, table, accuracy)
    begun.finish(classifier=accuracy)
    return table


def kept_judge(
    parts: Parts, trained: Pictures, unseen: Pictures, kinds: Sequence[str], steps: int
) -> tuple[LatentClassifier, dict[str, float]]:
    """`judged`, or the classifier that judged before: all of a run's models have the same."""
    if (kept := parts.done("judge")) is None:
        judge, accuracy = judged(trained, unseen, kinds, steps)
        state = io.BytesIO()
        torch.save(judge.state_dict(), state)
        parts.keep(pa.table({"state": [state.getvalue()], "accuracy": [accuracy]}), "judge")
        return judge, accuracy
    (row,) = kept.to_pylist()
    known = LatentClassifier(trained.x_0.shape[1], labels_of(trained, kinds))
    known.load_state_dict(torch.load(io.BytesIO(row["state"]), weights_only=True))
    return known.to(trained.x_0.device).requires_grad_(False).eval(), row["accuracy"]


def judged(
    trained: Pictures, unseen: Pictures, kinds: Sequence[str], steps: int
) -> tuple[LatentClassifier, dict[str, float]]:
    """A classifier of real pictures, and how often it is right on the unseen half of the unseen.

    Raises:
        BenchmarkError: less often than `GATE`, or a kind of concept that the pictures have not.
    """
    if unknown := sorted(set(kinds) - set(trained.labels)):
        raise BenchmarkError(
            f"the pictures have no {', '.join(unknown)}; their kinds are "
            f"{', '.join(sorted(trained.labels))}"
        )
    half = len(unseen) // 2
    apart = unseen.rows(range(half, len(unseen)))
    known = joined(trained, unseen.rows(range(half)))
    judge, accuracy = trained_classifier(known, apart, kinds, steps)
    if min(accuracy.values()) < GATE:
        raise BenchmarkError(
            f"the classifier is right on {accuracy} of unseen pictures, less than {GATE}: it "
            "judges nothing; give it more classifier_steps or more unseen pictures"
        )
    return judge, accuracy


def study_of(
    attributed: Model,
    trained: Pictures,
    kinds: Sequence[str],
    concepts: int,
    contexts: int,
    seeds: int,
    replicate: int,
) -> Study:
    """Questions about `concepts` of each kind, each in `contexts` captions that name it."""
    questions = []
    for kind in kinds:
        labels = sorted(set(trained.labels[kind]))
        for label in (labels[i] for i in evenly(range(len(labels)), concepts)):
            truth = trained.carriers(kind, label)
            first = {trained.captions[i]: i for i in reversed(truth.nonzero()[0].tolist())}
            for i in evenly(sorted(first.values()), contexts):
                questions.append(
                    Question(
                        f"{kind} {label}",
                        trained.captions[i],
                        trained.lacking[kind][i],
                        trained.captions[i],
                        truth,
                        trained.alone(kind)[i],
                    )
                )
    return Study(
        "counterfactual",
        attributed,
        trained.corpus,
        in_company(questions, trained.corpus),
        seeds=seeds,
        batch=256,
        replicate=replicate,
    )


def scores_of(
    study: Study, methods: Sequence[Configuration], say: Say
) -> Iterator[tuple[str, Scoring]]:
    """Every baseline and method with what gives its scores, at a query's own damping."""
    for name, baseline in BASELINES.items():
        if not name.startswith("ceiling"):
            yield name, partial(baseline, study)
    truth = np.stack([question.truth for question in study.questions], 1).astype(float)
    yield CARRIERS, lambda: truth
    captions = np.array(study.corpus.captions)
    asked = np.stack([captions == question.prompt for question in study.questions], 1)
    yield ASKED_FIRST, lambda: truth * (1 + asked)
    for configuration in answerable(study, methods, say):

        def scores(configuration: Configuration = configuration) -> npt.NDArray[np.float64]:
            return answer(study, configuration).scores().double().cpu().numpy()

        yield configuration.name, scores


def removed(
    study: Study,
    trained: Pictures,
    method: str,
    scores: npt.NDArray[np.float64],
    fractions: Sequence[float],
) -> list[Removal]:
    """The first of each ranking; scores [N, Q] are averaged over a concept's questions."""
    found = []
    for number, concept in enumerate(dict.fromkeys(q.concept for q in study.questions)):
        mine = [i for i, question in enumerate(study.questions) if question.concept == concept]
        kind, label = concept.split(" ", 1)
        # Equal scores, as captions' and carriers' are, come in a drawn order.
        generator = np.random.default_rng([study.replicate, number])
        order = np.lexsort((generator.random(len(scores)), -scores[:, mine].mean(1)))
        for fraction in fractions:
            rows = order[: round(fraction * len(trained))]
            found.append(Removal(study.replicate, method, kind, label, fraction, rows))
    return found


def effects(
    place: int, before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """What was lost: presence and loss, each [L], of the concept at `place` and of all others."""
    drops = np.array(before["presence"]) - np.array(after["presence"])
    rises = np.array(after["loss"]) - np.array(before["loss"])
    others = np.arange(len(drops)) != place
    return {
        "presence": float(after["presence"][place]),
        "drop": float(drops[place]),
        "collateral": float(drops[others].mean()),
        "loss_rise": float(rises[place]),
        "loss_collateral": float(rises[others].mean()),
    }


def told(removals: Sequence[Removal], trained: Pictures) -> str:
    """The shares of carriers that removals take away, for a line of progress."""
    shares: dict[float, list[float]] = {}
    for removal in removals:
        shares.setdefault(removal.fraction, []).append(removal.carriers(trained))
    means = [f"{fraction:g}: {np.mean(of):.2f}" for fraction, of in shares.items()]
    return f"share of carriers removed {', '.join(means)}"
