"""A real local Ray cluster of two workers gives what one process gives, also when one is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Command, corpus_table, png
from test_tar_shards import samples, write_img2dataset, write_tar

import headwater as hw
from headwater.index import Catalog, Metric, StoredIndex, connected, search
from headwater.index.actors import ShardHolder
from headwater.index.manifest import read_manifest
from headwater.ingest import RayCluster, job, ray_engine
from headwater.ingest.ray_engine import RangeWorker, Task
from headwater.ingest.sources import Source, open_source

IMAGES = 40
RANGE = 4  # images of a range here
BATCH = 2
HELD = 9  # images that an index holds before the others are added


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster with two processors, as a user may have started it."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    module = pytest.importorskip("ray")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a worker for each of the two
    with pytest.MonkeyPatch.context() as patch:
        # Sockets lie in it, whose names have room for a hundred letters.
        folder = tmp_path_factory.mktemp("r")
        # Workers look for modules where the driver was started: not in the unpacked repository.
        patch.chdir(folder)
        module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder))
        yield module
        module.shutdown()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    words = ["a red cat", "a blue dog", "the house by studio"]
    for number in range(IMAGES):
        (folder / f"{number:02d}.png").write_bytes(b"broken" if number == 11 else png(number))
        (folder / f"{number:02d}.txt").write_text(words[number % 3])
    return folder


@pytest.fixture(scope="module")
def model(model_folder: Path) -> hw.Model:
    return hw.Model.from_pretrained(str(model_folder), device="cpu")


@pytest.fixture(scope="module")
def alone(pictures: Path, model: hw.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index that one process makes."""
    out = tmp_path_factory.mktemp("alone") / "idx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SHARD_ITEMS", RANGE)
        hw.build_index(pictures, model, out, recipe=recipe(), batch_size=BATCH)
    return out


@pytest.fixture(scope="module")
def begun(pictures: Path, model: hw.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the first pictures, to which the others are added."""
    out = tmp_path_factory.mktemp("begun") / "idx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SHARD_ITEMS", RANGE)
        hw.build_index(pictures, model, out, recipe=recipe(), batch_size=BATCH, limit=HELD)
    return out


def recipe() -> hw.Recipe:
    return hw.Recipe(dim=64, timesteps=3)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if path.name not in ("ledger.jsonl", "lock")
    }


def actors(title: str) -> list[psutil.Process]:
    """The processes of actors; Ray writes what they do into their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                found.append(process)
    return found


class Killer(Thread):
    """Kills a worker in the middle of a range, once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self._folder = folder
        self.killed = 0

    def run(self) -> None:
        deadline = time.monotonic() + 100
        while not self.killed and time.monotonic() < deadline:
            if any(self._folder.glob("job/part-*/*.arrow")) and (busy := actors("RangeWorker.run")):
                busy[0].kill()
                self.killed += 1
            time.sleep(0.002)


def test_a_worker_killed_in_the_middle_changes_no_byte(
    ray: Any,
    pictures: Path,
    model: hw.Model,
    model_folder: Path,
    begun: Path,
    tmp_path: Path,
    headwater: Command,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", RANGE)
    alone, out = (Path(shutil.copytree(begun, tmp_path / name)) for name in ("alone", "cluster"))
    hw.build_index(pictures, model, alone, recipe=recipe(), batch_size=BATCH)
    killer = Killer(out)
    killer.start()
    code, said, errors = headwater(
        *("ingest", pictures, "--model", model_folder, "--out", out, "--dim", 64),
        *("--timesteps", 3, "--batch-size", BATCH, "--engine", "ray", "--workers", 2),
    )
    assert code == 0, errors
    assert killer.killed == 1
    assert "a worker was lost over part-" in caplog.text
    assert f"{IMAGES - HELD - 1} rows" in said
    assert contents(out) == contents(alone)
    assert not actors("RangeWorker")
    assert ray.is_initialized()  # the user's own cluster is left running


@pytest.mark.parametrize("kind", ["parquet", "tar shards"])
def test_other_sources_give_the_bytes_of_the_local_run(
    kind: str,
    ray: Any,
    model: hw.Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", RANGE)
    settings: dict[str, Any] = {"recipe": recipe(), "batch_size": BATCH}
    if kind == "parquet":
        source = tmp_path / "corpus.parquet"
        twice = pa.concat_tables([corpus_table(14), corpus_table(4)])
        pq.write_table(twice, source, row_group_size=5)
        settings |= {"where": "\"group\" = 'even' OR licence IS NULL", "limit": 11}
    else:
        source = tmp_path / "shards"
        write_img2dataset(source, 0, 5, {1: "HTTP Error 404"})
        write_img2dataset(source, 1, 4, {})
        write_tar(source / "00002.tar", samples(0, 3))
    for name, cluster in (("here", None), ("there", RayCluster(workers=2))):
        summary = hw.build_index(source, model, tmp_path / name, cluster=cluster, **settings)
    assert len(StoredIndex.open(tmp_path / "there").manifest.shards) == 3
    # Of Parquet seven even ones, 5 and 11, and again 0 and 2; of the shards one was not downloaded.
    expected = (11, 9) if kind == "parquet" else (12, 11)
    assert (summary.items, summary.rows) == expected
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


def poisoned(source: Source, place: int) -> Source:
    """The source, except that whoever but this process reads the record at `place` dies."""
    cells, here = source.listing.cells, os.getpid()

    def read(positions: Any) -> Iterator[Any]:
        for position, cell in zip(positions.tolist(), cells(positions), strict=True):
            if position == place and os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)
            yield cell

    return replace(source, listing=replace(source.listing, cells=read))


def test_a_range_that_ends_every_worker_is_set_aside(
    ray: Any,
    pictures: Path,
    model: hw.Model,
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", RANGE)
    monkeypatch.setattr(ray_engine, "ATTEMPTS", 2)
    out = tmp_path / "idx"
    states: list[hw.Progress] = []

    def ingest(progress: Callable[[hw.Progress], None], cluster: RayCluster | None) -> Any:
        return hw.build_index(
            pictures, model, out, recipe=recipe(), batch_size=BATCH, cluster=cluster,
            progress=progress,
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(job, "open_source", lambda *a, **k: poisoned(open_source(*a, **k), 22))
        with pytest.raises(hw.DeviceError, match=r"part-00005 \(records 2[0-2] to 23 of"):
            ingest(states.append, RayCluster(workers=2))
    # All others were done, and this process goes on with what is left of the one.
    assert max(state.done for state in states) >= IMAGES - RANGE
    assert states[-1].total == IMAGES
    again: list[hw.Progress] = []
    summary = ingest(again.append, None)
    assert summary.rows == IMAGES - 1
    assert again[-1].done == IMAGES
    assert again[0].resumed >= IMAGES - RANGE
    assert contents(out) == contents(alone)


def test_search_over_actors_is_the_search_of_one_process(
    ray: Any, model: hw.Model, alone: Path
) -> None:
    index = StoredIndex.open(alone)
    queries = np.random.default_rng(0).standard_normal((3, index.manifest.dim)).astype(np.float32)
    asked = {"prompt": "a red cat", "contrast": "the house"}
    expected = hw.Index(alone).query(hw.Concept(**asked), model, top=5)
    with hw.SearchCluster(alone, actors=2) as cluster:

        def same(where: str | None, top: int, *, largest: bool) -> None:
            positions = Catalog(index).select(where)
            assert cluster.count(where) == len(positions)
            here = search(index, queries, top, positions=positions, largest=largest)
            there = cluster.search(queries, top, where=where, largest=largest)
            np.testing.assert_array_equal(there[1], here[1])
            np.testing.assert_array_equal(there[0], here[0])

        same(None, IMAGES - 1, largest=True)
        same("caption = 'a red cat'", 4, largest=False)
        same("item_id = '39.png'", 1, largest=True)
        with pytest.raises(hw.IndexStoreError, match="nothing_such"):
            cluster.count("nothing_such = 1")
        with pytest.raises(hw.IndexStoreError, match="14 results asked for, 13 rows"):
            cluster.search(queries, 14, where="caption = 'a blue dog' AND status = 'ok'")

        found = hw.Index(alone).query(hw.Concept(**asked), model, top=5, cluster=cluster)
        assert found.as_dict() == expected.as_dict()
        ids = [hit.item_id for hit in found.hits]

        busy = actors("ShardHolder")
        assert len(busy) == 2
        busy[0].kill()
        same(None, 7, largest=True)  # by the other one alone
        same("caption <> 'a red cat'", 7, largest=True)
    assert found.thumbnails(ids) == expected.thumbnails(ids)
    left_by = time.monotonic() + 60  # Ray ends a process that is only starting when it has started
    while actors("ShardHolder") and time.monotonic() < left_by:
        time.sleep(0.2)
    assert not actors("ShardHolder")


def test_every_way_to_ask_gives_over_actors_what_one_process_gives(
    ray: Any, model: hw.Model, alone: Path
) -> None:
    index = StoredIndex.open(alone)
    queries = np.random.default_rng(1).standard_normal((2, index.manifest.dim)).astype(np.float32)
    concept = hw.Concept("a red cat", contrast="the house")
    with hw.SearchCluster(alone, actors=2) as cluster:
        names = [*product(("ip", "cosine"), ("none", "query", "both"))]
        names += [("relative", "query"), ("standard", "query")]
        for similarity, preconditioning in names:
            metric = Metric(similarity, preconditioning)
            for largest, exact in product((True, False), repeat=2):
                asked: dict[str, Any] = {"metric": metric, "largest": largest, "exact": exact}
                here, there = (
                    search(index, queries, 9, **asked),
                    cluster.search(queries, 9, **asked),
                )
                np.testing.assert_array_equal(there[1], here[1])
                np.testing.assert_array_equal(there[0], here[0])
        asking = hw.Asking(similarity="cosine", preconditioning="both")
        for bottom in (False, True):
            asked = {"asking": asking, "top": 4, "bottom": bottom, "exact": bottom}
            expected = hw.Index(alone).query(concept, model, **asked)
            found = hw.Index(alone).query(concept, model, cluster=cluster, **asked)
            assert found.as_dict() == expected.as_dict()


def test_another_index_than_the_clusters_is_refused(
    ray: Any, model: hw.Model, alone: Path, tmp_path: Path
) -> None:
    """Half of the pictures are another index of the same feature space."""
    with hw.SearchCluster(alone, actors=1) as cluster:
        other = hw.Index(alone)
        changed = replace(other.stored.manifest, generation=7)
        other.stored.manifest = changed
        with pytest.raises(hw.QueryError, match="earlier state"):
            other.query(hw.Concept("a cat"), model, cluster=cluster)


@pytest.mark.parametrize(
    ("gpus", "cluster", "room"),
    [
        (0, {"CPU": 8.0, "GPU": 2.0}, 8),
        (1, {"CPU": 8.0, "GPU": 2.0}, 2),
        (0.25, {"CPU": 8.0, "GPU": 1.0}, 4),
        (0.1, {"CPU": 8.0, "GPU": 2.0}, 8),
        (0.4, {"CPU": 8.0, "GPU": 2.0}, 4),  # a fifth of each is left, and no actor lies on both
        (2, {"CPU": 8.0, "GPU": 5.0}, 2),
        (1, {"CPU": 8.0}, 1),  # a machine that joins may have one
    ],
)
def test_as_many_actors_as_there_is_room_for(
    alone: Path, gpus: float, cluster: dict[str, float], room: int
) -> None:
    searching = hw.SearchCluster(alone, gpus=gpus)
    searching._ray = SimpleNamespace(cluster_resources=lambda: cluster)
    assert searching._room() == room


def test_an_actor_without_a_gpu_sees_none(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    holder = ShardHolder(str(alone), read_manifest(alone))
    holder.ready(on_gpu=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"  # as Ray has set it
    holder.ready(on_gpu=False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_what_a_machine_does_not_see_is_named(model: hw.Model, pictures: Path) -> None:
    source = open_source(pictures)
    here = Task(
        recipe=hw.Recipe(), execution=job.Execution(), kind="cpu", threads=1, source=source,
        source_path=Path("/not/on/this/machine"), folder=pictures, manifest=None,
    )  # fmt: skip
    with pytest.raises(hw.SourceError, match="/not/on/this/machine is not there on"):
        RangeWorker(here, np.zeros(0, np.uint8)).ready()


def test_without_ray_the_extra_is_named(
    pictures: Path,
    model_folder: Path,
    tmp_path: Path,
    headwater: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, errors = headwater(
        *("ingest", pictures, "--model", model_folder, "--out", tmp_path / "idx"),
        *("--engine", "ray"),
    )
    assert code == 2
    assert "pip install 'headwater[ray]'" in errors
    assert not (tmp_path / "idx").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://head:10001", "run this on a machine of the cluster"),
        ("127.0.0.1:1", "no Ray cluster at 127.0.0.1:1 .* refused"),
        ("nothing", "no Ray cluster at nothing"),
    ],
)
def test_an_address_without_a_cluster_is_named(
    address: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: False)
    with pytest.raises(hw.ClusterError, match=said), connected(address):
        pass
