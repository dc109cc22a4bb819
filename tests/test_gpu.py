"""On a GPU: the same rows as on a CPU, the same rows again, the same answers. Skipped without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import png

from headwater import (
    Asking,
    Concept,
    Index,
    Model,
    RayCluster,
    Recipe,
    SearchCluster,
    build_index,
)
from headwater.attribution import METHODS, Engine, Execution, choose_batch
from headwater.index import StoredIndex, search
from headwater.ingest import job
from headwater.ingest.devices import Pictures, compute_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
CAPTIONS, KEYS = ["a red cat", "the dog", "a fish by studio"], ["one", "two", "three"]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_gpu_rows_equal_cpu_rows(method: str, prediction_type: str) -> None:
    x_0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(method=method, parameters="attn|conv", timesteps=3, steps=12, dim=512)
    rows = {}
    for device in ("cpu", "cuda"):
        pipeline = tiny.stable_diffusion(prediction_type=prediction_type)
        model = Model.from_pipeline(pipeline, device=device, dtype="float32")
        engine = Engine(model, recipe)
        rows[device] = engine.rows(x_0, CAPTIONS, KEYS).features.cpu()
        again = engine.rows(x_0, CAPTIONS, KEYS).features.cpu()
        assert torch.equal(rows[device], again)
        one = engine.rows(x_0[1:2], CAPTIONS[1:2], KEYS[1:2]).features.cpu()[0]
        assert (one - rows[device][1]).norm() <= 1e-5 * one.norm()
    difference = (rows["cpu"] - rows["cuda"]).norm(dim=1) / rows["cpu"].norm(dim=1)
    # sign(e) jumps where e is near zero, and guided inversion amplifies rounding.
    assert difference.max() <= (1e-2 if method in ("das", "dps") else 1e-4)


def test_ingest_and_query_on_gpu(tmp_path: Path, model_folder: Path, corpus: Path) -> None:
    hits = {}
    recipe = Recipe(timesteps=2, dim=256)
    for name, device in (("cpu", "cpu"), ("one", "cuda"), ("two", "cuda")):
        model = Model.from_pretrained(model_folder, device=device, dtype="float32")
        build_index(corpus, model, tmp_path / name, recipe=recipe)
        concept = Concept("a red cat", contrast="a drawing")
        result = Index(tmp_path / name).query(concept, model, asking=Asking(seeds=2), top=12)
        hits[name] = {hit.item_id: hit.score for hit in result.hits}
    for name in ("features/part-00000.npy", "items/part-00000.parquet", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    scores = [np.array([hits[n][item] for item in hits["cpu"]]) for n in ("cpu", "one")]
    assert np.abs(scores[0] - scores[1]).max() <= 1e-2 * np.abs(scores[0]).max()
    assert StoredIndex.open(tmp_path / "one").manifest.rows == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_rows_do_not_depend_on_where_batches_are_cut(kind: str, dtype: str) -> None:
    """Of a pass, its width and the place in it are fixed: so an ingest can go on anywhere."""
    make, captions = tiny.KINDS[kind]
    model = Model.from_pipeline(make(), device="cuda", dtype=dtype)
    engine = Engine(model, Recipe(timesteps=2, dim=64))
    count, width = 23, 10
    pixels = np.random.default_rng(0).integers(0, 255, (count, *model.image_size, 3), np.uint8)
    words, keys = [captions[i % 2] for i in range(count)], [str(i) for i in range(count)]
    found = []
    for cut in (width, 3, count):
        parts = [
            Pictures(
                pixels[i : i + cut],
                words[i : i + cut],
                keys[i : i + cut],
                list(range(i, min(count, i + cut))),
                width,
            )
            for i in range(0, count, cut)
        ]
        found.append(np.concatenate([rows.features for rows in compute_rows(engine, parts)]))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_worker_of_a_cluster_gives_the_rows_of_a_device(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)  # where workers look for modules: not in the unpacked repository
    (tmp_path / "pictures").mkdir()
    for number in range(5):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(png(number))
        (tmp_path / "pictures" / f"{number}.txt").write_text(CAPTIONS[number % 3])
    model = Model.from_pretrained(model_folder, device="cpu", dtype="float32", runs_on="cuda")
    ways = {"device": ["cuda:0"], "cluster": ["cuda"]}
    for name, devices in ways.items():
        build_index(
            tmp_path / "pictures",
            model,
            tmp_path / name,
            recipe=Recipe(timesteps=2, dim=256),
            batch_size=2,
            devices=devices,
            cluster=RayCluster(workers=1) if name == "cluster" else None,
        )
    for name in ("features/part-00000.npy", "items/part-00000.parquet", "manifest.json"):
        assert (tmp_path / "device" / name).read_bytes() == (
            tmp_path / "cluster" / name
        ).read_bytes()
    last = json.loads((tmp_path / "cluster" / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["details"]["devices"] == [torch.cuda.get_device_name(0)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_gpu_that_is_not_the_current_one_gives_the_same_answers(
    tmp_path: Path, model_folder: Path, corpus: Path
) -> None:
    hits = []
    for device in ("cuda:0", "cuda:1"):
        model = Model.from_pretrained(model_folder, device=device, dtype="float32")
        build_index(corpus, model, tmp_path / device[-1], recipe=Recipe(timesteps=2, dim=256))
        concept, asking = Concept("a red cat", contrast="a drawing"), Asking(seeds=2)
        hits.append(Index(tmp_path / device[-1]).query(concept, model, asking=asking, top=12).hits)
    assert torch.cuda.current_device() == 0
    features = [tmp_path / name / "features/part-00000.npy" for name in ("0", "1")]
    assert features[0].read_bytes() == features[1].read_bytes()
    assert hits[0] == hits[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_two_workers_with_a_gpu_each_give_the_rows_of_one(
    tmp_path: Path, model_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(job, "SHARD_ITEMS", 2)  # images of a range, for both workers
    model = Model.from_pretrained(model_folder, device="cpu", dtype="float32", runs_on="cuda")
    settings: dict[str, Any] = {"recipe": Recipe(timesteps=2, dim=256), "batch_size": 2}
    build_index(corpus, model, tmp_path / "one", devices=["cuda:0"], **settings)
    monkeypatch.chdir(tmp_path)  # where workers look for modules: not in the unpacked repository
    ray.init(num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    try:
        both = RayCluster(workers=2)
        build_index(corpus, model, tmp_path / "two", devices=["cuda"], cluster=both, **settings)
        index = StoredIndex.open(tmp_path / "one")
        queries = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
        expected = search(index, queries, 5, exact=True)
        for gpus in (1, 0):
            with SearchCluster(tmp_path / "two", actors=2, gpus=gpus) as cluster:
                found = cluster.search(queries, 5, exact=True)
            np.testing.assert_array_equal(found[1], expected[1])
    finally:
        ray.shutdown()
    last = json.loads((tmp_path / "two" / "ledger.jsonl").read_text().splitlines()[-1])
    # One of them may have been ready when all was done.
    assert last["details"]["devices"]
    assert set(last["details"]["devices"]) <= {torch.cuda.get_device_name(n) for n in (0, 1)}
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*")]
    for name in names:
        if name.name != "ledger.jsonl":
            assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_of_model(kind: str) -> None:
    make, captions = tiny.KINDS[kind]
    rows = {}
    for device in ("cpu", "cuda"):
        model = Model.from_pipeline(make(), device=device, dtype="float32")
        shape = (2, *model.sample_shape)
        x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        engine = Engine(model, Recipe(timesteps=2, steps=6, dim=512))
        rows[device] = engine.rows(x_0, captions, ["a", "b"]).features.cpu()
    difference = (rows["cpu"] - rows["cuda"]).norm(dim=1) / rows["cpu"].norm(dim=1)
    assert difference.max() <= 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_on_gpu(dtype: str) -> None:
    x_0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    rows = []
    for precision in ("float32", dtype):
        model = Model.from_pipeline(tiny.stable_diffusion(), device="cuda", dtype=precision)
        engine = Engine(model, Recipe(timesteps=3, steps=12, dim=512))
        rows.append(engine.rows(x_0, CAPTIONS, KEYS).features)
        assert torch.equal(rows[-1], engine.rows(x_0, CAPTIONS, KEYS).features)
    assert torch.cosine_similarity(*rows).min() > 0.99


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_fast_kernels_give_the_same_rows(kind: str) -> None:
    # cuDNN's attention, which runs where determinism is not asked for, once mixed up the layouts
    # of FLUX's two kinds of block; recomputing must choose the attention of the first pass.
    make, captions = tiny.KINDS[kind]
    model = Model.from_pipeline(make(), device="cuda", dtype="bfloat16")
    shape = (2, *model.sample_shape)
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    exact, fast, recomputed = (
        Engine(model, Recipe(timesteps=2, steps=6, dim=512), execution)
        .rows(x_0, captions, ["a", "b"])
        .features
        for execution in (
            Execution(),
            Execution(deterministic=False),
            Execution(deterministic=False, checkpointing=True),
        )
    )
    assert torch.cosine_similarity(exact, fast).min() > 0.99
    assert torch.cosine_similarity(exact, recomputed).min() > 0.99


def test_checkpointing_needs_less_memory() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(width=64), device="cuda")
    x_0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    peak = {}
    for checkpointing in (False, True):
        recipe = Recipe(timesteps=1, steps=4, dim=512)
        engine = Engine(model, recipe, Execution(checkpointing=checkpointing))
        torch.cuda.reset_peak_memory_stats()
        engine.rows(x_0, ["a red cat"] * 64, [str(i) for i in range(64)])
        peak[checkpointing] = torch.cuda.max_memory_allocated()
    assert peak[True] < 0.8 * peak[False]


def test_batch_size_on_a_gpu() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cuda")
    choice = choose_batch(Engine(model, Recipe(timesteps=2, steps=4, dim=64)), 64)
    assert 4 <= choice.batch_size <= 64
    assert choice.bytes_per_image > 0
    assert choice.bytes_fixed > 0
