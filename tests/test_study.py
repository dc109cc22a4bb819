"""Studies: scores against dense algebra, query rows against single questions, metrics, summary."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import saved, stable_diffusion

from headwater.attribution import (
    Curvature,
    Engine,
    Model,
    Recipe,
    contrast_rows,
    image_rows,
    journey_rows,
    slider_rows,
)
from headwater.benchmarks import measure as measuring
from headwater.benchmarks.further import FURTHER, in_company
from headwater.benchmarks.measure import SCHEMA, chance, measure, ranking_metrics
from headwater.benchmarks.record import grid, write
from headwater.benchmarks.runs import begin
from headwater.benchmarks.study import (
    Answers,
    Configuration,
    Corpus,
    Question,
    Study,
    answer,
    curvature_of,
    query_rows,
)
from headwater.benchmarks.summary import interval, resampled, summarise
from headwater.queries import label_free

RECIPE = Recipe(dim=64, timesteps=3, steps=6)
WORDS = ("cat", "dog")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    model = Model.from_pretrained(saved(stable_diffusion(), tmp_path_factory.mktemp("study")))
    x_0 = torch.randn(12, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    captions = tuple(f"a {WORDS[i % 2]} drawing" for i in range(12))
    corpus = Corpus(x_0, captions, tuple(f"k{i}" for i in range(12)))
    truth = {word: np.array([word in caption for caption in captions]) for word in WORDS}
    questions = tuple(
        Question(kind, f"a {word} drawing", contrast, word, truth[word], alone, contexts)
        for word in WORDS
        for kind, contrast, alone, contexts in (
            ("object", "a drawing", f"a {word}", (("a red " + word, "red"), ("the " + word, ""))),
            ("style", f"a {word}", "a drawing", ((f"{word} by a fish", "a fish"), ("a", word))),
        )
    )
    asked = in_company(questions, corpus)
    return Study("tiny", model, corpus, asked, seeds=2, batch=5, steps=6)


@pytest.mark.parametrize("rows", [9, 40])
@pytest.mark.parametrize(
    ("similarity", "preconditioning"),
    [
        *itertools.product(("ip", "cosine"), ("none", "query")),
        ("relative", "query"),
        ("standard", "query"),
    ],
)
def test_scores_equal_dense_float64_algebra(
    rows: int, similarity: str, preconditioning: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(rows, 16, generator=generator) * torch.rand(rows, 1) * 3
    weights = torch.rand(rows, generator=generator)
    asked = torch.randn(4, 3, 16, generator=generator)
    config = Configuration("x", RECIPE, similarity=similarity, preconditioning=preconditioning)
    answers = Answers(config, features, weights, asked, curvature_of(features), 0.7, 0.0, 0.0)
    phi, q = features.double(), asked.double().mean(1)
    for damping in (None, 0.02, 5.0):
        lam = (0.7 if damping is None else damping) * float(phi.square().sum()) / rows
        inverse = torch.linalg.inv(phi.mT @ phi + lam * torch.eye(16, dtype=torch.float64))
        solved = q @ inverse if preconditioning == "query" else q
        expected = phi @ solved.mT
        if similarity == "cosine":
            expected /= phi.norm(dim=1, keepdim=True)
        elif similarity == "relative":
            expected /= (phi @ inverse).norm(dim=1, keepdim=True)
        elif similarity == "standard":
            kind = phi @ inverse @ phi.mT  # scores of every row for every row
            expected /= kind.square().mean(dim=1, keepdim=True).sqrt()
        expected *= weights.double()[:, None]
        torch.testing.assert_close(answers.scores(damping).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_without_deviation_scores_nothing() -> None:
    """One that is all zero, and one outside of the curvature, of which rounding alone is left."""
    turned = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))[0]
    features = torch.cat([torch.zeros(1, 16), turned])
    config = Configuration("x", RECIPE, similarity="standard")
    curvature = curvature_of(turned[:9].double())
    asked = torch.ones(1, 1, 16)
    answers = Answers(config, features, torch.ones(17), asked, curvature, 0.7, 0.0, 0.0)
    scores = answers.scores()[:, 0]
    assert (scores[1:10] != 0).all()
    assert not scores[[0, *range(10, 17)]].any()


KINDS = ["contrast", "effect", "contexts", "company", "image", "journey", "slider"]


@pytest.mark.parametrize("kind", KINDS)
def test_query_rows_are_those_of_each_question_alone(study: Study, kind: str) -> None:
    engine = Engine(study.model, RECIPE)
    rows = query_rows(study, engine, kind)
    assert rows.shape == (4, 2, 64)
    for number, question in enumerate(study.questions):
        place = study.asked.index((question.picture, question.prompt))
        for seed in range(2):
            x_0 = study.pictures[place * 2 + seed : place * 2 + seed + 1]
            key = [f"{question.picture}#{seed}"]
            if kind == "contrast":
                one = contrast_rows(engine, x_0, [question.prompt], [question.contrast], key)
            elif kind == "effect":
                texts = ([question.prompt], [question.contrast], key)
                one = contrast_rows(engine, x_0, *texts, [([question.alone], [""])])
            elif kind in ("contexts", "company"):
                beside = (*question.company, (question.alone, ""))
                more = question.contexts if kind == "contexts" else beside
                pairs = ((question.prompt, question.contrast), *more)
                one = torch.stack(
                    [contrast_rows(engine, x_0, [has], [lacks], key) for has, lacks in pairs]
                ).mean(0)
            elif kind == "image":
                one = image_rows(engine, x_0, [question.prompt], key)
            elif kind == "journey":
                path = study.path(engine, [place * 2 + seed])
                one = journey_rows(engine, path, key, 7.5)
            else:
                path = study.path(engine, [place * 2 + seed])
                one = slider_rows(engine, path, [question.contrast])
            torch.testing.assert_close(rows[number, seed], one[0], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="'nothing' is unknown"):
        query_rows(study, engine, "nothing")
    first, second, *_ = study.questions
    for query, less, message in (
        ("effect", replace(first, alone=""), "says its concept alone"),
        ("contexts", replace(first, contexts=()), "says its concept in other company"),
        ("contexts", replace(first, contexts=first.contexts[:1]), "as often; ask"),
        ("company", replace(first, company=()), "says its concept beside captions"),
    ):
        asked = Study("untold", study.model, study.corpus, (less, second), seeds=1, steps=6)
        with pytest.raises(ValueError, match=message):
            query_rows(asked, engine, query)


def test_pictures_are_drawn_once_and_differ_by_seed(study: Study) -> None:
    assert study.pictures is study.drawn().x_0
    assert len(study.asked) == 2  # two questions about each picture
    assert not torch.equal(study.pictures[0], study.pictures[1])
    given = {word: torch.full(study.model.sample_shape, float(i)) for i, word in enumerate(WORDS)}
    asked = Study("given", study.model, study.corpus, study.questions, seeds=2, given=given)
    assert asked.pictures.flatten(1).mean(1).tolist() == [0, 0, 1, 1]
    assert query_rows(asked, Engine(study.model, RECIPE), "slider").shape == (4, 2, 64)


def test_metrics_equal_plain_counting() -> None:
    generator = np.random.default_rng(0)
    for carriers in (0, 1, 4, 30):
        truth = np.zeros(50, bool)
        truth[generator.choice(50, carriers, replace=False)] = True
        precision, recall, average = ranking_metrics(truth)
        first = sum(bool(x) for x in truth[:10])
        assert precision == first / 10
        if not carriers:
            assert np.isnan(recall)
            assert np.isnan(average)
            continue
        assert recall == first / min(10, carriers)
        precisions = [truth[: i + 1].mean() for i in range(50) if truth[i]]
        assert average == pytest.approx(np.mean(precisions))


def test_what_chance_is_worth_is_the_mean_of_all_rankings() -> None:
    def asked(concept: str, carriers: int) -> Question:
        return Question(concept, "", "", "", np.arange(13) < carriers)

    questions = [asked("a", 2), asked("b", 3), asked("b", 11), asked("b", 0)]
    expected: dict[str, list[float]] = {"a": [], "b": []}
    for question in questions[:3]:
        places = itertools.combinations(range(13), int(question.truth.sum()))
        ranked = [ranking_metrics(np.isin(np.arange(13), chosen)) for chosen in places]
        precision, recall, _ = np.mean(ranked, axis=0)
        expected[question.concept].append(precision if question.concept == "a" else recall)
    found = chance(questions, {"a": "precision_at_10", "b": "recall_at_10"})
    assert found == {name: pytest.approx(np.mean(of)) for name, of in expected.items()}
    everyone = chance([asked("a", 2), asked("a", 0)], {"a": "precision_at_10"})
    assert everyone["a"] == pytest.approx(1 / 13)


def test_lambda_of_a_contrast_grows_with_the_root_of_the_corpus_up_to_twenty_images() -> None:
    def chosen(method: str, rows: int) -> float:
        corpus = Curvature(torch.ones(1), torch.ones(1, 1), rows)
        return label_free(method, lambda: corpus.rows, lambda: corpus)

    assert [chosen("contrast", n) for n in (16, 1600, 6400, 10**9)] == [1.0, 10.0, 20.0, 20.0]
    assert [chosen("slider", n) for n in (16, 10**9)] == [10.0, 10.0]


def test_a_measured_table_holds_every_method_question_and_lambda(
    study: Study, tmp_path: Path
) -> None:
    said: list[str] = []
    methods = [
        Configuration("ours", RECIPE),
        Configuration("tracin", RECIPE, query="image", preconditioning="none"),
        Configuration("das", replace(RECIPE, method="das"), query="image"),
    ]
    kept: list[Answers] = []
    table = measure(study, methods, said.append, dampings=(0.1, 1.0), seen=kept.append)
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    ours = [row for row in rows if row["method"] == "ours" and row["question"] == 1]
    assert [row["damping"] for row in ours] == [0.1, 12**0.5 / 4, 1.0]
    # Of a whole picture, the rows decide: 12 rows in 64 numbers.
    assert kept[2].damping == kept[2].curvature.damping(0.25)
    assert kept[0].damping == 12**0.5 / 4
    values = kept[0].curvature.eigenvalues
    for row in ours:
        lam = row["damping"] * float(values.sum()) / 12
        assert row["effective"] == pytest.approx(float((values / (values + lam)).sum()) / 12)
    assert sum(row["label_free"] for row in ours) == 1
    free = next(row for row in ours if row["label_free"])
    order = kept[0].scores()[:, 1].argsort(descending=True)[:10].tolist()
    assert free["top"] == [f"k{i}" for i in order]
    tracin = [row for row in rows if row["method"] == "tracin"]
    assert [(row["damping"], row["effective"]) for row in tracin] == [(None, None)] * 4
    # The captions name the object, so a search for it finds exactly the carriers, six of each.
    by_caption = [r for r in rows if r["method"].startswith("caption") and r["concept"] == "object"]
    assert [row["recall_at_10"] for row in by_caption] == [1.0, 1.0]
    assert len(said) == len(measuring.BASELINES) + 3
    first, *others = study.questions
    nothing = replace(first, alone="", contexts=(), company=())
    untold = replace(study, questions=(nothing, *others))
    left: list[str] = []
    more = [Configuration(query, RECIPE, query=query) for query in FURTHER]
    assert measure(untold, more, left.append, baselines={}).num_rows == 0
    assert [line.partition(": ")[2] for line in left] == [
        "left out, not every question says its concept alone",
        "left out, not every question says its concept in other company",
        "left out, not every question says its concept beside captions",
    ]
    assert [answer(study, configuration).damping for configuration in more] == [12**0.5 / 4] * 3
    # Methods of one recipe share its rows; another recipe has its own.
    assert kept[0].features is kept[1].features
    assert not torch.equal(kept[1].features, kept[2].features)

    metrics = {"object": "recall_at_10", "style": "precision_at_10"}
    run = begin(tmp_path, "tiny", {"seed": 0}, corpus="none", say=said.append)
    cells = write(run, table, metrics, intro="A test.")
    assert {cell.method for cell in cells} == {row["method"] for row in rows}
    assert pq.read_table(tmp_path / "tiny.parquet").equals(table)
    assert json.loads((tmp_path / "config.json").read_text())["settings"] == {"seed": 0}
    assert "| ours |" in (tmp_path / "tiny.md").read_text()
    for name in ("tiny-lambda.png", "tiny-cost.png"):
        assert Image.open(tmp_path / name).width > 300
    picture = Image.new("RGB", (16, 16))
    grid([("a cat", picture, [(picture, True), (picture, False)])], tmp_path / "grid.png")
    page = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (page == [0, 128, 0]).all(2).any()
    assert (page == [255, 0, 0]).all(2).any()


def test_caption_search_leaves_the_gpu_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # bm25s imports JAX where it is installed, and JAX takes most of the GPU on which it starts.
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("import os\nON = os.environ.get('JAX_PLATFORMS')\n")
    (tmp_path / "jax/lax.py").write_text("def top_k(values, k):\n    return values, values\n")
    monkeypatch.syspath_prepend(tmp_path)
    for given in ("", "cuda"):
        monkeypatch.setenv("JAX_PLATFORMS", given)
        if not given:
            monkeypatch.delenv("JAX_PLATFORMS")
        with patch.dict(sys.modules):
            for name in [name for name in sys.modules if name.split(".")[0] in ("bm25s", "jax")]:
                del sys.modules[name]
            measuring._bm25()
            platforms = sys.modules["jax"].ON
            assert platforms == (given or "cpu")


def test_one_concept_blind_ranking_is_right_half_of_the_time(study: Study) -> None:
    captions = tuple(["a"] * 40)
    corpus = Corpus(torch.zeros(40, *study.model.sample_shape), captions, captions)
    shape, colour = np.arange(40) < 20, np.arange(40) >= 20  # no image carries both
    questions = tuple(
        Question(kind, "a", "", "held out", truth)
        for kind, truth in (("shape", shape), ("colour", colour))
    )
    blind = Study("blind", study.model, corpus, questions)
    scores = measuring.ceiling_scores(blind)
    assert (scores[:, 0] == scores[:, 1]).all()
    order = (-scores[:, 0]).argsort(kind="stable")[:10]
    assert shape[order].mean() + colour[order].mean() == 1.0
    both = Study("both", study.model, corpus, (questions[0], questions[0]))
    assert shape[(-measuring.ceiling_scores(both)[:, 0]).argsort(kind="stable")[:10]].all()


def record(method: str, picture: int, damping: float | None, value: float, free: bool) -> dict:  # type: ignore[type-arg]
    blank = dict.fromkeys(SCHEMA.names)
    return blank | {
        "replicate": 0, "method": method, "question": picture, "concept": "c",
        "picture": str(picture), "damping": damping, "effective": damping and 1 / damping,
        "label_free": free, "precision_at_10": value,
    }  # fmt: skip


def test_the_four_choices_of_lambda() -> None:
    # Pictures 0 and 2 are best at lambda 1, pictures 1 and 3 at lambda 10; label-free takes 5.
    at = {1.0: (1.0, 0.0, 0.9, 0.1), 10.0: (0.2, 0.7, 0.1, 0.9), 5.0: (0.5, 0.5, 0.5, 0.7)}
    rows = [
        record("m", picture, damping, values[picture], damping == 5.0)
        for damping, values in at.items()
        for picture in range(4)
    ]
    rows += [record("random", picture, None, 0.25, True) for picture in range(4)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    ours, chance = summarise(table, {"c": "precision_at_10"})
    # Records made before there was the column are still read.
    cell_of_before, _ = summarise(table.drop(["effective"]), {"c": "precision_at_10"})
    assert ours.label_free == pytest.approx(0.55)
    assert ours.low <= 0.55 <= ours.high
    assert ours.damping == 5.0
    assert ours.effective == 0.2
    assert (cell_of_before.effective, cell_of_before.best_damping) == (None, 5.0)
    assert ours.oracle == pytest.approx((1.0 + 0.7 + 0.9 + 0.9) / 4)
    assert ours.best == pytest.approx(0.55)  # 0.5, 0.475 and 0.55: five
    assert ours.best_damping == 5.0
    # Each half is ranked at what is best for the other: 10 for the even, 1 for the odd pictures.
    assert ours.disjoint == pytest.approx((0.2 + 0.0 + 0.1 + 0.1) / 4)
    assert (chance.label_free, chance.best, chance.damping) == (0.25, None, None)


def test_intervals_draw_pictures_and_replicates_again() -> None:
    generator = np.random.default_rng(3)
    values = generator.random((5, 40))
    rows = [
        {"replicate": r, "picture": str(p), "m": values[r, p]} for r in range(5) for p in range(40)
    ]
    low, high = interval(rows[:40], "m")
    half = 1.96 * values[0].std() / 40**0.5
    assert low == pytest.approx(values[0].mean() - half, abs=0.02)
    assert high == pytest.approx(values[0].mean() + half, abs=0.02)
    shifted = [row | {"m": row["m"] + 2.0 * row["replicate"]} for row in rows]
    assert np.diff(interval(shifted, "m")) > 5 * np.diff(interval(rows, "m"))
    twice = [row for row in rows[:40] for _ in range(4)]  # four questions of each picture
    assert interval(twice, "m") == pytest.approx((low, high))
    assert np.isnan(interval([], "m")).all()


def test_pictures_are_drawn_once_for_all_replicates() -> None:
    generator = np.random.default_rng(4)
    own = generator.random(30)
    rows = [{"replicate": r, "picture": str(p), "m": own[p]} for r in range(6) for p in range(30)]
    assert interval(rows, "m") == pytest.approx(interval(rows[:30], "m"))
    models = [{"replicate": r, "picture": str(p), "m": own[r]} for p in range(30) for r in range(6)]
    half = 1.96 * own[:6].std() / 6**0.5
    assert interval(models, "m")[0] == pytest.approx(own[:6].mean() - half, abs=0.05)


def test_means_of_a_drawing_again_are_those_of_a_plain_loop() -> None:
    """Of values that some replicates lack, and of several in one cell."""
    generator = np.random.default_rng(5)
    cells = [(r, f"p{p}") for r in range(3) for p in range(4) for _ in range(1 + (r == p))]
    cells.remove((2, "p3"))
    values = generator.random((len(cells), 2))
    found = resampled(cells, values.tolist(), 20)
    generator = np.random.default_rng(0)
    of_picture = generator.multinomial(4, [0.25] * 4, size=20)
    of_replicate = generator.multinomial(3, [1 / 3] * 3, size=20)
    for draw, means in enumerate(found):
        chosen = [
            value
            for (r, picture), value in zip(cells, values, strict=True)
            for _ in range(of_replicate[draw, r] * of_picture[draw, int(picture[1])])
        ]
        assert means == pytest.approx(np.mean(chosen, axis=0))
    # Each picture its own replicate's: nothing may be drawn, which then does not count.
    assert np.isfinite(resampled([(0, "a"), (1, "b")], [[1.0], [2.0]], 50)).all()


def test_a_study_made_of_another_keeps_none_of_its_rows(study: Study) -> None:
    ours = Configuration("ours", RECIPE)
    first = rows_of(study, ours)
    captions = tuple(caption.replace("cat", "dog") for caption in study.corpus.captions)
    other = replace(study, corpus=replace(study.corpus, captions=captions))
    assert other.drawn() is study.drawn()  # of one model: its pictures are not drawn again
    assert not torch.equal(rows_of(other, ours), first)
    assert torch.equal(rows_of(study, ours), first)


def rows_of(study: Study, configuration: Configuration) -> torch.Tensor:
    return answer(study, configuration).features
