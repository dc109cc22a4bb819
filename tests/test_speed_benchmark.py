"""The speed benchmark runs whole on tiny models, and its arithmetic is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from headwater.attribution import Recipe
from headwater.benchmarks import sizes, speed


def test_forward_equivalents() -> None:
    assert speed.equivalents(Recipe()) == 20  # 10 points, a forward and a backward pass each
    assert speed.equivalents(Recipe(method="dps")) == 130  # 50 guided steps, 10 x (1 + 2)
    line = speed.Measured("m", "r", "plain", 4, 2.0, 1.0, forward=0.075, equivalents=20)
    assert line.rate == 2.0
    assert line.of_floor == pytest.approx(0.75)


def test_whole_run_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sizes, "PIPELINES", {"sd-1.4": tiny.stable_diffusion, "sd3-medium": tiny.KINDS["sd3"][0]}
    )
    monkeypatch.delitem(speed.MODES, "compiled")
    recipes = {
        name: Recipe(**{**vars(recipe), "dim": 64}) for name, recipe in speed.RECIPES.items()
    }
    monkeypatch.setattr(speed, "RECIPES", recipes)
    monkeypatch.setattr(sizes, "WORDS", tiny.WORDS)
    said: list[str] = []
    speed.run(tmp_path / "speed", ("sd-1.4", "sd3-medium"), "cpu", said.append)
    records = [json.loads(x) for x in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert {r["recipe"] for r in records} == {"published loop", "default", "published"}
    assert {r["batch"] for r in records if r["recipe"] == "published loop"} == {4, 16}
    assert all(r["rate"] > 0 for r in records)
    text = (tmp_path / "speed.md").read_text()
    cosine = float(text.split("cosine ")[1].split()[0])
    assert cosine > 0.999
    assert text.count("\n| sd-1.4") == len([r for r in records if r["model"] == "sd-1.4"])
