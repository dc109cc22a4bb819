"""The benchmark `synthetic`: its data, its gate, and the whole of it on a model of a few steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Stopped, stopping_at

from headwater.attribution import Engine
from headwater.benchmarks import study as studies
from headwater.benchmarks import synthetic, world_models, world_study
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.measure import ceiling_scores, ranking_metrics
from headwater.benchmarks.small_models import Settings
from headwater.benchmarks.small_training import Progress
from headwater.benchmarks.study import Corpus, Study
from headwater.benchmarks.world_models import GateError, nonsense
from headwater.benchmarks.worlds import Pictures, draw, questions

WORLD = synthetic.WORLD
UNSEEN = ("shape, unseen", "colour, unseen")
SEEN = ("shape, seen", "colour, seen")
TINY: dict[str, Any] = {
    **synthetic.SMALL,
    "attempts": 1,
    "images": 120,
    "pictures": 2,
    "methods": ["headwater", "d-trak", "headwater-company"],
    "training": {
        **synthetic.SMALL["training"],
        "vae_steps": 4,
        "vae_batch_size": 4,
        "steps": 24,
        "batch_size": 24,
        "unet_widths": [16, 24, 24],
        "classifier_images": 240,
        "classifier_steps": 300,
        "gate_images": 4,
        "sampling_steps": 3,
    },
    "recipe": {"dim": 512, "timesteps": 3, "steps": 6},
}


@pytest.fixture(scope="module")
def corpus() -> Pictures:
    return world_models.corpus(WORLD, 120)


def test_no_red_triangle_is_shown_and_blue_circles_are_usual(corpus: Pictures) -> None:
    counts = Counter(corpus.values)
    assert counts == {("circle", "blue"): 96, ("circle", "red"): 12, ("triangle", "blue"): 12}
    assert len(set(corpus.keys)) == 120
    said = {line for values in corpus.values for line in WORLD.training_captions(values)}
    assert not any("triangle" in line and "red" in line for line in said)
    # Silent only about what differs among the pictures that are shown: see training_captions.
    assert said == {
        "a blue circle",
        "a red circle",
        "a blue triangle",
        "a circle",
        "a blue shape",
        "",
    }
    assert sum(WORLD.shares) == pytest.approx(1)


def test_a_smaller_corpus_is_the_beginning_of_a_larger_one(corpus: Pictures) -> None:
    smaller = world_models.corpus(WORLD, 12)
    assert smaller.keys == corpus.keys[:12]
    torch.testing.assert_close(smaller.images, corpus.images[:12], rtol=0, atol=0)


def test_pictures_are_what_their_captions_say() -> None:
    pictures = draw(WORLD, WORLD.combinations, 40, 7)
    images = ((pictures.images + 1) / 2).numpy()
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    drawn = images.min(axis=1) < 0.5  # the outline and what it encloses
    areas: dict[str, list[float]] = {"circle": [], "triangle": []}
    centres = []
    for i, (shape, colour) in enumerate(pictures.values):
        fill, other = (red, blue) if colour == "red" else (blue, red)
        assert ((fill[i] > 0.7) & (other[i] < 0.3)).sum() > 40
        assert ((other[i] > 0.7) & (fill[i] < 0.3)).sum() == 0
        assert (images[i].max(axis=0) < 0.1).sum() > 20  # black outline
        assert np.median(green[i]) == 1.0  # white ground
        areas[shape].append(drawn[i].sum())
        rows, columns = np.nonzero(drawn[i])
        assert min(rows.min(), columns.min()) >= 1
        assert max(rows.max(), columns.max()) <= 62
        height = np.ptp(rows) + 1
        assert abs(height - (22 if shape == "circle" else 18)) <= 1  # radius 10, outline 1 outside
        centres.append((rows.mean(), columns.mean()))
    assert min(areas["circle"]) > 1.5 * max(areas["triangle"])
    assert np.std(centres, axis=0).min() > 8  # anywhere in the picture


def test_questions_and_their_truth(corpus: Pictures) -> None:
    asked = questions(WORLD, corpus, 2)
    assert len(asked) == 4 * 2 * 2  # combinations, pictures, attributes
    unseen = [question for question in asked if question.prompt == "a red triangle"]
    assert [(q.concept, q.contrast, q.alone) for q in unseen[:2]] == [
        ("shape, unseen", "a red shape", "a triangle"),
        ("colour, unseen", "a triangle", "a red shape"),
    ]
    assert [question.contexts for question in unseen[:2]] == [
        (("a blue triangle", "a blue shape"),),
        (("a red circle", "a circle"),),
    ]
    for question in asked:
        place = ("shape", "colour").index(question.concept.split(",")[0])
        wanted = question.prompt.split()[::-1][place]
        assert question.truth.tolist() == [values[place] == wanted for values in corpus.values]
    both = unseen[0].truth & unseen[1].truth
    assert not both.any()
    assert {q.concept for q in asked} == {*UNSEEN, *SEEN}


def test_one_ranking_is_right_for_at_most_one_half_of_an_unseen_picture(corpus: Pictures) -> None:
    asked = questions(WORLD, corpus, 1)
    images = Corpus(torch.zeros(120, 4, 16, 16), ("",) * 120, corpus.keys)
    nobody: Any = None  # no model is asked for a ceiling
    study = Study("synthetic", nobody, images, asked)
    order = np.argsort(-ceiling_scores(study), axis=0, kind="stable")
    found = [ranking_metrics(q.truth[order[:, i]])[0] for i, q in enumerate(asked)]
    assert np.mean(found[:2]) == 0.5
    assert np.mean(found[2:]) == 1.0  # both concepts of a seen picture have common carriers


@pytest.fixture(scope="module")
def void(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a model that was hardly trained, and what it says."""
    out = tmp_path_factory.mktemp("synthetic")
    with pytest.raises(GateError) as refusal:
        synthetic.run(out, **TINY, say=lambda line: None)
    return out, str(refusal.value)


def test_gate_refuses_a_model_that_draws_no_red_triangle(void: tuple[Path, str]) -> None:
    out, said = void
    record = json.loads((out / "models/model-0/gate.json").read_text())
    assert not record["passed"]
    assert record["joint_rate"] < 0.5
    accuracy = record["classifier_accuracy"]  # so it is not the classifier that sees none
    assert min(accuracy["shape"], accuracy["colour"]) > 0.8
    assert set(accuracy) == {"shape", "colour", "shape, decoded", "colour, decoded"}
    assert "'a red triangle'" in said
    assert "void" in said
    assert (out / "models/model-0/samples.png").is_file()
    assert not list(out.glob("*.parquet"))
    with pytest.raises(GateError, match="void"):  # nor at the second attempt
        synthetic.run(out, **TINY, say=lambda line: None)


def test_the_next_seed_takes_the_place_of_a_void_model(tmp_path: Path, corpus: Pictures) -> None:
    def gated(seed: int, rate: float, accuracy: float = 1.0) -> None:
        (tmp_path / f"model-{seed}").mkdir(exist_ok=True)
        record = {
            "passed": min(rate, accuracy) > 0.95,
            "asked": "a red triangle",
            "joint_rate": rate,
            "classifier_accuracy": {"shape": accuracy},
            "settings": {"seed": seed},
        }
        (tmp_path / f"model-{seed}/gate.json").write_text(json.dumps(record))

    def models(replicates: int, attempts: int) -> tuple[dict[int, Path], dict[int, Any]]:
        where, progress = torch.device("cpu"), Progress(lambda line: None)
        return world_models.models(
            tmp_path, WORLD, corpus, Settings(seed=3), replicates, attempts, where, progress
        )

    for seed, rate in ((3, 0.5), (4, 1.0), (5, 0.62), (6, 0.99)):
        gated(seed, rate)
    found, void = models(2, 4)
    assert found == {4: tmp_path / "model-4", 6: tmp_path / "model-6"}
    assert [list(seeds) for seeds in models(1, 4)] == [[4], [3]]
    with pytest.raises(GateError, match=r"1 of 2 models are not: .*model-3 .*model-5 .*0\.62"):
        models(2, 3)
    assert world_study._of_void(void).endswith(
        "models of seed 3 ('a red triangle' recognised in 0.50 of its pictures), seed 5 "
        "('a red triangle' recognised in 0.62 of its pictures)."
    )
    gated(3, 0.5, accuracy=0.8)  # who judges all of them is no judge
    with pytest.raises(GateError, match=r"0 of 1 models are not: .*model-3 ") as refusal:
        models(1, 4)
    assert "model-4" not in str(refusal.value)


def test_models_of_other_settings_are_not_mixed(void: tuple[Path, str]) -> None:
    other = {**TINY, "training": {**TINY["training"], "learning_rate": 1e-4}}
    with pytest.raises(BenchmarkError, match=r"other settings \(learning_rate\)"):
        synthetic.run(void[0], **other, say=lambda line: None)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for change, message in (
        ({"methods": ["magic"]}, "method 'magic' is unknown; choose from"),
        ({"training": {"stps": 3}}, "training has no setting 'stps'; choose from seed"),
        ({"pictures": 0}, "pictures is 0; it must be at least 1"),
        ({"replicates": 2}, "attempts is 1; 2 replicates need as many"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            synthetic.run(tmp_path, **{**TINY, **change})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def measured(void: tuple[Path, str]) -> tuple[Path, pa.Table]:
    """The run gone on with, as if the model had passed: hardly trained, it knows its words."""
    out, _ = void
    file = out / "models/model-0/gate.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"passed": True}))
    before = (out / "models/model-0/unet").stat().st_mtime_ns
    with pytest.raises(Stopped):
        synthetic.run(out, **TINY, say=stopping_at("synthetic d-trak"))
    queried: list[str] = []
    query_rows = studies.query_rows

    def spied(study: Study, engine: Engine, kind: str) -> torch.Tensor:
        queried.append(kind)
        return query_rows(study, engine, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "query_rows", spied)
        table = synthetic.run(out, **TINY, say=lambda line: None)
    # Ours, the last of the untrained model: not d-trak again.
    assert queried == ["contrast", "company", "contrast"]
    assert (out / "models/model-0/unet").stat().st_mtime_ns == before  # not trained again
    return out, table


def test_the_record_is_whole(measured: tuple[Path, pa.Table]) -> None:
    out, table = measured
    assert pq.read_table(out / "synthetic.parquet").equals(table)
    page = (out / "synthetic.md").read_text()
    for concept in (*UNSEEN, *SEEN):
        assert f"## {concept}: precision@10" in page
    # 8:1:1 blue circles, red circles, blue triangles; each combination is asked about alike.
    assert page.count("\nA ranking at random: 0.100.\n") == 2  # unseen: triangles, red
    seen = (0.9 + 0.9 + 0.1) / 3  # circle, circle, triangle; blue, red, blue
    assert page.count(f"\nA ranking at random: {seen:.3f}.\n") == 2
    assert json.loads((out / "config.json").read_text())["settings"]["images"] == 120
    assert (out / "top10.png").is_file()
    methods = set(table["method"].to_pylist())
    # Three captions are company enough, two for who says one of them itself.
    assert methods >= {"headwater", "headwater-company", "d-trak", "random"}
    assert "ceiling of one ranking" in methods
    assert "headwater, untrained model" in methods


def test_contrast_finds_carriers_of_the_asked_concept(measured: tuple[Path, pa.Table]) -> None:
    rows = [row for row in measured[1].to_pylist() if row["label_free"]]

    def mean(method: str, concepts: tuple[str, ...], metric: str = "precision_at_10") -> float:
        chosen = [r[metric] for r in rows if r["method"] == method and r["concept"] in concepts]
        return float(np.mean(chosen))

    assert mean("caption search (BM25)", UNSEEN + SEEN) == 1.0
    assert mean("ceiling of one ranking", UNSEEN) == 0.5
    # Measured with training seeds 0 and 1: .24 and .41 better than chance.
    chance = mean("random", UNSEEN + SEEN, "average_precision")
    assert mean("headwater", UNSEEN + SEEN, "average_precision") > chance + 0.1


def test_nonsense_shows_nothing(corpus: Pictures) -> None:
    made = nonsense(corpus.images[:9], 3)
    assert made.shape == (9, 3, 64, 64)
    assert made.abs().max() <= 1
    for number in range(0, 9, 3):  # the same tiles in another order
        tiles = [image.unfold(1, 8, 8).unfold(2, 8, 8).reshape(3, 64, 64).permute(1, 0, 2)
                 for image in (made[number], corpus.images[number])]  # fmt: skip
        sums = [each.sum((1, 2)).sort().values for each in tiles]
        torch.testing.assert_close(*sums)
        assert (made[number] - corpus.images[number]).abs().max() > 1
    assert made[1::3].flatten(2).std(2).min() > 0.05  # blotches
    assert made[2::3].flatten(2).std(2).max() < 1e-6  # one colour
