"""The benchmark `faces`: what the drawn faces show, what is said of them, what is asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from headwater.benchmarks import faces, world_models
from headwater.benchmarks.measure import TOP, ceiling_scores, ranking_metrics
from headwater.benchmarks.study import Corpus, Study
from headwater.benchmarks.worlds import questions

WORLD = faces.WORLD
WITHOUT = ("without glasses", "without a hat", "without a smile")
WITH = WORLD.held_out


def pixels(values: tuple[str, ...], seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.asarray(faces.render(values, np.random.default_rng(seed))).astype(np.int64)


@pytest.mark.parametrize(
    ("place", "top", "bottom"), [(0, 22, 44), (1, 0, 32), (2, 38, 56)], ids=WORLD.attributes
)
def test_an_attribute_changes_its_own_part_of_the_face(place: int, top: int, bottom: int) -> None:
    for seed in range(20):
        with_it = tuple(WITH[i] if i == place else v for i, v in enumerate(WITHOUT))
        changed = np.abs(pixels(with_it, seed) - pixels(WITHOUT, seed)).max(axis=2) > 20
        rows = np.nonzero(changed.any(axis=1))[0]
        assert changed.sum() > 25  # of 4,096 pixels: to be seen, and to be drawn by a small model
        assert top <= rows.min()
        assert rows.max() <= bottom


def test_faces_differ_in_more_than_what_is_said() -> None:
    drawn = np.stack([pixels(WITHOUT, seed) for seed in range(30)])
    assert drawn.shape == (30, 64, 64, 3)
    assert drawn[:, 2, 2].std(axis=0).min() > 10  # ground
    assert drawn[:, 34, 32].std(axis=0).min() > 20  # skin
    assert np.abs(drawn[0] - drawn[1:]).mean(axis=(1, 2, 3)).min() > 5


def test_captions_name_what_is_there() -> None:
    assert faces.caption(WITHOUT) == "a face"
    assert faces.caption(WITH) == "a face with glasses and a hat and a smile"
    assert WORLD.silent(WITH, 1) == "a face with glasses and a smile"
    assert WORLD.training_captions(WITHOUT) == ["a face", ""]
    assert sum(WORLD.shares) == pytest.approx(1)


def test_the_corpus_never_shows_all_three_and_questions_ask_what_is_named() -> None:
    corpus = world_models.corpus(WORLD, 140)
    assert WITH not in corpus.values
    assert {corpus.values.count(values) for values in WORLD.shown} == {20}
    asked = questions(WORLD, corpus, 2)
    assert len(asked) == 2 * 12  # an attribute is there in half of the eight combinations
    for question in asked:
        attribute = question.concept.split(",")[0]
        assert attribute in question.prompt
        assert attribute not in question.contrast
        others = [name for name in WORLD.attributes if name != attribute]
        assert attribute in question.alone
        assert not any(name in question.alone for name in others)
        assert len({(question.prompt, question.contrast), *question.contexts}) == 4
        for prompt, contrast in question.contexts:
            assert {prompt, contrast} <= set(WORLD.sentences())
            named, left = (
                {n for n in WORLD.attributes if n in said} for said in (prompt, contrast)
            )
            assert named - left == {attribute}
            assert left < named
        place = list(WORLD.attributes).index(attribute)
        assert question.truth.tolist() == [v[place] == WITH[place] for v in corpus.values]
    unseen = [q for q in asked if q.concept.endswith("unseen")]
    assert {q.prompt for q in unseen} == {faces.caption(WITH)}
    assert not np.logical_and.reduce([q.truth for q in unseen]).any()


def test_one_ranking_is_right_for_at_most_two_thirds_of_an_unseen_picture(study: Study) -> None:
    order = np.argsort(-ceiling_scores(study), axis=0, kind="stable")
    found = [
        ranking_metrics(question.truth[order[:, number]])[0]
        for number, question in enumerate(study.questions)
        if question.concept.endswith("unseen")
    ]
    assert np.mean(found) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)  # no ranking is better: images carry two of the three at most
    truth = np.stack([q.truth for q in study.questions[:3]])
    for _ in range(50):
        assert truth[:, rng.permutation(truth.shape[1])[:TOP]].mean() <= 2 / 3


@pytest.fixture(scope="module")
def study() -> Study:
    corpus = world_models.corpus(WORLD, 140)
    images = Corpus(torch.zeros(140, 4, 16, 16), ("",) * 140, corpus.keys)
    nobody: Any = None  # no model is asked for a ceiling
    return Study("faces", nobody, images, questions(WORLD, corpus, 1))
