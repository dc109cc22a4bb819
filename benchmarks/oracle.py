"""Measures what a lambda of each question's own is worth: chosen by half of the labels.

    python -m headwater.benchmarks.oracle --corpus CORPUS_DIR --model MODEL_DIR --out emoji.md
    python -m headwater.benchmarks.oracle --lds RECORD_DIR --out lds.md

The column *oracle* of a record takes the best of twelve lambdas for each question by the labels
that it is then measured by. A part of what it has before one lambda for all is therefore luck, and
the rest is what somebody would gain who knew half of the answer. To tell them apart, labels are cut
in halves: a lambda is chosen by one and measured by the other, and the other way round. Rankings
are cut by image (each half of the corpus is ranked by itself), rank correlations with retrained
models by model. RECORD_DIR is that of a `headwater bench lds` whose models are still there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from headwater.attribution import Model, Recipe
from headwater.benchmarks import lds
from headwater.benchmarks.emoji import METRICS, make_study, read
from headwater.benchmarks.material import base_model, material_of
from headwater.benchmarks.measure import METRICS as COLUMNS
from headwater.benchmarks.measure import ranking_metrics, wanted
from headwater.benchmarks.methods import chosen
from headwater.benchmarks.ranks import lds as correlations
from headwater.benchmarks.runs import machine
from headwater.benchmarks.study import Answers, Study, answer
from headwater.benchmarks.summary import interval

Worths = npt.NDArray[np.float64]  # [S, 2, D, Q]: of a split's halves, a lambda and a question
SPLITS = 20
HEADER = (
    "| method | concept | label-free | one lambda for all | each question's own | less label-free, "
    "95 % | oracle |",
    "|---|---|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Chosen:
    """What each question is worth, [Q], measured by the half that did not choose."""

    label_free: npt.NDArray[np.float64]
    single: npt.NDArray[np.float64]  # the lambda that is best for all of them in the other half
    own: npt.NDArray[np.float64]  # the question's best in the other half
    oracle: npt.NDArray[np.float64]  # the question's best in the half that measures


def crossed(worths: Worths, free: int) -> Chosen:
    """Choose by one half and measure by the other, averaged over splits and over both ways.

    Args:
        worths: nan where a half has nothing to measure a question by; that split is left out.
        free: place of the label-free lambda. Of several best the nearest to it is taken.
    """
    near = np.abs(np.arange(worths.shape[2]) - free).argsort(kind="stable")
    columns = np.arange(worths.shape[3])
    found = []
    for by, measured in np.concatenate([worths, worths[:, ::-1]]):
        known = ~np.isnan(by + measured).any(0)
        own = near[np.nan_to_num(by)[near].argmax(0)]
        single = near[by[:, known].mean(1)[near].argmax()]
        kinds = measured[free], measured[single], measured[own, columns], measured.max(0)
        found.append(np.where(known, kinds, np.nan))
    return Chosen(*np.nanmean(found, 0))


def by_image(study: Study, answers: Answers, splits: int = SPLITS) -> Worths:
    """Recall or precision at 10 of each half of the corpus, cut at random."""
    generator = np.random.default_rng(0)
    half = np.arange(len(study.corpus)) % 2 == 0
    cuts = [generator.permutation(half) for _ in range(splits)]
    places = [COLUMNS.index(METRICS[question.concept]) for question in study.questions]
    dampings = wanted(answers)
    worths = np.empty((splits, 2, len(dampings), len(study.questions)))
    for d, damping in enumerate(dampings):
        scores = answers.scores(damping)
        order = scores.argsort(dim=0, descending=True, stable=True).cpu().numpy()
        for q, (question, place) in enumerate(zip(study.questions, places, strict=True)):
            ranked = question.truth[order[:, q]]
            for s, cut in enumerate(cuts):
                first = cut[order[:, q]]
                for side, there in enumerate((first, ~first)):
                    worths[s, side, d, q] = ranking_metrics(ranked[there])[place]
    return worths


def by_model(
    answers: Answers,
    halves: npt.NDArray[np.bool_],
    true: npt.NDArray[np.float64],
    splits: int = SPLITS,
) -> Worths:
    """Rank correlations over each half of the retrained models, cut at random.

    Args:
        answers: of the attributed model.
        halves: [K, N] what each model was trained on.
        true: [Q, K] utilities.
        splits: how often they are cut.
    """
    generator = np.random.default_rng(0)
    cuts = [np.array_split(generator.permutation(len(halves)), 2) for _ in range(splits)]
    scores = [answers.scores(d).double().cpu().numpy() for d in wanted(answers)]
    return np.array(
        [
            [[correlations(s, halves[part], true[:, part]) for s in scores] for part in cut]
            for cut in cuts
        ]
    )


def table(method: str, answered: Sequence[tuple[Study, Answers, Worths]]) -> list[str]:
    """A line for each concept, over all replicates."""
    lines = []
    rows: dict[str, list[dict[str, Any]]] = {}
    for study, answers, worths in answered:
        free = wanted(answers).index(answers.damping)
        concepts = np.array([question.concept for question in study.questions])
        for concept in dict.fromkeys(concepts.tolist()):
            mine = np.flatnonzero(concepts == concept)
            found = crossed(worths[..., mine], free)
            worth = vars(found) | {"gain": found.own - found.label_free}
            for place, q in enumerate(mine):
                row = {name: float(values[place]) for name, values in worth.items()}
                cell = {"replicate": study.replicate, "picture": study.questions[q].picture}
                rows.setdefault(concept, []).append(row | cell)
    for concept, of in rows.items():
        kinds = ("label_free", "single", "own", "oracle", "gain")
        free, single, own, oracle, gain = (np.nanmean([row[k] for row in of]) for k in kinds)
        low, high = interval(of, "gain")
        lines.append(
            f"| {method} | {concept} | {free:.3f} | {single:.3f} | {own:.3f} | {gain:+.3f} "
            f"({low:+.3f} to {high:+.3f}) | {oracle:.3f} |"
        )
        print(lines[-1], flush=True)
    return lines


def lds_studies(
    folder: Path, settings: Mapping[str, Any], device: str
) -> Iterator[tuple[Study, npt.NDArray[np.bool_], npt.NDArray[np.float64]]]:
    """Each attributed model of a record, what the retrained ones saw, and their utilities."""
    base = base_model(settings["model"], device, settings["corpus"])
    names = ("styles", "names", "per_pair", "pixels")
    material = material_of(
        base,
        settings["corpus"],
        unseen=settings["questions"],
        **{name: settings[name] for name in names},
    )
    halves = lds.random_halves(len(material.trained), settings["subsets"])
    kept = pq.read_table(folder / "utilities.parquet").to_pylist()
    for replicate in range(settings["replicates"]):
        model = Model.from_pretrained(
            folder / "models" / f"replicate-{replicate}", device=str(base.device), dtype="float32"
        )
        asked = lds.asked_about(
            model, material, settings["questions"], settings["noises"], settings["guidance"]
        )
        study = lds.study_of(model, material, asked, settings["query_seeds"], replicate)
        known = np.array([row["utility"] for row in kept if row["replicate"] == replicate])
        true = known.reshape(len(known), settings["subsets"], settings["seeds"]).mean(2)
        yield study, halves, true


def main() -> None:
    """Cut, choose and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", type=Path, help="folder of the emoji corpus")
    what.add_argument("--lds", type=Path, help="record of `headwater bench lds`, with its models")
    parser.add_argument("--model", type=Path, help="of the emoji corpus")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--pairs", type=int, default=53)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--methods", nargs="+", default=["headwater", "headwater-image", "d-trak"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.corpus and not args.model:
        parser.error("--corpus needs --model, the pipeline that was trained on it")
    lines = list(HEADER)
    if args.corpus:
        network = Model.from_pretrained(args.model, device=args.device)
        art, pairs = read(args.corpus, args.rows, args.pairs)
        study = make_study(network, art, pairs, seeds=args.seeds, batch=args.batch)
        for configuration in chosen(args.methods):
            answers = answer(study, configuration)
            lines += table(configuration.name, [(study, answers, by_image(study, answers))])
        device = network.device
    else:
        settings = json.loads((args.lds / "config.json").read_text())["settings"]
        recipe = Recipe(parameters=settings["parameters"], dim=settings["dim"])
        answered: dict[str, list[tuple[Study, Answers, Worths]]] = {}
        for study, halves, true in lds_studies(args.lds, settings, args.device):
            for configuration in chosen(args.methods, recipe):
                answers = answer(study, configuration)
                asked = study, answers, by_model(answers, halves, true)
                answered.setdefault(configuration.name, []).append(asked)
            device = study.model.device
        for method, of in answered.items():
            lines += table(method, of)
    lines += ["", f"On {machine(str(device))['machine']}, {SPLITS} splits."]
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
