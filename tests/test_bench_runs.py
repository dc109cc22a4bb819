"""Runs of benchmarks: what is kept when one is broken off, what a record is made with."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import Stopped, stopping_at
from tiny import stable_diffusion

from headwater.attribution import Engine, Model, Recipe
from headwater.attribution.recipe import CODE_VERSION
from headwater.benchmarks import runs
from headwater.benchmarks import study as studies
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.measure import measure
from headwater.benchmarks.parts import NOWHERE, Parts
from headwater.benchmarks.runs import Run, begin, digest, replaying
from headwater.benchmarks.study import Configuration, Corpus, Question, Study

TABLE = pa.table({"value": [1.5, None], "top": [["a"], []]})


def started(out: Path, say: Callable[[str], object] = print, **changes: Any) -> Run:
    given = {"settings": {"rows": 3, "widths": (1, 2)}, "corpus": "c0"}
    return begin(out, "emoji", say=say, **{**given, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pipeline(stable_diffusion(), device="cpu")


def test_parts_are_there_when_they_are_whole(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts")
    assert parts.done("a", 0) is None
    assert len(parts) == 0
    made: list[str] = []

    def make(name: str) -> Callable[[], pa.Table]:
        return lambda: (made.append(name), TABLE)[1]

    for key in (("a b", 0), ("a", "b", 0), ("a/b", 0), ("a b", 1)):  # alike in their letters
        assert parts.once(make(str(key)), *key).equals(TABLE)
    assert len(parts) == len(made) == 4
    again = Parts(tmp_path / "parts")
    assert again.once(make("again"), "a b", "0").equals(TABLE)
    assert len(made) == 4
    (tmp_path / "parts" / "half.partial").write_text("")
    assert len(again) == 4
    again.remove()
    assert not (tmp_path / "parts").exists()
    NOWHERE.keep(TABLE, "a")
    assert NOWHERE.done("a") is None
    assert len(NOWHERE) == 0


def test_a_broken_off_study_goes_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x_0 = torch.randn(6, *model.sample_shape, generator=torch.Generator().manual_seed(0))
    captions = ("a cat", "a dog") * 3
    truth = np.arange(6) % 2 == 0
    asked = (Question("object", "a cat", "a", "cat", truth),)
    corpus = Corpus(x_0, captions, tuple("abcdef"))
    study = Study("tiny", model, corpus, asked, seeds=1, steps=3)
    recipe = Recipe(dim=32, timesteps=2, steps=4)
    methods = [
        Configuration("first", recipe),
        Configuration("second", replace(recipe, method="das")),
    ]
    queried: list[str] = []
    query_rows = studies.query_rows

    def spied(study: Study, engine: Engine, kind: str) -> torch.Tensor:
        queried.append(engine.recipe.method)
        return query_rows(study, engine, kind)

    monkeypatch.setattr(studies, "query_rows", spied)
    whole = measure(study, methods, lambda _: None)
    assert queried == ["dtrak", "das"]
    parts = Parts(tmp_path)
    with pytest.raises(Stopped):
        measure(replace(study), methods, stopping_at("tiny first"), parts=parts)
    said: list[str] = []
    found = measure(replace(study), methods, said.append, parts=parts)
    assert queried == ["dtrak", "das", "dtrak", "das"]
    seconds = ["ingest_seconds", "query_seconds"]
    assert found.drop(seconds).equals(whole.drop(seconds))
    assert [line.split(":")[0].split(" (damping")[0] for line in said[-2:]] == [
        "tiny first",
        "tiny second",
    ]
    measure(replace(study, replicate=1), methods, lambda _: None, parts=parts)
    assert len(queried) == 6  # another replicate's are its own


def test_a_run_is_on_record_from_its_beginning(tmp_path: Path, model: Model) -> None:
    out = tmp_path / "out"
    run = started(out, model=model)
    config = json.loads((out / "config.json").read_text())
    assert config == run.config
    assert config["settings"] == {"rows": 3, "widths": [1, 2]}
    assert config["finished"] is False
    assert (config["code"], config["corpus"]) == (CODE_VERSION, "c0")
    assert (config["model"], config["device"]) == (model.fingerprint, "cpu")
    run.parts.keep(TABLE, "a")
    run.finish(accuracy=0.5)
    after = json.loads((out / "config.json").read_text())
    assert after == config | {"finished": True, "accuracy": 0.5}
    assert not (out / "parts").exists()


def test_a_run_goes_on_as_it_began_or_not_at_all(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(tmp_path).parts.keep(TABLE, "a")
    before = (tmp_path / "config.json").read_text()
    others: list[tuple[dict[str, Any], str]] = [
        ({"settings": {"rows": 4, "widths": [1, 2]}}, r"other settings \(rows\)"),
        ({"corpus": "c1"}, r"other corpus \(c0, now c1\)"),
        ({"model": model}, r"other model \(denoiser, pipeline, .*\)"),
        ({"device": torch.device("meta")}, r"other device \(cpu, now meta\)"),
    ]
    for changes, message in others:
        with pytest.raises(BenchmarkError, match=message) as refusal:
            started(tmp_path, **changes)
        assert "choose another --out, or remove that folder" in str(refusal.value)
    monkeypatch.setattr(runs, "CODE_VERSION", CODE_VERSION + 1)
    with pytest.raises(BenchmarkError, match=r"other code"):
        started(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "config.json").read_text() == before
    said: list[str] = []
    run = started(tmp_path, said.append)
    assert run.parts.done("a").equals(TABLE)  # type: ignore[union-attr]
    assert "earlier" not in run.config
    assert said == [f"1 parts are in {tmp_path / 'parts'}; the run goes on with them"]
    monkeypatch.setattr(runs, "_commit", lambda: "another")
    said.clear()
    run = started(tmp_path, said.append)
    first = json.loads(before)["commit"]
    assert run.config["earlier"] == [{"commit": first}]
    assert "made with other commit; the run goes on" in said[0]
    assert started(tmp_path).config["earlier"] == [{"commit": first}]  # told once
    (tmp_path / "config.json").unlink()
    with pytest.raises(BenchmarkError, match="other benchmark"):
        started(tmp_path)


def test_a_replay_that_is_not_as_its_record_says_so(tmp_path: Path, model: Model) -> None:
    record = started(tmp_path / "record", model=model).config
    said: list[str] = []
    with replaying(record):
        started(tmp_path / "again", said.append, model=model)
    assert not said
    changed = record | {"commit": "abc", "model": record["model"] | {"vae": "other"}}
    with replaying(changed):
        started(tmp_path / "again", said.append, model=model, corpus="c1")
    assert len(said) == 1
    assert said[0].startswith("not made as the replayed record was: other commit (abc, now ")
    assert said[0].endswith("), model (vae), corpus (c0, now c1)")
    with replaying({"benchmark": "emoji", "settings": {}}):  # of a record that pins nothing
        started(tmp_path / "old", said.append)
    started(tmp_path / "none", said.append)
    assert len(said) == 1


def test_the_digest_is_of_names_and_values() -> None:
    table = pa.table({"key": ["a", "b"], "image": [b"1", b"23"]})
    assert digest(table) == digest(pa.concat_tables([table[:1], table[1:]]).select([1, 0]))
    others = [
        pa.table({"key": ["a", "c"], "image": [b"1", b"23"]}),
        pa.table({"key": ["a", "b"], "image": [b"12", b"3"]}),
        pa.table({"key": ["a", "b"], "picture": [b"1", b"23"]}),
        pa.table({"key": ["a", None], "image": [b"1", b"23"]}),
        table[:1],
    ]
    assert len({digest(table), *map(digest, others)}) == 6


def test_the_commit_is_that_of_a_checkout_with_this_very_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        name = ("-c", "user.name=t", "-c", "user.email=t")
        command = ["git", *name, "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    here = tmp_path / "runs.py"
    here.write_text("")
    monkeypatch.setattr(runs, "__file__", str(here))
    assert runs._commit() is None
    git("init", "--quiet")
    (tmp_path / "other").write_text("")
    git("add", "other")
    git("commit", "--quiet", "--message", "m")
    assert runs._commit() is None  # installed in somebody's checkout
    git("add", "runs.py")
    git("commit", "--quiet", "--message", "m")
    assert runs._commit() == git("rev-parse", "HEAD")
    here.write_text("changed")
    assert runs._commit() == git("rev-parse", "HEAD") + "-dirty"
