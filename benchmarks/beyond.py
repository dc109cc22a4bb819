"""Ideas for more accuracy, or the same for less: what each gains on the emoji corpus.

Ideas are tried on the plain contrast (`headwater-ip`), the default before it counted in standard
deviations. Its rows and queries are kept in pieces, by noise level and by side of cross-attention
(layers fed by the text, layers that are not), so that most ideas need no pass of their own. An idea
is a setting of the engine or something done with its answers; what it costs stands beside it. Of an
idea that puts several answers together, scores are brought to unit variance over the corpus first,
unless it is one curvature in blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from headwater.attribution import Engine, Model, parted
from headwater.attribution.shares import TEXT_SIDE
from headwater.benchmarks import record
from headwater.benchmarks.caption_variants import LAYERS
from headwater.benchmarks.emoji import EMOJI, METRICS, make_study, named, questions, read
from headwater.benchmarks.measure import Scored, chance, measured, part
from headwater.benchmarks.pieces import informative, query_pieces, row_pieces
from headwater.benchmarks.runs import begin, digest, given
from headwater.benchmarks.study import (
    Answers,
    Configuration,
    Question,
    Say,
    Study,
    answer,
    corpus_rows,
    curvature_of,
)
from headwater.benchmarks.summary import Cell, interval

SMALL = {"rows": 200, "pairs": 6, "seeds": 2, "batch": 32, "controls": 4, "passes": False}
PLAIN = "headwater-ip"  # what ideas are tried on
SPREAD = (0.1, 1.0, 10.0)  # dampings averaged, in units of the one that is asked for
SIDES = ("text side alone", "picture side alone")
OTHER_LAYERS = LAYERS | {
    "all attention": r"attn[12]\.",
    "convolutions": r"resnets\.\d+\.conv[12]\.",
}


def run(
    out: Path,
    *,
    corpus: str,
    model: str,
    rows: int = 9000,
    pairs: int = 106,
    seeds: int = 4,
    batch: int = 1024,
    controls: int = 64,
    passes: bool = True,
    wording: Sequence[str] = EMOJI,
    dtype: str = "auto",
    device: str = "auto",
    say: Say,
) -> pa.Table:
    """Measure every idea and write the record.

    Args are those of `emoji.run`, and:
        controls: unrelated questions of each kind, about pairs that training images show.
        passes: try also the ideas that need rows of their own.

    Returns:
        Every ranking, by `measure.SCHEMA`.
    """
    settings = given(locals())
    art, asked = read(Path(corpus), rows, pairs)
    network = Model.from_pretrained(model, device=device, dtype=dtype)
    source = digest(art, pa.Table.from_pylist(asked))
    begun = begin(out, "beyond", settings, model=network, corpus=source, say=say)
    study = make_study(network, art, asked, wording, seeds=seeds, batch=batch)
    unrelated = control_pairs(art, asked, controls)
    control = replace(
        study,
        name="controls",
        questions=questions(art, unrelated, wording),
        seeds=max(1, seeds // 2),
    )
    (plain,) = named([PLAIN])
    by_chance = chance(study.questions, METRICS)
    record.follow(begun, METRICS, intro=str(__doc__), chance=by_chance)

    def of_idea(idea: Idea) -> list[dict[str, Any]]:
        return measured(study, idea.answers())

    tables = []
    costs: dict[str, str] = {}
    for idea in ideas(study, control, plain, passes=passes):
        tables.append(part(study, idea.name, partial(of_idea, idea), begun.parts, say))
        costs[idea.name] = idea.cost
    table = pa.concat_tables(tables)
    cells = record.write(begun, table, METRICS, intro=str(__doc__), chance=by_chance)
    with (out / "beyond.md").open("a") as page:
        page.write("\n".join(["", *gains(table, cells, costs), ""]))
    begun.finish()
    return table


@dataclass(frozen=True)
class Combined:
    """Several answers as one: their scores are summed."""

    configuration: Configuration
    parts: tuple[Answers, ...]
    alike: bool  # bring each part's scores to mean 0 and variance 1 over the corpus
    dampings: tuple[float, ...] = (1.0,)  # each part is taken at, in units of the one asked for

    curvature = None  # there are several, or several dampings

    @property
    def damping(self) -> float:
        """Of a query unasked."""
        return self.parts[0].damping

    @property
    def ingest_seconds(self) -> float:
        """Of all recipes; parts of one recipe share its passes."""
        return sum({p.configuration.recipe: p.ingest_seconds for p in self.parts}.values())

    @property
    def query_seconds(self) -> float:
        """Likewise."""
        return sum({p.configuration.recipe: p.query_seconds for p in self.parts}.values())

    def scores(self, damping: float | None = None) -> Tensor:
        """[N, Q], as `Answers.scores`."""
        damping = self.damping if damping is None else damping
        found = [part.scores(damping * at) for part in self.parts for at in self.dampings]
        if self.alike:
            found = [(scores - scores.mean(0)) / scores.std(0) for scores in found]
        return torch.stack(found).sum(0)


@dataclass(frozen=True)
class Idea:
    """What is tried, and what it costs."""

    name: str
    cost: str
    answers: Callable[[], Scored]  # to be called before the next idea is taken


def ideas(study: Study, control: Study, plain: Configuration, *, passes: bool) -> Iterator[Idea]:
    """Every idea, the plain contrast first."""
    base = yield from of_pieces(study, control, plain)
    if passes:
        yield from with_passes(study, base)


def of_pieces(study: Study, control: Study, plain: Configuration) -> Generator[Idea, None, Answers]:
    """The ideas that the plain contrast's rows and queries are enough for; returns its answers."""
    engine = parted(Engine(study.model, plain.recipe), (TEXT_SIDE,))
    started = time.perf_counter()
    pieces, losses = row_pieces(engine, study.corpus, study.batch)  # [N, T, 2, dim], [N]
    float(losses.sum())  # waits for the device
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    asked = query_pieces(study, engine, study.questions)  # [Q, S, T, 2, dim]
    float(asked.sum())
    query_seconds = time.perf_counter() - started
    features, rows = pieces.sum((1, 2)), asked.sum((2, 3))
    curvature = curvature_of(features)
    base = Answers(
        plain,
        features,
        torch.ones_like(losses),
        rows,
        curvature,
        plain.damping(curvature),
        seconds,
        query_seconds,
    )
    yield Idea(plain.name, "", lambda: base)

    def idea(name: str, cost: str, **changes: Any) -> Idea:
        return Idea(name, cost, partial(changed, base, name, **changes))

    other = query_pieces(study, engine, other_sides(study.questions)).sum((2, 3))
    both = rows + other
    unrelated = query_pieces(control, engine, control.questions).sum((2, 3))
    unrelated_both = unrelated + query_pieces(control, engine, other_sides(control.questions)).sum(
        (2, 3)
    )
    centred = rows - centre(control, unrelated, study)
    centred_both = both - centre(control, unrelated_both, study)
    yield idea("two contrasts", "queries x2", rows=both, queries=2)
    once = f"{len(control.asked)} questions once an index"
    yield idea("unrelated questions subtracted", once, rows=centred)
    relative: dict[str, Any] = {"similarity": "relative"}
    yield idea("relative", "a solve for each row and lambda", **relative)
    yield idea("standard, the default", "likewise", similarity="standard")
    relative |= {"queries": 2}
    yield idea("relative, two contrasts", "queries x2, solves", rows=both, **relative)
    yield idea(
        "relative, two contrasts, unrelated subtracted",
        "queries x2, solves, the unrelated",
        rows=centred_both,
        **relative,
    )
    spread = replace(plain, name="several lambda averaged")
    yield Idea(spread.name, "searches x3", lambda: Combined(spread, (base,), True, SPREAD))
    for few in (1 << i for i in range((study.seeds - 1).bit_length())):
        share = few / study.seeds
        name = f"{few} of {study.seeds} pictures"
        yield idea(name, f"queries x{share:g}", rows=rows[:, :few], queries=share)

    levels = pieces.shape[1]
    if study.seeds > 1:
        best = informative(asked.sum(3)).argsort(descending=True)[: (levels + 1) // 2].tolist()
        yield idea(
            f"{len(best)} informative noise levels of {levels}",
            f"rows and queries x{len(best) / levels:g}",
            features=pieces[:, best].sum((1, 2)),
            rows=asked[:, :, best].sum((2, 3)),
            queries=len(best) / levels,
            passes=len(best) / levels,
        )

    def block(level: int) -> Answers:
        features, rows = pieces[:, level].sum(1), asked[:, :, level].sum(2)
        return changed(base, f"level {level}", features=features, rows=rows)

    @cache
    def side(place: int) -> Answers:
        features, rows = pieces[:, :, place].sum(1), asked[:, :, :, place].sum(2)
        return changed(base, SIDES[place], features=features, rows=rows)

    def apart(name: str, part: Callable[[int], Answers], count: int) -> Idea:
        of = replace(plain, name=name)
        return Idea(
            name, f"bytes x{count}", lambda: Combined(of, tuple(map(part, range(count))), False)
        )

    yield apart("a curvature for each noise level", block, levels)
    for place, name in enumerate(SIDES):
        yield Idea(name, "", partial(side, place))
    yield apart("a curvature for each side", side, len(SIDES))
    yield idea("centred rows", "", features=features - features.mean(0))
    weighted = replace(base, configuration=replace(plain, name="times the training loss"))
    yield Idea(weighted.configuration.name, "", lambda: replace(weighted, weights=losses))
    return base


def with_passes(study: Study, base: Answers) -> Iterator[Idea]:
    """The ideas that need passes of their own over the corpus."""
    plain, corpus = base.configuration, study.corpus
    again = replace(corpus, keys=tuple(f"{key}#2" for key in corpus.keys))

    def twice(name: str) -> Answers:
        more, _ = corpus_rows(Engine(study.model, plain.recipe), again, study.batch)
        return changed(base, name, features=base.features + more, passes=2)

    yield Idea("two noises an image", "rows x2", partial(twice, "two noises an image"))
    recipe = plain.recipe
    for name, other, cost in (
        ("rows: what the caption changes", replace(recipe, method="dtrak-text"), "rows x2"),
        ("each layer at unit norm", replace(recipe, scaling="layer"), ""),
        ("raw gradients", replace(recipe, scaling="none"), ""),
        ("noise levels of the cleaner half", replace(recipe, levels="0-0.5"), ""),
        ("noise levels of the noisier half", replace(recipe, levels="0.5-1"), ""),
        ("one noise for all", replace(recipe, noise="shared"), ""),
        *(
            (name, replace(recipe, parameters=pattern), "longer gradients")
            for name, pattern in OTHER_LAYERS.items()
        ),
        (
            "half the noise levels",
            replace(recipe, timesteps=(recipe.timesteps + 1) // 2),
            "rows and queries x0.5",
        ),
        (
            "twice the noise levels",
            replace(recipe, timesteps=2 * recipe.timesteps, steps=2 * recipe.steps),
            "rows and queries x2",
        ),
    ):
        configuration = replace(plain, name=name, recipe=other)
        yield Idea(name, cost, partial(answer, study, configuration))
    together = replace(plain, name="with guidance features")
    guided = replace(plain, recipe=replace(recipe, method="cfg"))
    yield Idea(
        together.name,
        "rows x2.5, queries and bytes x2",
        lambda: Combined(together, (base, answer(study, guided)), alike=True),
    )


def changed(
    base: Answers,
    name: str,
    *,
    features: Tensor | None = None,
    rows: Tensor | None = None,
    similarity: str | None = None,
    queries: float = 1,
    passes: float = 1,
) -> Answers:
    """Answers under another name, with other features, queries or similarity.

    `queries` and `passes` are what the query and the rows cost in units of `base`.
    """
    configuration = replace(
        base.configuration, name=name, similarity=similarity or base.configuration.similarity
    )
    found = replace(
        base,
        configuration=configuration,
        rows=base.rows if rows is None else rows,
        ingest_seconds=passes * base.ingest_seconds,
        query_seconds=queries * base.query_seconds,
    )
    if features is None:
        return found
    curvature = curvature_of(features)
    damping = configuration.damping(curvature)
    return replace(found, features=features, curvature=curvature, damping=damping)


def other_sides(asked: Sequence[Question]) -> list[Question]:
    """The same concept against nothing instead of in company, about the same pictures.

    "A fish in Y style" against "an emoji in Y style" becomes "a fish" against the empty prompt.
    """
    return [replace(question, prompt=question.alone, contrast="") for question in asked]


def control_pairs(
    art: pa.Table, asked: Sequence[dict[str, Any]], count: int
) -> list[dict[str, Any]]:
    """Training images of objects that are not asked about, drawn at random."""
    names = np.array(art["name"].to_pylist())
    free = np.flatnonzero(~np.isin(names, [pair["name"] for pair in asked]))
    chosen = np.random.default_rng(0).choice(free, min(count, len(free)), replace=False)
    listed: list[dict[str, Any]] = art.take(np.sort(chosen)).drop(["image"]).to_pylist()
    return listed


def centre(control: Study, rows: Tensor, study: Study) -> Tensor:
    """The mean unrelated query of each question's kind, [Q, 1, dim]."""
    kinds = [question.concept for question in control.questions]
    means = {
        kind: rows[[i for i, each in enumerate(kinds) if each == kind]].mean((0, 1))
        for kind in set(kinds)
    }
    return torch.stack([means[question.concept] for question in study.questions])[:, None]


def gains(table: pa.Table, cells: Sequence[Cell], costs: dict[str, str]) -> list[str]:
    """What each idea gains over the plain contrast, paired by question."""
    free = [row for row in table.to_pylist() if row["label_free"]]
    value = {(r["method"], r["question"]): r[METRICS[r["concept"]]] for r in free}
    disjoint = {(c.method, c.concept): np.nan if c.disjoint is None else c.disjoint for c in cells}
    lines = [
        "## Gains over the plain contrast, paired by question",
        "",
        "At the label-free lambda with 95 % intervals over pictures, and each at the lambda that "
        "is best on the other half of the pictures.",
        "",
        "| idea | cost |" + "".join(f" {c}, label-free | {c}, disjoint |" for c in METRICS),
        "|---|---|" + "---|---|" * len(METRICS),
    ]
    for name, cost in costs.items():
        if name == PLAIN:
            continue
        line = f"| {name} | {cost or 'none'} |"
        for concept in METRICS:
            rows = [
                row | {"gain": value[name, row["question"]] - value[PLAIN, row["question"]]}
                for row in free
                if row["method"] == name and row["concept"] == concept
            ]
            low, high = interval(rows, "gain")
            mean = np.nanmean([row["gain"] for row in rows])
            line += f" {mean:+.3f} ({low:+.3f} to {high:+.3f}) |"
            line += f" {disjoint[name, concept] - disjoint[PLAIN, concept]:+.3f} |"
        lines.append(line)
    return lines
