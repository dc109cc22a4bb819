"""`headwater bench query` on a tiny model: real questions to a real index, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import WORDS, stable_diffusion

from headwater.attribution import ModelError
from headwater.benchmarks import query_speed, sizes
from headwater.queries import Asking


def test_both_questions_are_timed_and_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {"a", "the", "red", "house"} <= set(WORDS)  # the contrast is one that the model hears
    monkeypatch.setitem(sizes.PIPELINES, "tiny", stable_diffusion)
    said: list[str] = []
    table = query_speed.run(
        tmp_path / "out" / "query", size="tiny", images=12, seeds=2, repeats=1, device="cpu",
        say=said.append,
    )  # fmt: skip
    rows = table.to_pylist()
    assert [row["question"] for row in rows] == [
        "local, a given picture", "global, 2 pictures drawn",
    ]  # fmt: skip
    assert all(0 < row["seconds"] <= row["slowest"] for row in rows)
    assert len(said) == 2
    text = (tmp_path / "out" / "query.md").read_text()
    assert text.count("| tiny |") == 2
    with pytest.raises(ModelError, match="'huge'"):
        query_speed.run(None, size="huge", device="cpu", say=said.append)


def test_forward_passes_are_counted_by_hand() -> None:
    asking = Asking(seeds=3, steps=5)
    # A side of a noise level: one forward, one backward.
    assert query_speed.forwards(asking, model_draws=False, timesteps=2) == 3 * 2 * 2 * 2
    # Drawing: with and without the text, at every step.
    assert query_speed.forwards(asking, model_draws=True, timesteps=2) == 3 * (2 * 5 + 8)
