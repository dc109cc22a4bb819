"""The speed benchmark runs whole on tiny models, and its arithmetic is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from inspect import signature
from pathlib import Path

import pytest
import tiny
from conftest import Command

from headwater import commands_bench
from headwater.attribution import Recipe
from headwater.benchmarks import sizes, speed


def test_forward_equivalents() -> None:
    assert speed.equivalents(Recipe()) == 20  # 10 points, a forward and a backward pass each
    assert speed.equivalents(Recipe(method="dps")) == 130  # 50 guided steps, 10 x (1 + 2)
    line = speed.Measured("m", "r", "plain", 4, 2.0, 1.0, forward=0.075, equivalents=20)
    assert line.rate == 2.0
    assert line.of_floor == pytest.approx(0.75)


def test_whole_run_on_tiny_models(
    headwater: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sizes, "PIPELINES", {"sd-1.4": tiny.stable_diffusion, "sd3-medium": tiny.KINDS["sd3"][0]}
    )
    monkeypatch.delitem(speed.MODES, "compiled")
    recipes = {
        name: replace(recipe, dim=64, timesteps=2, steps=10)
        for name, recipe in speed.RECIPES.items()
    }
    monkeypatch.setattr(speed, "RECIPES", recipes)
    monkeypatch.setattr(sizes, "WORDS", tiny.WORDS)
    code, out, err = headwater(
        "bench", "speed", "--models", "sd-1.4, sd3-medium", "--device", "cpu",
        "--out", tmp_path / "new" / "tiny-1.4",
    )  # fmt: skip
    assert (code, err) == (0, "")
    records = [
        json.loads(x) for x in (tmp_path / "new" / "tiny-1.4.jsonl").read_text().splitlines()
    ]
    assert {r["recipe"] for r in records} == {"published loop", "default", "published"}
    assert {r["batch"] for r in records if r["recipe"] == "published loop"} == {4, 16}
    assert all(r["rate"] > 0 for r in records)
    text = (tmp_path / "new" / "tiny-1.4.md").read_text()
    assert text in out
    cosine = float(text.split("cosine ")[1].split()[0])
    assert cosine > 0.999
    assert text.count("\n| sd-1.4") == len([r for r in records if r["model"] == "sd-1.4"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "there is no CUDA device here, and models of real size need one"),
        (("--device", "auto"), "give --device cpu"),
        (("--device", "cpu", "--models", "sd-1.4,sd-9"), "'sd-9'; choose of sd-1.4, sdxl, sd3"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(
    headwater: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = headwater("bench", "speed", "--out", tmp_path / "new" / "speed", *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "new").exists()


def test_unnamed_every_model_is_measured() -> None:
    default = signature(commands_bench.speed).parameters["models"].default
    assert default.split(",") == list(sizes.PIPELINES)
