"""A dry run: nothing is written, and what it says comes true. The bar of a real run."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import Command, corpus_table

from headwater import Model, Progress, Recipe, SourceError, build_index, estimate
from headwater.attribution import Engine
from headwater.bar import RECENT_SECONDS, status

SMALL = ("--timesteps", 2, "--dim", 256, "--quiet")


def tree(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("dim", "count"), [(256, 12), (256, 60), (256, 300)])
def test_disk_is_foretold(tmp_path: Path, dim: int, count: int) -> None:
    images = corpus_table(count)["image"].to_pylist()
    images[1] = b""
    table = corpus_table(count).set_column(1, "image", pa.array(images))
    pq.write_table(table, tmp_path / "c.parquet")
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    recipe = Recipe(timesteps=1, dim=dim)
    before = tree(tmp_path)
    expected = estimate(tmp_path / "c.parquet", model, recipe=recipe, batch_size=8)
    assert tree(tmp_path) == before
    assert expected.items == count
    assert expected.sampled == min(count, 32)
    assert expected.quarantined == {"empty file": 1}
    build_index(tmp_path / "c.parquet", model, tmp_path / "i", recipe=recipe, batch_size=8)
    written = size_of(tmp_path / "i")
    assert written / 1.5 <= expected.disk_bytes <= written * 1.5


def test_time_is_that_of_warm_batches(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds for the first batch, then a tenth each: as a compiler would have it."""
    honest, calls = Engine.rows, []

    def slow(self: Engine, *arguments: object) -> object:
        calls.append(0)
        time.sleep(2.0 if len(calls) == 1 else 0.1)
        return honest(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Engine, "rows", slow)
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    recipe = Recipe(timesteps=1, dim=64)
    expected = estimate(corpus, model, recipe=recipe, batch_size=2)
    assert len(calls) == 4
    assert 5 <= expected.images_per_second <= 20  # with the first batch less than 4
    assert expected.seconds == pytest.approx(12 / expected.images_per_second)
    calls.clear()
    alone = estimate(corpus, model, recipe=recipe, batch_size=12)  # all there is
    assert len(calls) == 1
    assert alone.seconds >= 2.0
    with pytest.raises(SourceError, match="batches is 0"):
        estimate(corpus, model, recipe=recipe, batches=0)


def test_dry_run_prints_and_writes_nothing(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = ("ingest", corpus, "--model", model_folder, *SMALL)
    assert headwater(*words, "--out", tmp_path / "i", "--dry-run")[0] == 0
    assert os.listdir(tmp_path) == []
    code, out, err = headwater(*words, "--dry-run")  # it needs no folder either
    assert (code, err) == (0, "")
    assert os.listdir(tmp_path) == []
    told = {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip()
            for line in out.splitlines() if "  " in line}  # fmt: skip
    assert told["items"] == "12"
    assert told["batch size"] == "16"
    assert told["quarantined"] == "0 of 12 sampled"
    rate = float(told["rate"].removesuffix(" img/s"))
    assert math.isfinite(rate)
    assert rate > 0
    for name in ("memory", "disk"):
        number, unit = told[name].split()[:2]
        assert float(number) > 0
        assert unit in ("kB", "MB", "GB")
    assert "0:00:0" in told["time"]


def test_dry_run_says_that_it_ignores_what_the_index_holds(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i", *SMALL)
    said = f"as for a new index: what {tmp_path / 'i'} holds already was not taken off"
    assert said not in headwater(*words, "--dry-run")[1]
    assert headwater(*words, "--limit", 4)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = headwater(*words, "--dry-run")
    assert (code, err) == (0, "")
    assert said in out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_dry_run_refuses_what_the_ingest_would(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i", *SMALL)
    code, out, err = headwater(*words, "--dry-run", "--where", "grup = 1")
    assert (code, out) == (2, "")
    assert "group" in err
    code, out, err = headwater("ingest", corpus, "--model", model_folder, *SMALL)
    assert (code, out) == (2, "")
    assert "--out" in err
    assert "--dry-run" in err


def test_the_bar_tells_recent_rate_time_left_bytes_and_quarantine() -> None:
    recent: deque[Progress] = deque()
    first = status(recent, Progress(10, 1000, 0, 2_000, 20.0))  # a slow start: 0.5 img/s
    assert first == "0.5 img/s, 0:33:00 left, 2.0 kB read, 0 quarantined"
    for second in range(1, 61):  # then 8 img/s
        done = 10 + 8 * second
        words = status(recent, Progress(done, 1000, 3, 1000 * done, 20.0 + second))
    assert words == "8.0 img/s, 0:01:04 left, 490.0 kB read, 3 quarantined"
    assert len(recent) <= RECENT_SECONDS + 2
    last = status(recent, Progress(1000, 1000, 1200, 1_000_000, 144.0))
    assert "0:00:00 left" in last
    assert "1,200 quarantined" in last


def test_the_bar_shows_on_the_error_stream(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i", *SMALL[:-1])
    code, out, err = headwater(*words)
    assert code == 0
    assert "12 rows in" in out
    assert "12/12" in err
    assert "img/s" in err
    assert "0 quarantined" in err
