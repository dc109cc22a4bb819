"""Counterfactual removals: who is removed, what is measured, and that a removed concept is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import tiny_material
import torch
from conftest import Stopped, stopping_at
from tiny import stable_diffusion

from headwater.attribution import Model, generation_path, seeded_noise
from headwater.benchmarks import counterfactual, removal_record
from headwater.benchmarks.counterfactual import Removal, effects, removed
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.latent_classifier import LatentClassifier, trained_classifier
from headwater.benchmarks.noised import noised
from headwater.benchmarks.presence import Probe, Sampling, losses, presence, probe_of
from headwater.benchmarks.retraining import (
    Job,
    Training,
    small_unet,
    train,
    with_denoiser,
)
from headwater.benchmarks.stacked import stack

KINDS = ("object", "style")


@pytest.fixture(scope="module")
def base() -> Model:
    return Model.from_pipeline(stable_diffusion(), device="cpu")


@pytest.fixture(scope="module")
def judge() -> LatentClassifier:
    many = [tiny_material.pictures(seed=seed) for seed in range(2, 6)]
    known = many[0]
    for more in many[1:]:
        known = counterfactual.joined(known, more)
    found, accuracy = trained_classifier(known, tiny_material.pictures(seed=6), ("object",), 40)
    assert accuracy["object"] > 0.9
    return found


def probe(base: Model, judge: LatentClassifier) -> Probe:
    sampling = Sampling(captions=6, draws=2, steps=3, guidance=3.0)
    material = tiny_material.material()
    return probe_of(base, judge, material.trained, material.unseen, sampling, 3)


def test_presence_and_losses_are_those_of_each_model_alone(
    base: Model, judge: LatentClassifier
) -> None:
    asked = probe(base, judge)
    unets = [small_unet(base, (8, 16), 8, seed) for seed in range(2)]
    drawn, lost = presence(asked, stack(unets)), losses(asked, stack(unets))
    material = tiny_material.material()
    captions = [material.trained.captions[i] for i in (0, 2, 4, 6, 8, 10)]
    labels = [label for _, label in judge.named]
    for m, unet in enumerate(unets):
        model = with_denoiser(base, unet)
        sums = np.zeros((2, len(labels)))
        for caption in captions:
            for number in range(2):
                x_T = seeded_noise(0, f"draw/{caption}#{number}", (4, 8, 8))[None]
                states, null = base.encode_prompts([caption]), base.encode_prompts([""])
                grid = [1, 334, 667]
                x_0, _ = generation_path(
                    model, x_T, states, null, grid=grid, timesteps=[], guidance=3.0
                )
                place = labels.index(caption.split()[2])
                sums[0, place] += float(judge.probabilities(x_0)[0, place])
                sums[1, place] += 1
        np.testing.assert_allclose(drawn[m].numpy(), sums[0] / sums[1], rtol=1e-3, atol=1e-4)
        sums[:] = 0
        unseen = noised(base, material.unseen, 3)
        for i, caption in enumerate(material.unseen.captions):
            for level in range(3):
                t = unseen.t[level : level + 1]
                a, s = base.coefficients(t)
                eps = unseen.noise[i, level]
                with torch.no_grad():
                    e = model.noise(a * unseen.x_0[i] + s * eps, t, base.encode_prompts([caption]))
                place = labels.index(caption.split()[2])
                sums[0, place] += float((e[0] - eps).square().mean())
                sums[1, place] += 1
        np.testing.assert_allclose(lost[m].numpy(), sums[0] / sums[1], rtol=1e-3, atol=1e-4)


def test_a_model_that_never_saw_a_concept_knows_it_less(
    base: Model, judge: LatentClassifier
) -> None:
    """What was seen is half learnt by heart, so its loss is taken on the pictures themselves."""
    material = tiny_material.material()
    words = ("cat", "dog", "fish")
    jobs = [Job(torch.arange(12), 0)]
    for word in words:
        shows = material.trained.carriers("object", word)
        jobs.append(Job(torch.from_numpy((~shows).nonzero()[0]), 0))
    training = Training(widths=(8, 16), steps=80, batch=8, learning_rate=1e-2)
    lessons = material.lessons(base)
    whole = train(base, lessons, jobs, training, at_once=4, say=lambda _: None)
    sampling = Sampling(captions=12, draws=1, steps=1, guidance=1.0)
    lost = losses(probe_of(base, judge, material.trained, material.trained, sampling, 5), whole)
    beyond, known = [], lost.tolist()
    for number, word in enumerate(words, start=1):
        place = judge.named.index(("object", word))
        full, less = ({"presence": known[0], "loss": known[m]} for m in (0, number))
        found = effects(place, full, less)
        beyond.append(found["loss_rise"] - found["loss_collateral"])
    assert min(beyond) > 0
    assert np.mean(beyond) > 0.01


def test_effects_tell_the_concept_from_the_others() -> None:
    before = {"presence": [0.9, 0.8, 0.7], "loss": [0.1, 0.1, 0.1]}
    after = {"presence": [0.4, 0.7, 0.7], "loss": [0.3, 0.1, 0.2]}
    found = effects(0, before, after)
    expected = {
        "presence": 0.4,
        "drop": 0.5,
        "collateral": 0.05,
        "loss_rise": 0.2,
        "loss_collateral": 0.05,
    }
    assert found == {name: pytest.approx(value) for name, value in expected.items()}


def test_removals_take_the_first_and_share_ties_by_chance(base: Model) -> None:
    trained = tiny_material.pictures()
    study = counterfactual.study_of(base, trained, KINDS, 2, 3, 1, replicate=0)
    assert {len(question.company) for question in study.questions} == {4}
    assert [q.concept for q in study.questions] == [
        *["object cat"] * 2,  # it has two captions
        *["object fish"] * 2,
        *["style blue"] * 3,
        *["style red"] * 3,
    ]
    for question in study.questions:
        kind, label = question.concept.split()
        assert label in question.prompt
        assert label not in question.contrast
        assert np.array_equal(question.truth, trained.carriers(kind, label))
    scores = np.random.default_rng(0).normal(size=(12, 10))
    found = removed(study, trained, "m", scores, (0.25, 0.5))
    assert [(r.kind, r.label, len(r.rows)) for r in found[:3]] == [
        ("object", "cat", 3),
        ("object", "cat", 6),
        ("object", "fish", 3),
    ]
    mean = (scores[:, 0] + scores[:, 1]) / 2
    assert found[1].rows.tolist() == sorted(range(12), key=lambda i: -mean[i])[:6]
    kept = found[0].job(12).members.tolist()
    assert sorted([*kept, *found[0].rows]) == list(range(12))
    truth = np.stack([question.truth for question in study.questions], 1).astype(float)
    drawn = [
        removed(replace(study, replicate=seed), trained, "m", truth, (1 / 12,))[0]
        for seed in range(30)
    ]
    assert {int(removal.rows[0]) for removal in drawn} == set(np.flatnonzero(truth[:, 0]))
    assert all(removal.carriers(trained) == 0.5 for removal in drawn)


def test_asked_captions_come_first_among_carriers(base: Model) -> None:
    trained = tiny_material.pictures()
    study = counterfactual.study_of(base, trained, ("object",), 1, 1, 1, replicate=0)
    (question,) = study.questions
    scores = dict(counterfactual.scores_of(study, (), print))[removal_record.ASKED_FIRST]()[:, 0]
    shows = question.truth
    asked = shows & (np.array(trained.captions) == question.prompt)
    assert asked.any()
    assert (shows & ~asked).any()
    assert scores[asked].min() > scores[shows & ~asked].max()
    assert scores[shows].min() > scores[~shows].max()


def test_equal_removals_are_of_one_model() -> None:
    first = Removal(0, "a", "object", "cat", 0.5, np.array([3, 1]))
    assert first.key == replace(first, method="b", rows=np.array([1, 3])).key
    assert first.key != replace(first, seed=1).key
    assert first.key != replace(first, rows=np.array([1, 4])).key


def rows_of(drops: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {
            "method": m,
            "replicate": i // 2,
            "concept": "c",
            "picture": str(i % 2),
            "drop": drop,
            "loss_rise": 1 - drop,
        }
        for m, values in drops.items()
        for i, drop in enumerate(values)
    ]


def test_a_ratio_of_drops_and_its_interval() -> None:
    rows = rows_of({"ours": [0.4, 0.6, 0.2, 0.8], "rival": [0.2, 0.3, 0.1, 0.4]})
    assert removal_record.ratio(rows, "ours", "rival") == pytest.approx((2, 2, 2))
    rows = rows_of({"ours": [0.4, 0.1, 0.2, 0.1], "rival": [0.2, 0.3, 0.1, 0.4]})
    value, low, high = removal_record.ratio(rows, "ours", "rival")
    assert value == pytest.approx(0.8)
    assert low < value < high
    rows = rows_of({"ours": [0.4, 0.1], "rival": [-0.2, 0.0]})
    assert removal_record.ratio(rows, "ours", "rival") == (np.inf, np.inf, np.inf)
    rows = rows_of({"ours": [-0.4, -0.1], "rival": [-0.2, 0.0]})
    assert removal_record.ratio(rows, "ours", "rival")[0] == -np.inf


def test_ours_is_set_against_the_best_other_method_and_the_controls() -> None:
    drops = {
        "headwater": [0.4],
        "trak": [0.1],
        "d-trak": [0.2],
        "random": [0.0],
        "caption search (BM25)": [0.5],
        removal_record.CARRIERS: [0.4],
    }
    rows = [row | {"fraction": 0.1} for row in rows_of(drops)]
    drop, rise, _ = removal_record._ratios(rows)
    assert rise.startswith(
        "- 10% removed: the loss rise by headwater is 0.67 times (0.67 to 0.67) that"
    )
    assert drop == (
        "- 10% removed: the drop by headwater is 2.00 times (2.00 to 2.00) that of d-trak, "
        "inf times (inf to inf) that of random, "
        "0.80 times (0.80 to 0.80) that of caption search (BM25), "
        "1.00 times (1.00 to 1.00) that of random carriers."
    )


def test_each_kind_of_concept_is_set_against_the_control_alone() -> None:
    effects = {"headwater": {"object": 0.6, "studio": 0.1}, "das": {"object": 0.2, "studio": 0.2}}
    effects[removal_record.ASKED_FIRST] = {"object": 0.3, "studio": 0.4}
    rows = [
        {"method": m, "replicate": 0, "concept": kind, "picture": "p", "drop": d, "loss_rise": d}
        for m, of in effects.items()
        for kind, d in of.items()
    ]
    assert removal_record._kinds(rows)[2:] == [
        "| method | object, drop | object, loss rise | studio, drop | studio, loss rise |",
        "|---|---|---|---|---|",
        "| headwater | "
        + " | ".join(["2.00 (2.00 to 2.00)"] * 2 + ["0.25 (0.25 to 0.25)"] * 2)
        + " |",
        "",
    ]
    assert removal_record._kinds([row for row in rows if row["concept"] == "object"]) == []


def test_a_bad_judge_is_refused() -> None:
    trained = tiny_material.pictures()
    with pytest.raises(BenchmarkError, match="judges nothing"):
        counterfactual.judged(trained, tiny_material.pictures(seed=3), ("object",), 1)
    with pytest.raises(BenchmarkError, match="have no studio; their kinds are object, style"):
        counterfactual.judged(trained, trained, ("object", "studio"), 1)


def test_every_label_must_be_measured_on_something(base: Model, judge: LatentClassifier) -> None:
    trained = tiny_material.pictures()
    with pytest.raises(BenchmarkError, match="dog is in 0 of the captions to draw"):
        probe_of(base, judge, trained, trained, Sampling(captions=2), 1)
    unseen = tiny_material.pictures(words=("cat", "dog", "drawing"))
    with pytest.raises(BenchmarkError, match=r"fish is in 2 .* in 0 of the unseen"):
        probe_of(base, judge, trained, unseen, Sampling(captions=12), 1)


SETTINGS: dict[str, Any] = {
    "per_pair": 1,
    "unseen": 40,
    "pixels": 32,
    "concepts": 1,
    "fractions": [0.25],
    "seeds": 2,
    "contexts": 1,
    "query_seeds": 1,
    "captions": 20,
    "draws": 1,
    "sampling_steps": 2,
    "noises": 1,
    "widths": [8, 16],
    "steps": 2,
    "batch": 2,
    "methods": ["d-trak"],
    "dim": 64,
    "classifier_steps": 5,
}


def test_the_whole_benchmark_leaves_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counterfactual, "GATE", 0.0)
    said: list[str] = []
    table = counterfactual.run(tmp_path, device="cpu", say=said.append, **SETTINGS)
    rows = table.to_pylist()
    assert len(rows) == 2 * 2 * 6  # seeds, concepts, methods
    assert {row["removed"] for row in rows} == {10}
    for row in rows:
        if row["method"] in (removal_record.CARRIERS, removal_record.ASKED_FIRST):
            assert row["carriers_removed"] == 1.0
    assert pq.read_table(tmp_path / "counterfactual.parquet").equals(table)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["settings"].items() >= SETTINGS.items()
    assert set(counterfactual.SMALL) <= set(config["settings"])
    text = (tmp_path / "counterfactual.md").read_text()
    assert "## 25% of the corpus removed" in text
    assert (tmp_path / "counterfactual-drop.png").is_file()
    assert any(line.startswith("24 removals") for line in said)

    alone = SETTINGS | {"seeds": 1, "first_seed": 1}
    later = counterfactual.run(tmp_path / "later", device="cpu", say=said.append, **alone)
    assert_alike(later, table.filter(pc.equal(table["replicate"], 1)))

    trained: list[int] = []  # models at a time
    most = [2]  # of everything, and some of those trained again
    train = counterfactual.train

    def spied(base: Model, lessons: Any, jobs: Any, *rest: Any, **more: Any) -> Any:
        if len(trained) == most[0]:
            raise Stopped
        trained.append(len(jobs))
        return train(base, lessons, jobs, *rest, **more)

    monkeypatch.setattr(counterfactual, "train", spied)
    few = SETTINGS | {"at_once": 6, "device": "cpu"}
    for say in (stopping_at("seed 1, random:"), lambda _: None):
        with pytest.raises(Stopped):
            counterfactual.run(tmp_path / "broken", say=say, **few)
        monkeypatch.setattr(counterfactual, "judged", None)  # no other judge is trained
    assert trained == [2, 6]
    most[0] = 99
    said.clear()
    resumed = counterfactual.run(tmp_path / "broken", say=said.append, **few)
    (removals,) = [line for line in said if "different ones" in line]
    assert sum(trained) == 2 + int(removals.split(", ")[1].split()[0])  # each once
    assert_alike(resumed, table)


def assert_alike(one: pa.Table, other: pa.Table) -> None:
    """Which models train together changes rounding."""
    measured = ["presence", *removal_record.MEASURES]
    assert one.drop(measured).equals(other.drop(measured))
    for name in measured:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-3, atol=1e-5)
