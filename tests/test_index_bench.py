"""`headwater bench index` runs whole on a few rows, which are like those it was given."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest
from conftest import Command

from headwater.benchmarks import index_bench
from headwater.benchmarks.gradient_rows import Generator, compare
from headwater.index import StoredIndex, accelerator, cells, gpu, gpu_cells
from headwater.index.accelerator import Accelerator
from headwater.index.metrics import prepare


@pytest.fixture(scope="module")
def real() -> npt.NDArray[np.float32]:
    """A far mean, a spectrum over two decades, heavy tails."""
    rng = np.random.default_rng(0)
    rows = rng.standard_t(5, (900, 32)) * np.geomspace(1, 1e-2, 32)
    rows[:, 0] += 3
    return (rows @ np.linalg.qr(rng.standard_normal((32, 32)))[0]).astype(np.float32)


def test_generated_rows_have_the_moments_of_real_ones(real: npt.NDArray[np.float32]) -> None:
    generator = Generator.fit(real)
    made = np.concatenate(list(generator.blocks(20_000)))
    assert made.shape == (20_000, 32)
    again = np.concatenate(list(generator.blocks(3000)))
    np.testing.assert_array_equal(again[:2048], made[:2048])
    assert (np.concatenate(list(generator.blocks(2048, seed=1))) != made[:2048]).any()
    centred = np.linalg.norm(real - real.mean(axis=0), axis=1).mean()
    assert np.linalg.norm(made.mean(axis=0) - real.mean(axis=0)) < 0.03 * centred
    variances = [
        ((rows - real.mean(axis=0)) @ generator.basis.T).var(axis=0) for rows in (real, made)
    ]
    np.testing.assert_allclose(variances[1], variances[0], rtol=0.12)
    assert len(np.unique(made, axis=0)) == len(made)
    queries = (real[:50] - real[50:100]).astype(np.float64)
    same = compare(real, real, queries)
    assert all(r == m for r, m in same.values())
    far = compare(real, np.random.default_rng(1).standard_normal(real.shape).astype("f4"), queries)
    near = compare(real, made[:900], queries)

    def off(table: dict[str, list[float]], name: str) -> float:
        return abs(np.log(table[name][1] / table[name][0]))

    for name in ("eigenvalue 1", "eigenvalue 10", "length, quantile 0.99"):
        assert off(near, name) < 0.15
    assert off(far, "eigenvalue 1") > 1


def test_whole_run(headwater: Command, tmp_path: Path, real: npt.NDArray[np.float32]) -> None:
    np.save(tmp_path / "real.npy", real)
    code, out, _ = headwater(
        "bench", "index", "--features", tmp_path / "real.npy", "--rows", 5000,
        "--folder", tmp_path, "--out", tmp_path / "new" / "small",
    )  # fmt: skip
    assert code == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("headwater-bench")] == []
    text = (tmp_path / "new" / "small.md").read_text()
    assert text in out
    assert "5,000 rows x 32, 90 queries" in text
    lines = (tmp_path / "new" / "small.jsonl").read_text().splitlines()
    records = {r.get("what", r.get("figure")): r for r in map(json.loads, lines)}
    assert records["build accelerator"]["disk_bytes_a_row"] == 64
    # 32 dimensions, one bit each, two floats
    assert 12 <= records["build accelerator"]["code_bytes_a_row"] < 16
    frontier = [json.loads(x) for x in lines if json.loads(x).get("what") == "accelerated"]
    recalls = [r["recall10"] for r in frontier]
    assert recalls == sorted(recalls)
    assert 0.3 < recalls[0] <= recalls[-1] <= 1
    assert [r["candidates"] for r in frontier] == [200, 500, 1000, 2000]
    assert ("GPU, a query" in records) == gpu.available()


def test_codes_on_a_gpu(
    headwater: Command,
    tmp_path: Path,
    real: npt.NDArray[np.float32],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FAISS on the processor stands for the GPU, which the machine may not have."""
    np.save(tmp_path / "real.npy", real)
    command = ("bench", "index", "--features", tmp_path / "real.npy", "--rows", 5000)
    monkeypatch.setattr(gpu, "available", lambda: False)
    code, _, err = headwater(*command, "--gpu-memory", 500_000)
    assert code == 2
    assert "there is no GPU" in err
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu, "_flat", faiss.IndexFlatIP)
    monkeypatch.setattr(gpu, "_to_gpu", lambda empty: empty)
    monkeypatch.setattr(gpu, "honours_selectors", lambda: True)
    monkeypatch.setattr(gpu, "room", lambda: None)
    monkeypatch.setattr(gpu_cells, "LIST_BYTES", 0)
    with monkeypatch.context() as early:  # before a minute or more of writing rows
        early.delattr(index_bench, "write_index")
        for memory in (239_999, 680_000):
            code, _, err = headwater(*command, "--gpu-memory", memory)
            assert code == 2
            assert "from 240,000 bytes to 680,000" in err
    code, _, _ = headwater(*command, "--gpu-memory", 500_000, "--out", tmp_path / "codes")
    assert code == 0
    lines = (tmp_path / "codes.jsonl").read_text().splitlines()
    records = {r.get("what", r.get("figure")): r for r in map(json.loads, lines)}
    assert "build accelerator" not in records
    assert records["GPU, a query"]["recall100"] == 1
    found = [records[f"codes on the GPU, {cells} cells, a query"] for cells in ("all", 32, 8)]
    assert found[0]["recall10"] >= found[1]["recall10"] >= found[2]["recall10"] > 0.3
    assert found[0]["recall10"] >= 0.99
    assert found[0]["recall100"] >= 0.99
    assert "bytes_a_row" not in records["make codes on the GPU"]


@pytest.mark.parametrize("content", [b"no array", b""])
def test_refuses_what_is_no_array(headwater: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(content)
    code, _, err = headwater("bench", "index", "--features", tmp_path / "x.npy")
    assert code == 2
    assert "x.npy" in err
    np.save(tmp_path / "few.npy", np.ones((3, 4)))
    code, _, err = headwater("bench", "index", "--features", tmp_path / "few.npy")
    assert code == 2
    assert "at least 40 real rows" in err


def test_building_codes_takes_no_more_memory_for_more_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FROM_ROWS": 1000, "FROM_CELLS": 1000, "SEGMENT_ROWS": 10_000}.items():
        monkeypatch.setattr(accelerator, name, value)
    monkeypatch.setattr(cells, "cell_count", lambda rows: 64)
    rng = np.random.default_rng(0)
    real = (rng.standard_normal((900, 256)) * np.geomspace(1, 1e-2, 256)).astype(np.float32)
    asked = (real[:1] - real[1:2]).astype(np.float64)
    peaks = {}
    for rows in (20_000, 80_000):
        folder = tmp_path / str(rows)
        index_bench.write_index(Generator.fit(real), rows, folder)
        index = StoredIndex.open(folder)
        _, scale = prepare(index, asked, index_bench.METRIC)
        with index_bench.peak_memory() as peak:
            built = Accelerator.ready(index, scale, index_bench.METRIC)
        assert built.cells is not None
        assert len(built.segments) == rows // 10_000
        peaks[rows] = peak[0]
    # The rows between them are 61 MB, and 31 as they are stored.
    assert peaks[80_000] - peaks[20_000] < 15e6
