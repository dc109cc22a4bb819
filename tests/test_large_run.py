"""The page about very many images shows what its program prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwater.benchmarks import large_run
from headwater.ingest.plan import SHARD_ITEMS

PAGE = Path(__file__).parent.parent / "docs" / "hundred-million-images.md"


def test_the_page_has_the_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "large_run --images 1e8 --gpus 64 --gpu-hour 3.50"
    assert f"python -m headwater.benchmarks.{words}" in PAGE.read_text()
    monkeypatch.setattr("sys.argv", words.split())
    large_run.main()
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 4
    for table in tables:
        assert table in PAGE.read_text()


def test_a_range_is_that_of_an_ingest() -> None:
    assert large_run.RANGE == SHARD_ITEMS


def test_time_and_money_by_hand() -> None:
    run = large_run.Run(
        images=2048 * 1000, gpus=2, gpu_hour=2.0, dim=2048, image_bytes=1, cores=1, disk=1, actors=1
    )
    _, default, _ = large_run.ingest_table(run)
    hours = (2048 * 1000 / 17.99 + 1000 * 0.05 + 200) / 3600
    assert default[1:] == (f"{hours:.0f}", f"{hours / 2:.1f}", f"{2 * hours:.0f}")
