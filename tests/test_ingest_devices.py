"""Several devices: the rows of one, and an end without leftovers however they end."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import Command, corpus_table

from headwater import DeviceError, Model, ModelError, Progress, Recipe, build_index
from headwater.attribution import Engine, Execution
from headwater.ingest import devices, devices_named, job
from headwater.ingest.devices import Pictures, compute_rows

SMALL = Recipe(timesteps=2, dim=128)
pytestmark = pytest.mark.usefixtures("no_process_is_left")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture(scope="module")
def broken_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty items; a whole batch of four without a picture, and one broken by itself."""
    table = corpus_table(40)
    images = table["image"].to_pylist()
    images[8:12] = [b""] * 4
    images[21] = images[21][:90]
    path = tmp_path_factory.mktemp("corpus") / "c.parquet"
    pq.write_table(table.set_column(1, "image", pa.array(images)), path)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "ledger.jsonl"
    }


def test_two_devices_write_the_bytes_of_one(
    tmp_path: Path, model: Model, broken_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", 18)
    seen: dict[str, list[Progress]] = {}
    for name, chosen in (("one", None), ("two", ["cpu", "cpu"])):
        seen[name] = []
        summary = build_index(
            broken_corpus, model, tmp_path / name, recipe=SMALL, batch_size=4, devices=chosen,
            progress=seen[name].append,
        )  # fmt: skip
        assert summary.rows == 35
    one = content(tmp_path / "one")
    assert {f"features/part-0000{n}.npy" for n in range(3)} <= set(one)
    assert one == content(tmp_path / "two")
    for states in seen.values():
        assert [s.done for s in states] == [4, 8, 12, 16, 18, 22, 26, 30, 34, 36, 40]
        assert {s.total for s in states} == {40}
        assert states[-1].quarantined == 5
        sizes = [len(d or b"") for d in pq.read_table(broken_corpus)["image"].to_pylist()]
        assert [s.bytes_read for s in states] == [sum(sizes[: s.done]) for s in states]
        elapsed = [s.elapsed for s in states]
        assert elapsed == sorted(elapsed)
        assert elapsed[0] > 0
    entry = json.loads((tmp_path / "two" / "ledger.jsonl").read_text())["details"]
    assert entry["devices"] == ["cpu", "cpu"]
    assert entry["batch_size"] == 4
    assert entry["execution"] == {"compile": False, "checkpointing": False, "deterministic": True}
    assert json.loads((tmp_path / "one" / "ledger.jsonl").read_text())["details"]["devices"] == [
        "cpu"
    ]


def test_a_killed_worker_ends_the_job_by_name(tmp_path: Path, model: Model, corpus: Path) -> None:
    def kill(_: Progress) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    given: Any = {"recipe": SMALL, "batch_size": 1, "devices": ["cpu"]}
    with pytest.raises(DeviceError, match=r"cpu \(worker 1\): its process was ended by SIGKILL"):
        build_index(corpus, model, tmp_path / "i", **given, progress=kill)
    build_index(corpus, model, tmp_path / "i", **given)  # what was done before is kept
    details = json.loads((tmp_path / "i" / "ledger.jsonl").read_text())["details"]
    assert 1 <= details["resumed"] < 12
    build_index(corpus, model, tmp_path / "whole", **given)
    assert content(tmp_path / "i") == content(tmp_path / "whole")


def test_an_interrupted_job_leaves_no_process_and_goes_on(
    tmp_path: Path, model: Model, corpus: Path
) -> None:
    def stop(progress: Progress) -> None:
        assert progress.done == 12  # no batch size given: the worker chose sixteen
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(corpus, model, tmp_path / "i", recipe=SMALL, devices=["cpu"], progress=stop)
    assert multiprocessing.active_children() == []
    build_index(corpus, model, tmp_path / "i", recipe=SMALL, devices=["cpu"])
    details = json.loads((tmp_path / "i" / "ledger.jsonl").read_text())["details"]
    assert (details["resumed"], details["batch_size"]) == (12, 16)


def test_a_device_that_does_not_exist_is_named(tmp_path: Path, model: Model, corpus: Path) -> None:
    with pytest.raises(ModelError, match="--device foo cannot be") as caught:
        build_index(corpus, model, tmp_path / "i", recipe=SMALL, devices=["foo"])
    assert "Traceback" in "".join(caught.value.__notes__)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("chosen", [[], ["cpu", "cuda:0"]])
def test_devices_must_be_of_one_kind(
    tmp_path: Path, model: Model, corpus: Path, chosen: list[str]
) -> None:
    with pytest.raises(DeviceError, match="one kind"):
        build_index(corpus, model, tmp_path / "i", recipe=SMALL, devices=chosen)
    assert not (tmp_path / "i").exists()


def test_a_model_that_cannot_be_copied_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    monkeypatch.setattr(adapted.denoiser, "hook", lambda: None, raising=False)
    with pytest.raises(DeviceError, match="cannot be copied for --devices"):
        build_index(corpus, adapted, tmp_path / "i", recipe=SMALL, devices=["cpu"])


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices_named("auto") is None
    assert devices_named("cpu") is None
    assert devices_named("cuda:1") == ["cuda:1"]
    assert devices_named("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(DeviceError, match="--devices all"):
        devices_named("all")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_named("auto") == ["cuda:0"]
    assert devices_named("all") == ["cuda:0", "cuda:1", "cuda:2"]


# ------------------------------------------------------------------------------- one device


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_rows_come_in_order_and_flush_when_nothing_waits(
    model: Model, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On a GPU a batch is held back until the next one is under way, or none is there."""
    started: list[int] = []

    class Started:
        def __init__(self, _: Engine, batch: int) -> None:
            started.append(batch)
            self.batch = batch

        def finished(self) -> tuple[int, int]:
            return self.batch, len(started)

    class Device:
        type = kind

    class Fake:
        class model:
            device = Device()

    monkeypatch.setattr(devices, "_Started", Started)
    found: Any = list(compute_rows(Fake(), [None, 0, 1, None, None, 2, 3]))  # type: ignore[arg-type, list-item]
    ahead = 1 if kind == "cuda" else 0
    assert found == [(0, 1 + ahead), (1, 2), (2, 3 + ahead), (3, 4)]


def test_rows_of_a_batch_are_those_of_the_engine(model: Model) -> None:
    engine = Engine(model, SMALL)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    captions, keys = ["a red cat", "a dog", ""], ["a", "b", "c"]
    empty = Pictures(pixels[:0], [], [], [], 4)
    first, none, again = compute_rows(
        engine,
        [
            Pictures(pixels, captions, keys, [0, 1, 3], 4),
            empty,
            Pictures(pixels, captions, keys, [0, 1, 3], 4),
        ],
    )
    filled = [0, 1, 0, 2]  # a place without a picture has the pass's first
    rows = engine.rows(
        model.encode_pictures(pixels[filled]),
        [captions[i] for i in filled],
        [keys[i] for i in filled],
    )
    for found in (first, again):
        assert np.array_equal(found.features, rows.features.numpy()[[0, 1, 3]])
        assert np.array_equal(found.norms, rows.norms.numpy()[[0, 1, 3]])
        assert np.array_equal(found.weights, rows.weights.numpy()[[0, 1, 3]])
        assert found.peak_memory > 2**24  # torch alone takes more
    assert none.features.shape == (0, 128)


def test_out_of_memory_names_the_device_and_the_remedy(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(Engine, "rows", full)
    words = ("--model", model_folder, "--out", tmp_path / "i", "--batch-size", 6, "--quiet")
    code, out, err = headwater("ingest", corpus, *words)
    assert (code, out) == (2, "")
    assert "cpu: out of memory with 6 images at once; lower --batch-size" in err
    assert not (tmp_path / "i").exists()


# ------------------------------------------------------------------------------- settings


def execution_of(model: Model, source: Path, **settings: Any) -> Execution:
    given = {"deterministic": True, "compile": None, "low_memory": False} | settings
    chosen = given.pop("devices", None)
    return job.opened(source, model, SMALL, None, None, None, None, chosen, **given)[2]


def test_settings_reach_the_engine(model: Model, corpus: Path) -> None:
    assert execution_of(model, corpus) == Execution(False, False, True)
    wanted = execution_of(model, corpus, deterministic=False, compile=True)
    assert wanted == Execution(compile=True, checkpointing=False, deterministic=False)
    assert execution_of(model, corpus, low_memory=True) == Execution(False, True, True)


def test_compiling_is_automatic_for_large_corpora_on_gpus(
    model: Model, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = sum(parameter.numel() for parameter in model.denoiser.parameters())
    for least, chosen, expected in (
        (12, ["cuda:0"], True),
        (12, ["cuda:0", "cuda:1"], True),  # by the whole corpus: two devices do what one does
        (13, ["cuda:0"], False),
        (12, None, False),
        (12, ["cpu"], False),
    ):
        monkeypatch.setattr(job, "COMPILE_FROM", least * parameters)
        assert execution_of(model, corpus, devices=chosen).compile is expected
    monkeypatch.setattr(job, "COMPILE_FROM", 0)
    assert not execution_of(model, corpus, devices=["cuda:0"], low_memory=True).compile
    assert execution_of(model, corpus, devices=["cuda:0"], compile=False).compile is False


def test_command_line_hands_the_settings_on(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made: list[Execution] = []
    honest = Engine.__init__

    def noted(self: Engine, model: Model, recipe: Recipe, execution: Any = None) -> None:
        made.append(execution)
        honest(self, model, recipe)

    monkeypatch.setattr(Engine, "__init__", noted)
    words = ("ingest", corpus, "--model", model_folder, "--timesteps", 1, "--dim", 64, "--quiet")
    flags = ("--no-deterministic", "--compile")
    assert headwater(*words, "--out", tmp_path / "a", *flags)[0] == 0
    assert headwater(*words, "--out", tmp_path / "b")[0] == 0
    assert made == [Execution(True, False, False), Execution(False, False, True)]
    entries = [
        json.loads((tmp_path / name / "ledger.jsonl").read_text())["details"] for name in "ab"
    ]
    assert entries[0]["execution"] == {
        "compile": True, "checkpointing": False, "deterministic": False
    }  # fmt: skip
    assert entries[1]["batch_size"] == 16
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in "ab"]
    assert manifests[0] == manifests[1]


def test_command_line_loads_beside_the_devices_in_their_precision(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given: list[tuple[str, torch.dtype, Any]] = []

    def noted(_: object, model: Model, *__: object, **settings: Any) -> None:
        given.append((str(model.device), model.dtype, settings["devices"]))
        raise DeviceError("enough")

    monkeypatch.setattr("headwater.ingest.build_index", noted)
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i", "--quiet")
    for flags in (
        ("--devices", "cuda:0,cuda:1"),
        ("--devices", "cuda:0", "--dtype", "float16"),
        ("--devices", "cpu,cpu"),
        ("--device", "cpu"),
    ):
        assert headwater(*words, *flags)[0] == 2
    assert given == [
        ("cpu", torch.bfloat16, ["cuda:0", "cuda:1"]),
        ("cpu", torch.float16, ["cuda:0"]),
        ("cpu", torch.float32, ["cpu", "cpu"]),
        ("cpu", torch.float32, None),
    ]
