"""Puts a study to methods and baselines: one row for each method, question and damping.

Every ranking of the corpus is measured by precision@10, recall@min(10, n) and average precision
against the carriers of the question's concept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from headwater.attribution import Curvature
from headwater.benchmarks.further import FURTHER
from headwater.benchmarks.parts import NOWHERE, Parts
from headwater.benchmarks.study import Answers, Configuration, Question, Say, Study, answer

TOP = 10
# lambda in units of the rows' mean squared length: half decades around the usual 1 to 10.
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
METRICS = ("precision_at_10", "recall_at_10", "average_precision")
SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("replicate", pa.int64()),
        ("method", pa.string()),
        ("question", pa.int64()),
        ("concept", pa.string()),
        ("picture", pa.string()),
        ("carriers", pa.int64()),
        ("damping", pa.float64()),  # null: the method has none
        ("effective", pa.float64()),  # dimension at it / min(rows, width); null: it has none
        ("label_free", pa.bool_()),  # the ranking that the method gives unasked
        *((name, pa.float64()) for name in METRICS),
        ("top", pa.list_(pa.string())),  # keys of the first ten; null beside the label-free one
        ("ingest_seconds", pa.float64()),  # of the whole corpus; null for baselines
        ("query_seconds", pa.float64()),  # of one question, without drawing its pictures
    ]
)

Baseline = Callable[[Study], npt.NDArray[np.float64]]  # scores [N, Q]


def measure(
    study: Study,
    configurations: Iterable[Configuration],
    say: Say,
    *,
    baselines: Mapping[str, Baseline] | None = None,
    dampings: Sequence[float] = DAMPINGS,
    seen: Callable[[Answers], object] = lambda answers: None,
    answering: Callable[[Study, Configuration], Answers] = answer,
    parts: Parts = NOWHERE,
) -> pa.Table:
    """Every method and baseline on one study, by `SCHEMA`.

    Each method is measured at every damping and at the one that it chooses without labels.
    `answering` makes a method's answers, where rows are not to be computed anew, and `seen` is
    called with them before they are let go. What is in `parts` is neither: it is taken from there,
    and what is measured is kept there, method by method.
    """
    tables = [SCHEMA.empty_table()]

    def add(name: str, make: Callable[[], list[dict[str, Any]]]) -> None:
        tables.append(part(study, name, make, parts, say))

    def of_baseline(name: str, scores_of: Baseline) -> list[dict[str, Any]]:
        return _records(study, name, torch.from_numpy(scores_of(study)), {"label_free": True})

    def of_method(configuration: Configuration) -> list[dict[str, Any]]:
        answers = answering(study, configuration)
        seen(answers)
        return measured(study, answers, dampings)

    for name, scores_of in (BASELINES if baselines is None else baselines).items():
        add(name, partial(of_baseline, name, scores_of))
    for configuration in answerable(study, configurations, say):
        add(configuration.name, partial(of_method, configuration))
    return pa.concat_tables(tables)


def part(
    study: Study, name: str, make: Callable[[], list[dict[str, Any]]], parts: Parts, say: Say
) -> pa.Table:
    """The rows of one method, by `SCHEMA`: kept before anything is said, or there already."""
    table = parts.once(
        lambda: pa.Table.from_pylist(make(), schema=SCHEMA), study.name, study.replicate, name
    )
    free = table.filter(table["label_free"]).to_pylist()
    if free:
        say(_line(study.name, free))
    return table


def answerable(
    study: Study, configurations: Iterable[Configuration], say: Say
) -> Iterator[Configuration]:
    """Those that the study's questions suffice for; says which do not."""
    for configuration in configurations:
        query = configuration.query
        if query in FURTHER and not all(q.further(query) for q in study.questions):
            name = f"{study.name} {configuration.name}"
            say(f"{name}: left out, not every question {FURTHER[query]}")
        else:
            yield configuration


class Scored(Protocol):
    """What can be measured: `Answers`, or several of them put together."""

    @property
    def configuration(self) -> Configuration: ...
    @property
    def curvature(self) -> Curvature | None: ...  # None: there are several
    @property
    def damping(self) -> float: ...
    @property
    def ingest_seconds(self) -> float: ...
    @property
    def query_seconds(self) -> float: ...
    def scores(self, damping: float | None = None) -> Tensor: ...


def measured(
    study: Study, answers: Scored, dampings: Sequence[float] = DAMPINGS
) -> list[dict[str, Any]]:
    """The rows of one method, by `SCHEMA`."""
    records: list[dict[str, Any]] = []
    seconds = {
        "ingest_seconds": answers.ingest_seconds,
        "query_seconds": answers.query_seconds / len(study.questions),
    }
    curvature = answers.curvature
    for damping in wanted(answers, dampings):
        facts = seconds | {
            "damping": damping,
            "effective": curvature.share(damping) if damping and curvature else None,
            "label_free": damping is None or damping == answers.damping,
        }
        records += _records(study, answers.configuration.name, answers.scores(damping), facts)
    return records


def wanted(answers: Scored, dampings: Sequence[float] = DAMPINGS) -> list[float | None]:
    """The dampings and the label-free one, ascending; None alone where none is used."""
    if answers.configuration.preconditioning == "none":
        return [None]
    return [*sorted({*dampings, answers.damping})]


def _line(study: str, records: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for concept in dict.fromkeys(record["concept"] for record in records):
        chosen = [r for r in records if r["concept"] == concept]
        means = [np.nanmean([r[metric] for r in chosen]) for metric in METRICS]
        parts.append(f"{concept} p@10 {means[0]:.3f} r@10 {means[1]:.3f} ap {means[2]:.3f}")
    damping = records[0].get("damping")
    told = "" if damping is None else f" (damping {damping:g})"
    return f"{study} {records[0]['method']}{told}: {'; '.join(parts)}"


def _records(
    study: Study, method: str, scores: Tensor, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    order = scores.argsort(dim=0, descending=True, stable=True).cpu().numpy()
    top = [[study.corpus.keys[i] for i in first] for first in order[:TOP].T]
    found = []
    for number, question in enumerate(study.questions):
        ranked = question.truth[order[:, number]]
        found.append(
            {
                "study": study.name,
                "replicate": study.replicate,
                "method": method,
                "question": number,
                "concept": question.concept,
                "picture": question.picture,
                "carriers": int(ranked.sum()),
                **dict(zip(METRICS, ranking_metrics(ranked), strict=True)),
                "top": top[number] if facts["label_free"] else None,
                **facts,
            }
        )
    return found


def ranking_metrics(ranked: npt.NDArray[np.bool_]) -> tuple[float, float, float]:
    """precision@10, recall@min(10, n) and average precision of the truth in ranked order [N].

    Without a carrier the last two are nan.
    """
    carriers, right = int(ranked.sum()), int(ranked[:TOP].sum())
    precision = right / min(TOP, len(ranked))
    if not carriers:
        return precision, np.nan, np.nan
    places = np.flatnonzero(ranked) + 1
    average = float((np.arange(1, carriers + 1) / places).mean())
    return precision, right / min(TOP, carriers), average


def chance(questions: Sequence[Question], metrics: Mapping[str, str]) -> dict[str, float]:
    """What a ranking at random is worth for each concept, by its metric: the mean of all rankings.

    Questions without a carrier count for precision and not for recall, as elsewhere.
    """
    found: dict[str, list[float]] = {}
    for question in questions:
        carriers, rows = int(question.truth.sum()), len(question.truth)
        worth = carriers / rows  # of precision: each place holds a carrier this often
        if metrics[question.concept] == "recall_at_10":
            worth *= min(TOP, rows) / min(TOP, carriers) if carriers else np.nan
        found.setdefault(question.concept, []).append(worth)
    return {concept: float(np.nanmean(values)) for concept, values in found.items()}


def random_scores(study: Study) -> npt.NDArray[np.float64]:
    """Chance: a seeded draw for each image and question."""
    shape = (len(study.corpus), len(study.questions))
    return np.random.default_rng([0, study.replicate]).random(shape)


def caption_scores(study: Study) -> npt.NDArray[np.float64]:
    """Caption search: BM25 of the words that the prompt has and the contrast has not."""
    bm25s = _bm25()
    nothing = np.zeros(len(study.corpus))
    words = bm25s.tokenize(list(study.corpus.captions), stopwords=None, show_progress=False)
    if not any(words.ids):  # no caption says a word
        return np.stack([nothing] * len(study.questions), 1)
    retriever = bm25s.BM25()
    retriever.index(words, show_progress=False)
    columns = []

    def said(text: str) -> list[str]:
        tokens = bm25s.tokenize([text], stopwords=None, show_progress=False, return_ids=False)
        return list(tokens[0])

    for question in study.questions:
        lacking = set(said(question.contrast))
        asked = [word for word in said(question.prompt) if word not in lacking]
        known = [word for word in asked if word in words.vocab]
        columns.append(retriever.get_scores(known).astype(np.float64) if known else nothing)
    return np.stack(columns, 1)


def _bm25() -> Any:
    """The library, which imports JAX where it is there; that would take most of a GPU's memory."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import bm25s

    return bm25s


@torch.no_grad()
def latent_scores(study: Study) -> npt.NDArray[np.float64]:
    """Nearest latents: cosine of an image with the question's pictures, averaged over them."""
    pictures = torch.nn.functional.normalize(study.pictures.flatten(1), dim=1)
    images = torch.nn.functional.normalize(study.corpus.x_0.flatten(1), dim=1)
    means = pictures.view(len(study.asked), study.seeds, -1).mean(1)
    place = {asked: i for i, asked in enumerate(study.asked)}
    chosen = [place[q.picture, q.prompt] for q in study.questions]
    return (images.to(means) @ means[chosen].mT).double().cpu().numpy()


def ceiling_scores(study: Study) -> npt.NDArray[np.float64]:
    """The best that one ranking per picture can do which does not know which concept is meant.

    Carriers of more of the picture's concepts come first. Where no image carries two of them, and
    each has ten carriers, the precisions at 10 of its k concepts sum to 1.
    """
    by_picture: dict[str, list[int]] = {}
    for number, question in enumerate(study.questions):
        by_picture.setdefault(question.picture, []).append(number)
    scores = np.zeros((len(study.corpus), len(study.questions)))
    for numbers in by_picture.values():
        truth = np.stack([study.questions[i].truth for i in numbers], 1)
        scores[:, numbers] = _shared_ranking(truth)[:, None]
    return scores


def _shared_ranking(truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    # A top 10 that serves several concepts: rarer ones have more to gain from an image each.
    worth = 1.0 / np.minimum(TOP, np.maximum(truth.sum(0), 1))
    total: npt.NDArray[np.float64] = truth @ worth
    return total


BASELINES: dict[str, Baseline] = {
    "random": random_scores,
    "caption search (BM25)": caption_scores,
    "nearest latents": latent_scores,
    "ceiling of one ranking": ceiling_scores,
}
