"""abc-mini: subjects, lesson and truth, the controls, and a small run from beginning to end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from conftest import SHARED, Stopped, stopping_at
from PIL import Image

from headwater.attribution import Model
from headwater.benchmarks import abc_mini, record
from headwater.benchmarks.abc_mini import (
    DEMO,
    encoded,
    make_lesson,
    make_study,
    read_corpus,
    recognised,
    teach,
)
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.finetuning import FineTuning
from headwater.benchmarks.methods import chosen, configurations
from headwater.benchmarks.study import Configuration, Study
from headwater.benchmarks.subjects import Mascot, colours
from headwater.demo.run import demo_model
from headwater.queries.gradients import to_images


def test_a_mascot_is_what_its_seed_says() -> None:
    one = Mascot.invent(0, 3)
    assert one == Mascot.invent(0, 3)
    assert one != Mascot.invent(1, 3)
    picture = np.asarray(one.draw(np.random.default_rng(5)))
    assert picture.shape == (64, 64, 3)
    np.testing.assert_array_equal(picture, one.draw(np.random.default_rng(5)))
    assert not np.array_equal(picture, one.draw(np.random.default_rng(6)))


def test_mascots_are_told_by_their_colours() -> None:
    """Thirty of them, by the mean of eight draws and then by four others."""

    def found(number: int, draws: range) -> np.ndarray[Any, Any]:
        mascot = Mascot.invent(0, number)
        return np.stack([colours(mascot.draw(np.random.default_rng([number, d]))) for d in draws])

    known = np.stack([found(number, range(8)).mean(0) for number in range(30)])
    asked = np.stack([found(number, range(8, 12)) for number in range(30)])
    nearest = np.abs(asked[:, :, None] - known).sum(-1).argmin(-1)
    assert (nearest == np.arange(30)[:, None]).mean() > 0.95  # by chance 1 / 30


def test_colours_are_shares_of_what_is_not_white() -> None:
    picture = np.full((2, 2, 3), 255, np.uint8)
    picture[0] = (255, 0, 130)
    shares = colours(Image.fromarray(picture))
    assert shares[3 * 16 + 0 * 4 + 2] == shares.sum() == 1
    assert colours(Image.new("RGB", (2, 2), "white")).sum() == 0


@pytest.fixture(scope="module")
def known() -> pa.Table:
    return read_corpus(None, 10, 0)


def test_a_lesson_holds_exemplars_after_the_corpus(known: pa.Table) -> None:
    lesson = make_lesson(known, [2, 1], DEMO, 0)
    assert lesson.words == ("<new0>", "<new1>")
    assert lesson.owner == [0, 0, 1]
    assert lesson.keys[10:] == ("subject-0/0", "subject-0/1", "subject-1/0")
    assert list(lesson.keys[:10]) == known["image_id"].to_pylist()
    assert len(lesson.images) == len(lesson.keys) == 13
    assert lesson.told("named")[10:] == ("a <new0>", "a <new0>", "a <new1>")
    assert lesson.told("silent")[10:] == ("a drawing",) * 3
    assert lesson.told("named")[:10] == lesson.told("silent")[:10] == lesson.captions
    wrong = lesson.told("wrong")
    assert set(wrong[10:]) <= set(lesson.captions)
    assert (len(wrong), wrong[:10]) == (13, lesson.captions)
    drawn = Mascot.invent(0, 1).draw(np.random.default_rng([0, 1, 0]))
    assert lesson.images[12].tobytes() == drawn.tobytes()
    taught_with = {image.tobytes() for image in lesson.images}
    assert not taught_with & {image.tobytes() for image in lesson.fresh}
    other = make_lesson(known, [2, 1], DEMO, 1)
    assert other.images[10].tobytes() != lesson.images[10].tobytes()


@pytest.fixture(scope="module")
def base() -> Model:
    return demo_model("cpu")


@pytest.fixture(scope="module")
def study(base: Model, known: pa.Table) -> Study:
    lesson = make_lesson(known, [1, 3], DEMO, 0)
    x_0 = encoded(base, lesson.images)
    tuning = FineTuning(steps=1, batch=1)
    taught = teach(base, lesson, x_0, "inversion", tuning, lambda _: None)
    study = make_study("inversion, silent", taught, lesson, x_0, "silent", 2, 8, 4)
    pictures = [question.picture for question in study.questions]
    study.given.update({picture: x_0[i] for i, picture in enumerate(pictures)})  # type: ignore[attr-defined]
    return study


def test_the_exemplars_of_a_subject_are_its_truth(study: Study) -> None:
    assert [q.concept for q in study.questions] == ["1 exemplar", "3 exemplars"]
    assert [np.flatnonzero(q.truth).tolist() for q in study.questions] == [[10], [11, 12, 13]]
    assert [(q.prompt, q.contrast) for q in study.questions] == [
        ("a <new0>", "a drawing"),
        ("a <new1>", "a drawing"),
    ]
    assert study.replicate == 4
    assert set(study.corpus.captions[10:]) == {"a drawing"}


def test_pictures_are_recognised_by_their_colours(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abc_mini, "_REFERENCES", 2)
    first, second = (to_images(study.model, study.pictures[i : i + 1])[0] for i in (0, 2))
    other = Image.new("RGB", first.size, "yellow")
    assert recognised(study, [first, first, second, second]) == 1.0
    assert recognised(study, [second, second, first, first]) == 0.0
    assert recognised(study, [first, other, other, other]) == 0.5


def test_the_two_ways_of_teaching(base: Model, known: pa.Table) -> None:
    lesson = make_lesson(known, [1, 2], DEMO, 0)
    x_0 = encoded(base, lesson.images)
    tuning = FineTuning(steps=2, batch=2)
    taught = {way: teach(base, lesson, x_0, way, tuning, lambda _: None) for way in abc_mini.WAYS}
    own = base.fingerprint["denoiser"]
    assert taught["inversion"].fingerprint["denoiser"] == own
    assert taught["cross-attention"].fingerprint["denoiser"] != own


def run(out: Path, **settings: Any) -> pa.Table:
    small = {
        "rows": 12, "subjects": 1, "exemplars": (1, 2), "steps": 2, "teach_batch": 2, "seeds": 1,
        "batch": 16, "captions": ("named", "silent"), "methods": ("headwater",), "pictured": 2,
        "device": "cpu",
    }  # fmt: skip
    return abc_mini.run(out, **{"say": lambda _: None, **small, **settings})


def test_a_small_run(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"timesteps": 2, "steps": 4, "dim": 64}

    def quick(names: Sequence[str]) -> list[Configuration]:
        return [replace(c, recipe=replace(c.recipe, **few)) for c in chosen(names)]

    monkeypatch.setattr(abc_mini, "chosen", quick)
    for name in ("plot_lambda", "plot_cost"):  # tested with the record, and slow
        monkeypatch.setattr(record, name, lambda *args: None)
    said: list[str] = []
    table = run(tmp_path, model=str(model_folder), say=said.append)
    studies = [f"{way}, {told}" for way in abc_mini.WAYS for told in ("named", "silent")]
    assert list(dict.fromkeys(table["study"].to_pylist())) == studies
    for study in studies:
        folder = tmp_path / study.replace(", ", "-")
        mine = pq.read_table(folder / "abc-mini.parquet")
        assert mine.equals(table.filter(pc.equal(table["study"], study)))
        config = json.loads((folder / "config.json").read_text())
        assert (config["benchmark"], config["settings"]["exemplars"]) == ("abc-mini", [1, 2])
        assert (folder / "abc-mini-top10.png").is_file()
        assert "2 invented subjects" in (folder / "abc-mini.md").read_text()
    assert set(table["carriers"].to_pylist()) == {1, 2}

    def recall(method: str, study: str) -> float:
        mine = pc.and_(pc.equal(table["method"], method), pc.equal(table["study"], study))
        return float(np.mean(table.filter(mine)["recall_at_10"]))

    # Words alone find the exemplars that are named, and none that are silent: all captions tie.
    search = "caption search (BM25)"
    assert recall(search, "cross-attention, named") == 1.0
    assert recall(search, "cross-attention, silent") == 0.0
    told = (tmp_path / "abc-mini.md").read_text()
    assert "| method | " + " | ".join(studies) + " |" in told
    assert any("of the pictures are of their subject" in line for line in said)
    assert not (tmp_path / "parts").exists()

    with pytest.raises(Stopped):
        run(tmp_path / "broken", model=str(model_folder), say=stopping_at("silent headwater"))
    taught: list[str] = []
    teach = abc_mini.teach

    def spied(base: Model, lesson: Any, x_0: Any, way: str, *rest: Any) -> Model:
        taught.append(way)
        return teach(base, lesson, x_0, way, *rest)

    monkeypatch.setattr(abc_mini, "teach", spied)
    resumed = run(tmp_path / "broken", model=str(model_folder), say=said.append)
    assert taught == ["cross-attention"]  # the other was, and is asked as it was taught
    seconds = ["ingest_seconds", "query_seconds"]
    assert resumed.drop(seconds).equals(table.drop(seconds))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": ("lora",)}, "ways .*lora.*: choose among inversion, cross-attention"),
        ({"captions": ()}, r"captions \[\]: choose among named, wrong, silent"),
        ({"subjects": 0}, "subjects 0 is not positive"),
        ({"exemplars": (4, 0)}, "from 1 up"),
        ({"wording": ("a {}",)}, "with, without, known word"),
        ({"methods": ("trac",)}, "method 'trac' is unknown"),
        ({"rows": 10**6}, "set fewer rows"),
        ({"corpus": "c"}, "--corpus c needs --model, whose text encoder knows its words"),
    ],
)
def test_settings_that_are_none_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"holds no train\.parquet; give the corpus's folder"):
        read_corpus(str(tmp_path), 1, 0)


def test_the_small_version_names_methods_that_there_are() -> None:
    assert set(abc_mini.SMALL["methods"]) <= configurations().keys()


def test_the_wording_is_that_of_the_emoji_corpus() -> None:
    folder = SHARED / "corpora" / "emoji"
    if not folder.exists():
        pytest.skip(f"no corpus at {folder}")
    table = read_corpus(str(folder), 50, 0)
    assert table.column_names == ["image_id", "image", "caption"]
    assert all(" emoji in " in caption for caption in table["caption"].to_pylist())
    again, other = read_corpus(str(folder), 50, 0), read_corpus(str(folder), 50, 1)
    assert table.equals(again)
    assert not table.equals(other)
