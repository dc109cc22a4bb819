"""Shared fixtures: a tiny model on disk, a small corpus, an index of it."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import forged_index
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_art
from PIL import Image

from headwater import Model, Recipe, build_index, cli
from headwater.benchmarks.study import Study

SHARED = Path(os.environ.get("HEADWATER_SHARED", Path(__file__).parent.parent.parent / "shared"))


def png(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def corpus_table(count: int = 12) -> pa.Table:
    words = ["a red cat", "a blue dog", "the house by studio", "a drawing of a fish"]
    return pa.table(
        {
            "image_id": [f"img-{i:03d}" for i in range(count)],
            "image": [png(i) for i in range(count)],
            "caption": [words[i % 4] for i in range(count)],
            "group": ["even" if i % 2 == 0 else "odd" for i in range(count)],
            "rights_holder": [("Ada", "Ben", None)[i % 3] for i in range(count)],
            "licence": [("MIT", "CC-BY-4.0", None)[i % 3] for i in range(count)],
        }
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved(tiny.stable_diffusion(), tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    pq.write_table(corpus_table(), path)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, corpus: Path, model_folder: Path) -> Path:
    """An index of ten good items and two bad ones, made through Python."""
    folder = tmp_path_factory.mktemp("index") / "idx"
    table = corpus_table()
    images = table["image"].to_pylist()
    images[3], images[7] = b"", images[7][:100]
    path = folder.with_suffix(".parquet")
    pq.write_table(table.set_column(1, "image", pa.array(images)), path)
    model = Model.from_pretrained(model_folder, device="cpu")
    summary = build_index(path, model, folder, recipe=Recipe(timesteps=2, dim=256))
    assert (summary.items, summary.rows, sum(summary.quarantined.values())) == (12, 10, 2)
    return folder


@pytest.fixture(scope="session")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two commits, made without a model."""
    return forged_index.write_index(tmp_path_factory.mktemp("committed") / "idx")


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_art.demo_corpus(tmp_path_factory.mktemp("corpora") / "demo")


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_art.tiny_corpus(tmp_path_factory.mktemp("corpora") / "tiny")


@pytest.fixture(scope="module")
def tiny_study(tiny_corpus: Path, model_folder: Path) -> Study:
    return tiny_art.tiny_study(tiny_corpus, model_folder)


@pytest.fixture(autouse=True, scope="session")
def caches_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own, also for the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "caches"))
        yield


@pytest.fixture
def no_process_is_left() -> Iterator[None]:
    """Every process that the test started has ended with it."""
    yield
    assert multiprocessing.active_children() == []


class Stopped(Exception):
    """A run is broken off."""


def stopping_at(words: str) -> Callable[[str], None]:
    """A `say` that breaks off a run when it is told a line with these words."""

    def say(line: str) -> None:
        if words in line:
            raise Stopped

    return say


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def headwater(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["headwater", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def ask(headwater: Command, index: Path, model: Path, *more: object) -> tuple[int, str, str]:
    words = ("query", index, "--model", model, "--seeds", 2, "--guidance", 2, "--quiet")
    return headwater(*words, *more)


def one_line(code: int, out: str, err: str) -> str:
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err
