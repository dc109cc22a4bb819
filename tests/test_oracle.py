"""A lambda of each question's own: luck does not pass from one half of the labels to the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_lds import SETTINGS

from headwater.attribution import Recipe
from headwater.benchmarks import lds, oracle
from headwater.benchmarks.emoji import METRICS
from headwater.benchmarks.measure import wanted
from headwater.benchmarks.methods import chosen
from headwater.benchmarks.oracle import by_image, by_model, crossed, lds_studies
from headwater.benchmarks.ranks import lds as correlations
from headwater.benchmarks.ranks import spearman
from headwater.benchmarks.study import Study, answer

RECIPE = Recipe(dim=64, timesteps=2)


def test_luck_is_told_from_knowledge() -> None:
    generator = np.random.default_rng(0)
    luck = generator.normal(size=(20, 2, 6, 400))
    found = crossed(luck, free=3)
    error = 1 / (2 * 20 * 400) ** 0.5  # of the mean of any one lambda
    assert abs(found.own.mean()) < 5 * error
    assert abs(found.single.mean()) < 5 * error
    assert found.oracle.mean() == pytest.approx(1.267, abs=0.03)  # the largest of six normals

    peaks = generator.integers(0, 6, 400)
    known = -np.abs(np.arange(6)[:, None] - peaks) + 0.1 * luck
    found = crossed(known, free=3)
    np.testing.assert_allclose(found.own, found.oracle, atol=0.05)
    assert found.own.mean() > found.single.mean() + 1


def test_the_half_that_measures_does_not_choose() -> None:
    # Two lambdas, two questions: each half likes another one.
    worths = np.array([[[[1.0, 1.0], [0.0, 0.2]], [[0.0, 0.4], [1.0, 0.8]]]])  # [1, 2, 2, 2]
    found = crossed(worths, free=0)
    np.testing.assert_allclose(found.label_free, [(1 + 0) / 2, (1 + 0.4) / 2])
    np.testing.assert_allclose(found.own, [0.0, (0.4 + 0.2) / 2])
    np.testing.assert_allclose(found.single, [0.0, (0.4 + 0.2) / 2])
    np.testing.assert_allclose(found.oracle, [1.0, (1.0 + 0.8) / 2])


def test_of_equal_lambdas_the_nearest_to_the_label_free_one_is_taken() -> None:
    by, measured = np.array([1.0, 0, 0, 1, 1]), np.array([7.0, 0, 2, 3, 9])
    worths = np.stack([by, measured])[None, :, :, None]
    one_way = crossed(worths, free=2).own[0]
    # By the first half 3 is nearest to 2 of 0, 3 and 4; by the second 4 is the best.
    assert one_way == (3 + 1) / 2


def test_a_half_without_carriers_measures_nothing() -> None:
    worths = np.ones((2, 2, 3, 2))
    worths[0, 1, :, 0] = np.nan
    worths[1, :, 2, 0] = 5
    found = crossed(worths, free=1)
    assert found.oracle.tolist() == [5, 1]  # of the other split
    assert found.label_free.tolist() == [1, 1]


def test_halves_of_the_corpus_are_ranked_by_themselves(tiny_study: Study) -> None:
    answers = answer(tiny_study, chosen(["headwater"], RECIPE)[0])
    worths = by_image(tiny_study, answers, splits=3)
    half = np.arange(len(tiny_study.corpus)) % 2 == 0
    generator = np.random.default_rng(0)
    for s in range(3):
        cut = generator.permutation(half)
        for side, there in enumerate((cut, ~cut)):
            members = np.flatnonzero(there)
            for d, damping in enumerate(wanted(answers)):
                scores = answers.scores(damping).cpu().numpy()
                for q, question in enumerate(tiny_study.questions):
                    ranked = sorted(members, key=lambda i, q=q, s=scores: -s[i, q])
                    hits = sum(question.truth[i] for i in ranked[:10])
                    carriers = question.truth[members].sum()
                    most = 10 if METRICS[question.concept] == "precision_at_10" else carriers
                    expected = hits / min(10, most, len(members)) if carriers else np.nan
                    np.testing.assert_allclose(worths[s, side, d, q], expected)


def test_halves_of_the_retrained_models(tiny_study: Study) -> None:
    answers = answer(tiny_study, chosen(["headwater"], RECIPE)[0])
    generator = np.random.default_rng(5)
    halves = lds.random_halves(len(tiny_study.corpus), 7)
    true = generator.normal(size=(len(tiny_study.questions), 7))
    worths = by_model(answers, halves, true, splits=2)
    order = np.random.default_rng(0).permutation(7)
    for side, part in enumerate((order[:4], order[4:])):
        scores = answers.scores(wanted(answers)[5]).double().cpu().numpy()
        for q in range(len(tiny_study.questions)):
            foreseen = np.array([scores[halves[k], q].sum() for k in part])
            assert worths[0, side, 5, q] == pytest.approx(spearman(foreseen, true[q, part]))


def test_a_record_of_lds_is_taken_up_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = SETTINGS | {"subsets": 6, "questions": 2}
    lds.run(tmp_path / "lds", device="cpu", say=lambda _: None, **settings)
    rows = pq.read_table(tmp_path / "lds" / "lds.parquet").to_pylist()
    recorded = [r["lds"] for r in rows if r["method"] == "d-trak" and r["label_free"]]
    config = json.loads((tmp_path / "lds" / "config.json").read_text())
    ((study, halves, true),) = lds_studies(tmp_path / "lds", config["settings"], "cpu")
    recipe = Recipe(parameters="auto", dim=settings["dim"])
    scores = answer(study, chosen(["d-trak"], recipe)[0]).scores().double().cpu().numpy()
    np.testing.assert_allclose(correlations(scores, halves, true), recorded, atol=1e-6)

    words = ["--lds", tmp_path / "lds", "--methods", "d-trak", "--device", "cpu"]
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["oracle", *map(str, words), "--out", str(page)])
    oracle.main()
    lines = page.read_text().splitlines()
    assert lines[0].startswith("| method | concept | label-free | one lambda for all |")
    assert sum(line.startswith("| d-trak | ") for line in lines) == 6
    assert lines[2] in capsys.readouterr().out
