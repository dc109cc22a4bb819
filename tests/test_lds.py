"""Linear datamodelling scores: sums, ranks, utilities by a plain loop, a true effect foreseen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import tiny_material
import torch
from conftest import Stopped, stopping_at
from tiny import stable_diffusion
from torch import Tensor, nn

from headwater.attribution import Model, Recipe, seeded_noise
from headwater.benchmarks import correlation, lds, ranks, record
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.material import Material
from headwater.benchmarks.methods import chosen as methods_of
from headwater.benchmarks.noised import heard, noised
from headwater.benchmarks.ranks import spearman
from headwater.benchmarks.retraining import Job, Training, saved_model, small_unet, train
from headwater.benchmarks.stacked import chosen, taken
from headwater.benchmarks.study import Answers, Configuration, Study, answer

SUBSETS = 10
TRAINING = Training(widths=(8, 16), steps=80, batch=8, learning_rate=1e-2)


@dataclass(frozen=True)
class Trained:
    """Models of ten halves of the tiny material, and one of all of it, asked about its pictures."""

    base: Model
    material: Material
    halves: npt.NDArray[np.bool_]
    retrained: nn.Module
    attributed: Model
    asked: lds.Asked
    utility: Tensor  # [Q, K]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    base = Model.from_pipeline(stable_diffusion(), device="cpu")
    material = tiny_material.material()
    count = len(material.trained)
    halves = lds.random_halves(count, SUBSETS)
    jobs = [Job(torch.from_numpy(half.nonzero()[0]), seed=0) for half in halves]
    jobs.append(Job(torch.arange(count), lds.FULL_SEED))
    lessons = material.lessons(base)
    whole = train(base, lessons, jobs, TRAINING, at_once=99, say=lambda _: None)
    folder = tmp_path_factory.mktemp("lds") / "model"
    attributed = saved_model(base, whole, SUBSETS, TRAINING, folder)
    retrained = chosen(whole, range(SUBSETS))
    pictures = material.trained
    asked = lds.Asked(pictures, ("validation",) * count, noised(base, pictures, 5))
    utility = lds.utilities(base, retrained, attributed, asked)
    return Trained(base, material, halves, retrained, attributed, asked, utility)


def test_ranks_correlate_as_in_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for size in (2, 5, 64):
        for values in (generator.normal(size=size), generator.integers(0, 3, size).astype(float)):
            other = generator.normal(size=size) + values
            if len(set(values)) > 1:
                expected = stats.spearmanr(values, other).statistic
                assert spearman(values, other) == pytest.approx(expected, abs=1e-12)
    assert spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_scores_of_members_are_added_up() -> None:
    generator = np.random.default_rng(1)
    scores, true = generator.normal(size=(9, 3)), generator.normal(size=(3, 6))
    halves = lds.random_halves(9, 6)
    found = ranks.lds(scores, halves, true)
    for question in range(3):
        sums = []
        for half in halves:
            total = 0.0
            for image in range(9):
                if half[image]:
                    total += scores[image, question]
            sums.append(total)
        assert found[question] == pytest.approx(spearman(np.array(sums), true[question]))


def test_subsets_are_halves_and_differ() -> None:
    halves = lds.random_halves(21, 40)
    assert set(halves.sum(1)) == {10}
    assert len({half.tobytes() for half in halves}) == 40
    assert np.array_equal(halves, lds.random_halves(21, 40))


def test_what_one_seed_says_of_the_others() -> None:
    measured = np.random.default_rng(2).normal(size=(1, 8, 3))
    each = []
    for seed in range(3):
        others = [s for s in range(3) if s != seed]
        mean = (measured[0, :, others[0]] + measured[0, :, others[1]]) / 2
        each.append(spearman(measured[0, :, seed], mean))
    assert ranks.repeatability(measured)[0] == pytest.approx(np.mean(each))


def test_utilities_are_those_of_a_plain_loop(trained: Trained) -> None:
    base, pictures, model = trained.base, trained.asked.pictures, trained.attributed
    places = (0, 7)
    template = small_unet(base, TRAINING.widths, 8, 0)
    unet: Any = taken(trained.retrained, 3, template)
    expected, energy = np.zeros((3, 2)), np.zeros((3, 2))  # loss, object, style
    energy[0] = 1
    for column, place in enumerate(places):
        noise = seeded_noise(0, f"utility/{pictures.keys[place]}", (5, 4, 8, 8))
        for level, t in enumerate((100, 300, 500, 700, 900)):
            t_ = torch.tensor([t])
            a, s = base.coefficients(t_)
            x_t = a * pictures.x_0[place : place + 1] + s * noise[level : level + 1]
            heard = base.encode_prompts([pictures.captions[place]])
            assert heard is not None
            with torch.no_grad():
                e = unet(x_t, t_, **heard.tensors).sample[0].double()
                r = e - noise[level].double()
                expected[0, column] -= float(r.square().mean()) / 5
                full = model.noise(x_t, t_, heard)
                for row, kind in enumerate(("object", "style"), start=1):
                    lacking = base.encode_prompts([pictures.lacking[kind][place]])
                    g = (full - model.noise(x_t, t_, lacking))[0].double()
                    expected[row, column] += float((r * g).sum())
                    energy[row, column] += float(g.square().sum())
    found = trained.utility[:, 3].view(3, -1)[:, places].numpy()
    np.testing.assert_allclose(found, expected / np.sqrt(energy), rtol=1e-3, atol=1e-4)


def test_scores_foresee_what_retraining_shows(trained: Trained) -> None:
    """Each picture's caption is its own, so that it is known well where it was seen."""
    count = len(trained.material.trained)
    study = lds.study_of(trained.attributed, trained.material, trained.asked, 1, 0)
    assert {len(question.company) for question in study.questions} == {4}
    assert [q.concept.split(",")[0] for q in study.questions[::count]] == [
        "loss",
        "object",
        "style",
    ]
    own = [
        spearman(trained.halves[:, i].astype(float), trained.utility[i].numpy())
        for i in range(count)
    ]
    assert np.mean(own) > 0.6
    recipe = Recipe(dim=512, timesteps=5, steps=10)
    methods = lds.with_images(methods_of(["trak", "d-trak", "headwater"], recipe))
    utility = trained.utility.view(len(trained.utility), SUBSETS, 1).numpy()
    table = correlation.scored(study, utility, trained.halves, methods, lambda _: None)
    records = table.to_pylist()
    means = {
        method: np.mean(
            [
                r["lds"]
                for r in records
                if r["method"] == method and r["label_free"] and r["concept"] == "loss, validation"
            ]
        )
        for method in dict.fromkeys(r["method"] for r in records)
    }
    assert abs(means["random"]) < 0.15
    for method in ("trak", "d-trak", "headwater (image)"):
        assert means[method] > 0.2


def test_unknown_methods_are_refused_and_concepts_are_also_asked_as_images() -> None:
    with pytest.raises(BenchmarkError, match="method 'guess' is unknown; choose from trak"):
        methods_of(["guess"])
    found = lds.with_images(methods_of(["d-trak", "headwater"]))
    assert [(m.name, m.query) for m in found] == [
        ("d-trak", "image"),
        ("headwater", "contrast"),
        ("headwater (image)", "image"),
    ]
    assert len(methods_of()) > 5


def test_ours_is_set_against_d_trak() -> None:
    rows = [
        {"concept": concept, "method": method, "lds": value, "label_free": free}
        for concept, method, value, free in (
            ("loss, validation", "headwater-image", 0.3, True),
            ("loss, validation", "headwater-image", 0.5, True),
            ("loss, validation", "headwater-image", 0.9, False),
            ("loss, validation", "headwater", 0.1, True),
            ("loss, validation", "d-trak", 0.2, True),
            ("object, generated", "headwater", 0.3, True),
            ("object, generated", "d-trak", -0.2, True),
            ("object, validation", "headwater", 0.3, True),
            ("style, generated", "d-trak", 0.2, True),
        )
    ]
    assert lds.bars(rows).splitlines() == [
        "- loss, validation: d-trak 0.200, headwater-image 0.400 (2.00 times), "
        "headwater 0.100 (0.50 times)",
        "- object, generated: d-trak -0.200, headwater 0.300",
    ]


def test_too_few_subsets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="2 subsets have no ranks"):
        lds.run(tmp_path, subsets=2)


SETTINGS: dict[str, Any] = {
    "per_pair": 1,
    "pixels": 32,
    "subsets": 3,
    "seeds": 2,
    "replicates": 1,
    "questions": 2,
    "noises": 2,
    "widths": [8, 16],
    "steps": 2,
    "batch": 2,
    "methods": ["d-trak"],
    "dim": 64,
    "query_seeds": 1,
}


def test_the_whole_benchmark_leaves_a_record_that_replays(tmp_path: Path) -> None:
    settings = SETTINGS
    tables = []
    for folder in ("first", "again"):
        if folder == "again":
            settings = json.loads((tmp_path / "first" / "config.json").read_text())["settings"]
        tables.append(lds.run(tmp_path / folder, device="cpu", say=lambda _: None, **settings))
    assert tables[0].drop(["ingest_seconds"]).equals(tables[1].drop(["ingest_seconds"]))
    first = tmp_path / "first"
    assert pq.read_table(first / "lds.parquet").num_rows == tables[0].num_rows
    assert (first / "models" / "replicate-0" / "model_index.json").is_file()
    rows = tables[0].to_pylist()
    assert {r["method"] for r in rows} == {
        "another training",
        "random",
        "caption search (BM25)",
        "nearest latents",
        "d-trak",
    }
    assert {r["concept"] for r in rows} == {
        f"{kind}, {where}"
        for kind in ("loss", "object", "studio")
        for where in ("validation", "generated")
    }
    text = (first / "lds.md").read_text()
    assert "another training" in text
    assert set(lds.SMALL) <= set(json.loads((first / "config.json").read_text())["settings"])


def test_a_broken_off_run_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "plot_lambda", lambda *args: None)  # tested with the record
    monkeypatch.setattr(record, "plot_cost", lambda *args: None)
    asked: list[str] = []

    def answered(study: Study, configuration: Configuration) -> Answers:
        asked.append(configuration.name)
        return answer(study, configuration)

    monkeypatch.setattr(correlation, "answer", answered)
    settings = {**SETTINGS, "questions": 1}
    settings |= {"methods": ["trak", "tracin"], "device": "cpu"}
    whole = lds.run(tmp_path / "whole", say=lambda _: None, **settings)
    assert asked == ["trak", "tracin"]
    with pytest.raises(Stopped):
        lds.run(tmp_path / "broken", say=stopping_at("lds 0 trak"), **settings)
    monkeypatch.setattr(lds, "train", None)  # whoever trains again fails
    asked.clear()
    found = lds.run(tmp_path / "broken", say=lambda _: None, **settings)
    assert asked == ["tracin"]
    assert found.drop(["ingest_seconds"]).equals(whole.drop(["ingest_seconds"]))


class Hearing(nn.Module):
    """A stack that predicts e(c-) + k (e(c) - e(c-)), for each k of `shares`, of one picture."""

    def __init__(self, model: Model, lacking: str, shares: tuple[float, ...]) -> None:
        super().__init__()
        self.shares = nn.Parameter(torch.tensor(shares))
        self.model, self.lacking = [model], lacking  # listed: no part of this module

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        (model,) = self.model
        without = model.noise(x, timestep, model.encode_prompts([self.lacking] * len(x)))
        full = model.noise(x, timestep, heard(encoder_hidden_states))
        share = self.shares.repeat(len(x) // len(self.shares))[:, None, None, None]
        return SimpleNamespace(sample=without + share * (full - without))


def test_a_model_that_hears_a_concepts_words_knows_it_better(trained: Trained) -> None:
    """The sign of a concept's utility: up by |g| from a model that is deaf to its words."""
    model, pictures = trained.attributed, trained.material.unseen
    for row, kind in enumerate(("object", "style"), start=1):
        one = pictures.rows([5])
        asked = lds.Asked(one, ("validation",), noised(trained.base, one, 4))
        stack = Hearing(model, one.lacking[kind][0], (-1.0, 0.0, 0.5, 1.0))
        found = lds.utilities(trained.base, stack, model, asked)[row]
        length = 0.0
        for level, t in enumerate(asked.noised.t):
            a, s = model.coefficients(t[None])
            x_t = a * one.x_0 + s * asked.noised.noise[:, level]
            said = [model.encode_prompts([c]) for c in (one.captions[0], one.lacking[kind][0])]
            full, without = (model.noise(x_t, t[None], states).double() for states in said)
            length += float((full - without).square().sum())
        expected = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64) * length**0.5
        torch.testing.assert_close(found[[0, 2, 3]] - found[1], expected, rtol=1e-3, atol=1e-4)
        assert found.tolist() == sorted(found.tolist())
