"""A study: questions about a corpus whose answers are known, put to every method.

A method is a `Configuration` of the one engine. `answer` makes its rows, its queries and the
corpus's curvature; one eigendecomposition then gives the scores at every damping. Pictures are
drawn once and shown to every method. Rows stay in memory: no index is written, and what ranks here
is tested to be what an index ranks by.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headwater.attribution import (
    Curvature,
    Engine,
    Gram,
    Model,
    Point,
    Recipe,
    contrast_rows,
    ddim_grid,
    dual_curvature,
    generation_path,
    image_rows,
    journey_rows,
    kept,
    seeded_noise,
    slider_rows,
    stretch,
)
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.further import FURTHER, further_pairs
from headwater.index import Metric
from headwater.queries import label_free

Say = Callable[[str], object]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Corpus:
    """Training images as the model sees them."""

    x_0: Tensor  # [N, C, h, w] clean samples, float32
    captions: tuple[str, ...]
    keys: tuple[str, ...]  # each names its image's noise

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class Question:
    """Which training images taught the model one concept of a picture?"""

    concept: str  # kind of concept ("object", "style"); metrics are averaged within a kind
    prompt: str
    contrast: str  # the prompt without the concept
    picture: str  # names the picture asked about; questions with the same name share it
    truth: npt.NDArray[np.bool_]  # [N] the carriers
    alone: str = ""  # the concept without the rest of the prompt, where that can be said
    contexts: tuple[tuple[str, str], ...] = ()  # (prompt, contrast) of it in other company
    company: tuple[tuple[str, str], ...] = ()  # the same of `alone` and captions of the corpus

    def further(self, query: str) -> tuple[tuple[str, str], ...]:
        """The pairs (prompt, contrast) that such a query asks in beside the question's own."""
        alone = ((self.alone, ""),) if self.alone else ()
        company = (*self.company, *alone) if self.company else ()
        return {"effect": alone, "contexts": self.contexts, "company": company}.get(query, ())


@dataclass(frozen=True)
class Configuration:
    """A method: one setting of the engine."""

    name: str
    recipe: Recipe
    query: str = "contrast"  # one of headwater.queries' kinds, or of FURTHER
    similarity: str = "ip"  # or "cosine" (Renorm-IF), "relative" (Relative-IF), "standard"
    preconditioning: str = "query"  # or "none"
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse what no index could be asked with."""
        Metric(self.similarity, self.preconditioning)
        if self.preconditioning == "both":
            raise BenchmarkError("preconditioning 'both' is not measured here; choose query, none")

    def damping(self, curvature: Curvature) -> float:
        """The label-free lambda, in units of the mean squared length of rows of this curvature."""
        kind = "contrast" if self.query in FURTHER else self.query
        return label_free(kind, lambda: curvature.rows, lambda: curvature)


@dataclass(frozen=True)
class Drawn:
    """Pictures that a model made, and what they were on the way."""

    x_0: Tensor  # [P, C, h, w]
    x_t: Tensor  # [T, P, C, h, w]
    levels: tuple[int, ...]  # [T] ascending


@dataclass(frozen=True)
class Ingested:
    """What one recipe makes of a corpus."""

    features: Tensor  # [N, dim]
    weights: Tensor  # [N] factor of each row's score
    curvature: Curvature
    seconds: float  # that the rows took


Ingest = Callable[[Engine, Corpus, int], Ingested]  # of a corpus, so many images at a time


@dataclass(frozen=True)
class Study:
    """A corpus, the model that was trained on it, and questions.

    Pictures are drawn by the model for each question's prompt, or all of them are `given`.
    """

    name: str
    model: Model
    corpus: Corpus
    questions: tuple[Question, ...]
    seeds: int = 4  # pictures drawn per question, or noise draws over a given one
    batch: int = 64  # images per forward pass
    given: Mapping[str, Tensor] = field(default_factory=dict)  # picture -> x_0 [C, h, w]
    replicate: int = 0  # seed of the training that made the model
    steps: int = 50  # DDIM steps of a drawn picture
    guidance: float = 7.5  # of a drawn picture
    _drawings: dict[object, Drawn] = field(default_factory=dict, repr=False, compare=False)
    # Of this corpus and model: no study that is made of this one with others takes it over.
    _ingested: dict[Recipe, Ingested] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @cached_property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """The different (picture, prompt) of the questions, in the order of their appearance."""
        return tuple(dict.fromkeys((q.picture, q.prompt) for q in self.questions))

    @cached_property
    def prompts(self) -> list[str]:
        """The prompt of each picture, [P] with P = asked x seeds."""
        return [prompt for _, prompt in self.asked for _ in range(self.seeds)]

    @cached_property
    def keys(self) -> list[str]:
        """What names the noise of each picture, [P]."""
        return [f"{picture}#{seed}" for picture, _ in self.asked for seed in range(self.seeds)]

    def drawn(self, count: int = Recipe.timesteps, levels: str = Recipe.levels) -> Drawn:
        """The pictures, drawn at the first call, with `count` noise levels of their paths."""
        drawn_by = (id(self.model), self.steps, self.guidance, *self.keys, *self.prompts)
        key = (count, levels, drawn_by)  # a study made of this one may draw others
        if key not in self._drawings:
            self._drawings[key] = self._draw(count, levels)
        return self._drawings[key]

    @cached_property
    def pictures(self) -> Tensor:
        """The clean samples asked about, [P, C, h, w]: drawn, or given."""
        if not self.given:
            return self.drawn().x_0
        chosen = [self.given[picture] for picture, _ in self.asked for _ in range(self.seeds)]
        return torch.stack(chosen).to(self.model.device)

    def _draw(self, count: int, within: str) -> Drawn:
        grid = ddim_grid(self.model, self.steps)
        part = stretch(grid, within)
        levels = kept(part, min(count, len(part)))
        shape = self.model.sample_shape
        clean, visited = [], []
        for start in range(0, len(self.keys), self.batch):
            keys, prompts = (x[start : start + self.batch] for x in (self.keys, self.prompts))
            noise = torch.stack([seeded_noise(0, f"generate/{key}", shape) for key in keys])
            x_0, points = generation_path(
                self.model,
                noise.to(self.model.device),
                self.model.encode_prompts(prompts),
                self.model.encode_prompts([""] * len(prompts)),
                grid=grid,
                timesteps=levels,
                guidance=self.guidance,
            )
            clean.append(x_0)
            visited.append(torch.stack([point.x_t for point in points]))
        return Drawn(torch.cat(clean), torch.cat(visited, 1), tuple(levels))

    def path(self, engine: Engine, chosen: Sequence[int]) -> list[Point]:
        """Where the path of the chosen pictures is looked at: the way the model drew them.

        A given picture has no such way; then as the recipe looks at a training image.
        """
        prompts, keys = [self.prompts[i] for i in chosen], [self.keys[i] for i in chosen]
        x_0 = self.pictures[list(chosen)]
        if self.given:
            return list(engine.points(x_0, prompts, keys))
        drawn = self.drawn(engine.recipe.timesteps, engine.recipe.levels)
        states, null = engine.states(prompts)
        points = []
        for level, x_t in zip(drawn.levels, drawn.x_t[:, list(chosen)], strict=True):
            t = torch.full((len(chosen),), level, dtype=torch.int64, device=x_t.device)
            a, s = self.model.coefficients(t)
            points.append(Point(x_t, t, x_0, (x_t - a * x_0) / s, states, null))
        return points


@dataclass(frozen=True)
class Answers:
    """What one configuration says about one study."""

    configuration: Configuration
    features: Tensor  # [N, dim]
    weights: Tensor  # [N] factor of each row's score
    rows: Tensor  # [Q, S, dim] a query row for each question and seed
    curvature: Curvature
    damping: float  # label-free, in units of the rows' mean squared length
    ingest_seconds: float
    query_seconds: float

    @property
    def queries(self) -> Tensor:
        """[Q, dim] averaged over seeds."""
        return self.rows.mean(1)

    def solved(self, damping: float | None = None) -> Tensor:
        """[Q, dim] float64: what rows are multiplied with, preconditioned where that is asked."""
        queries = self.queries.double()
        if self.configuration.preconditioning != "query":
            return queries
        return self.curvature.precondition(queries, self.damping if damping is None else damping)

    def scores(self, damping: float | None = None) -> Tensor:
        """How much each image taught each question's concept: [N, Q] float32.

        `damping` None: the one chosen without labels. Unused without preconditioning.
        """
        config, damping = self.configuration, self.damping if damping is None else damping
        scores = self.features @ self.solved(damping).to(self.features).mT
        scale = self.weights
        if config.similarity == "cosine":
            scale = scale / _positive(self.features.norm(dim=1))
        elif config.similarity == "relative":
            inverse = self.curvature.precondition(self.features, damping)
            scale = scale / _positive(inverse.norm(dim=1).to(scale))
        elif config.similarity == "standard":
            scale = scale / _positive(self._deviations(damping).to(scale))
        return scores * scale[:, None]

    def _deviations(self, damping: float) -> Tensor:
        """sqrt(phi^T K_lambda^-1 K K_lambda^-1 phi / N) of every row: [N] float64."""
        inverse = self.curvature.precondition(self.features, damping)
        features = self.features.to(inverse)
        whole = torch.einsum("nd,nd->n", features, inverse)
        damped = damping * self.curvature.scale * inverse.square().sum(dim=1)
        seen = whole - damped  # K = K_lambda - lambda I
        seen = seen.where(seen > 1e-12 * whole, 0)  # the rest is rounding
        return (seen / self.curvature.rows).sqrt()


def _positive(lengths: Tensor) -> Tensor:
    """An all-zero row has no direction and scores nothing."""
    return lengths.where(lengths > 0, torch.inf)


def answer(study: Study, configuration: Configuration, ingest: Ingest | None = None) -> Answers:
    """Compute rows, queries and curvature of one method; lambda is that of a query without one.

    `ingest` makes the corpus's rows, where they are not to be computed from `study.corpus`.
    """
    ingest = ingest or ingested
    engine = Engine(study.model, configuration.recipe)
    if configuration.recipe not in study._ingested:
        study._ingested.clear()  # methods of one recipe come one after another
        study._ingested[configuration.recipe] = ingest(engine, study.corpus, study.batch)
    corpus = study._ingested[configuration.recipe]
    if configuration.query in ("slider", "journey") and not study.given:
        study.drawn(engine.recipe.timesteps, engine.recipe.levels)
    float(study.pictures.sum())  # drawn by now, and not in the time of a query
    started = time.perf_counter()
    rows = query_rows(study, engine, configuration.query)
    finite = rows.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        asked = study.questions[int((~finite).nonzero()[0])]
        raise BenchmarkError(
            f"{study.name}, {configuration.name}: the query about {asked.concept} of "
            f"{asked.prompt!r} is not finite; use another dtype"
        )
    query_seconds = time.perf_counter() - started
    return Answers(
        configuration,
        corpus.features,
        corpus.weights,
        rows,
        corpus.curvature,
        configuration.damping(corpus.curvature),
        corpus.seconds,
        query_seconds,
    )


def ingested(engine: Engine, corpus: Corpus, batch: int) -> Ingested:
    """Rows and curvature of a corpus, and how long the rows took."""
    started = time.perf_counter()
    features, weights = corpus_rows(engine, corpus, batch)
    float(weights.sum())  # waits for the device
    seconds = time.perf_counter() - started
    return Ingested(features, weights, curvature_of(features), seconds)


def corpus_rows(engine: Engine, corpus: Corpus, batch: int) -> tuple[Tensor, Tensor]:
    """Features [N, dim] and row weights [N] of every training image."""
    rows, weights = [], []
    for start in range(0, len(corpus), batch):
        part = slice(start, start + batch)
        found = engine.rows(corpus.x_0[part], corpus.captions[part], corpus.keys[part])
        rows.append(found.features)
        weights.append(found.weights)
    features, weight = torch.cat(rows), torch.cat(weights)
    finite = features.isfinite().all(dim=1) & weight.isfinite()
    if not finite.all():
        bad = corpus.keys[int((~finite).nonzero()[0])]
        raise BenchmarkError(f"the row of {bad} is not finite; use another dtype or method")
    return features, weight


def curvature_of(features: Tensor) -> Curvature:
    """K = Phi^T Phi of rows [N, dim], by the smaller of the two matrices."""
    if len(features) < features.shape[1]:
        return dual_curvature(features)
    gram = Gram(features.shape[1], features.device)
    for block in features.split(8192):
        gram.add(block)
    return gram.curvature()


def query_rows(study: Study, engine: Engine, kind: str) -> Tensor:
    """A row for each question and seed: [Q, S, dim]."""
    place = {asked: i for i, asked in enumerate(study.asked)}
    of_question = [place[q.picture, q.prompt] for q in study.questions]
    seeds, dim = study.seeds, engine.projector.dim
    if kind in ("image", "journey"):  # the same whatever is asked about the picture
        parts = []
        for chosen in _batches(range(len(study.keys)), study.batch):
            prompts, keys = _names(study, chosen)
            if kind == "image":
                parts.append(image_rows(engine, study.pictures[chosen], prompts, keys))
            else:
                guidance = 1.0 if study.given else study.guidance  # of the path
                path = study.path(engine, chosen)
                parts.append(journey_rows(engine, path, keys, guidance))
        return torch.cat(parts).view(-1, seeds, dim)[of_question]
    everything = [(p * seeds + seed, q) for q, p in enumerate(of_question) for seed in range(seeds)]
    parts = []
    for pairs in _batches(everything, study.batch):
        chosen = [picture for picture, _ in pairs]
        contrasts = [study.questions[question].contrast for _, question in pairs]
        if kind == "contrast" or kind in FURTHER:
            prompts, keys = _names(study, chosen)
            x_0, further = study.pictures[chosen], further_pairs(study, kind, [q for _, q in pairs])
            parts.append(contrast_rows(engine, x_0, prompts, contrasts, keys, further))
        elif kind == "slider":
            parts.append(slider_rows(engine, study.path(engine, chosen), contrasts))
        else:
            raise BenchmarkError(
                f"query {kind!r} is unknown; use contrast, {', '.join(FURTHER)}, image, slider, "
                "journey"
            )
    return torch.cat(parts).view(-1, seeds, dim)


def _names(study: Study, chosen: Sequence[int]) -> tuple[list[str], list[str]]:
    return [study.prompts[i] for i in chosen], [study.keys[i] for i in chosen]


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
