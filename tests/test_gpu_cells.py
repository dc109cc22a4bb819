"""Codes for a GPU find what an exact search finds: on the processor, and on a GPU if there is one.

FAISS's inverted file on the processor takes the same codes, so all but the GPU's kernels runs here.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from headwater.index import (
    IndexWriter,
    Metric,
    StoredIndex,
    accelerator,
    cells,
    gpu,
    gpu_cells,
    search,
)
from headwater.index.accelerator import Accelerator
from headwater.index.cells import Cells
from headwater.index.gpu_cells import Inverted
from headwater.index.metrics import prepare
from headwater.index.space import folder_of, only_builder

DIM, N, SHARD, CELLS = 96, 5000, 500, 32
BAD, DELETED = (3, 1777), (0, 2500, 4999)
WEIGHTS = (1.0, 0.5, -1.0)
METRIC = Metric("ip", "query", damping=3.0)
METRICS = [
    Metric(similarity, preconditioning, damping=3.0)
    for similarity in ("ip", "cosine")
    for preconditioning in ("none", "query", "both")
] + [Metric(similarity, "query", damping=3.0) for similarity in ("relative", "standard")]
NO_GPU = pytest.mark.skipif(not gpu.available(), reason="no GPU, or a FAISS built without it")
GROUPS = np.random.default_rng(99).standard_normal((40, DIM)) * np.geomspace(1, 0.05, DIM)
Rows = npt.NDArray[np.float32]


def make_rows(n: int = N, seed: int = 0) -> Rows:
    """Groups, a falling spectrum, a far mean, heavy tails, lengths over two decades."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_t(4, (n, DIM)) * np.geomspace(1, 0.05, DIM)
    rows = GROUPS[rng.integers(0, 40, n)] + 0.4 * noise
    rows[:, 0] += 2
    return (rows * rng.lognormal(-8, 1, (n, 1))).astype(np.float32)


def crowds(n: int = N, seed: int = 0) -> Rows:
    """Tight groups of their own directions: the best of a query share a cell."""
    rng = np.random.default_rng(seed)
    noise = 0.2 * rng.standard_normal((n, DIM)) * np.geomspace(1, 0.05, DIM)
    return (GROUPS[rng.integers(0, 40, n)] + noise).astype(np.float32)


def write_index(folder: Path, rows: Rows, weights: tuple[float, ...] = WEIGHTS) -> None:
    with IndexWriter.create(folder, feature_space_id="s", recipe={}, dim=DIM) as writer:
        add(writer, rows, 0, weights)
        values, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
        writer.write_curvature(
            {
                "eigenvalues": values[::-1],
                "eigenvectors": np.ascontiguousarray(vectors[:, ::-1]),
                "rows": np.array(len(rows)),
            }
        )
        writer.write_tombstones(np.array(DELETED))
        writer.finish()


def add(writer: IndexWriter, rows: Rows, number: int, weights: tuple[float, ...] = WEIGHTS) -> None:
    thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    chosen = np.random.default_rng(number).choice(weights, len(rows)).astype(np.float32)
    for first in range(0, len(rows), SHARD):
        numbers = range(number + first, number + min(first + SHARD, len(rows)))
        bad = [i in BAD for i in numbers]
        items = pa.table(
            {
                "item_id": [str(i) for i in numbers],
                "status": ["quarantined" if b else "ok" for b in bad],
                "error": pa.array(["broken" if b else None for b in bad], pa.string()),
                "row_weight": chosen[first : first + SHARD],
            }
        )
        writer.add_shard(items, rows[first : first + SHARD], thumbs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "idx"
    write_index(folder, make_rows())
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, and sizes at which a small index is large: by default it is not one for codes."""
    for module, values in (
        (gpu, {"FROM_ROWS": 1000, "FROM_QUERIES": 1}),
        (gpu_cells, {"LIST_BYTES": 0}),
        (cells, {"cell_count": lambda rows: CELLS}),
        (gpu, {"cell_count": lambda rows: CELLS}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    return shutil.copytree(written, tmp_path / "idx")


@pytest.fixture(params=["processor", pytest.param("gpu", marks=NO_GPU)])
def small_gpu(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A GPU, or what stands for one, with memory for the codes and not for the rows."""
    index = StoredIndex.open(folder)
    codes, rows = needs(index)
    assert codes < rows
    monkeypatch.setattr(gpu, "room", lambda: (codes + rows) // 2)
    if request.param == "processor":
        stand_in(monkeypatch)
    return str(request.param)


def needs(index: StoredIndex) -> tuple[int, int]:
    """Bytes of a GPU for codes, and for rows."""
    rows = len(index.ok_positions)
    return gpu_cells.codes_bytes(rows, DIM, CELLS, METRIC), gpu.rows_bytes(rows, DIM)


def stand_in(monkeypatch: pytest.MonkeyPatch, to_gpu: Callable[[Any], Any] = lambda e: e) -> None:
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu, "_to_gpu", to_gpu)


def asked(make: Callable[..., Rows] = make_rows) -> npt.NDArray[np.float64]:
    n = 20
    rows = make(2 * n, seed=7).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[:n] - rows[n:]


def inverted(folder: Path, metric: Metric = METRIC) -> tuple[StoredIndex, Rows, Inverted]:
    """An index, prepared queries, and its codes on the processor."""
    index = StoredIndex.open(folder)
    vectors, scale = prepare(index, asked(), metric)
    return index, vectors.astype(np.float32), Inverted(index, scale, metric, lambda empty: empty)


def recall(found: tuple[Any, Any], exact: tuple[Any, Any]) -> float:
    pairs = zip(exact[1], found[1], strict=True)
    return float(np.mean([np.isin(one, other).mean() for one, other in pairs]))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("metric", METRICS, ids=lambda m: f"{m.similarity}-{m.preconditioning}")
def test_finds_what_exact_search_finds(
    folder: Path, small_gpu: str, metric: Metric, largest: bool
) -> None:
    index = StoredIndex.open(folder)
    for top in (10, 100):
        by: set[str] = set()
        exact = search(index, asked(), top, metric=metric, largest=largest, exact=True)
        found = search(index, asked(), top, metric=metric, largest=largest, proposers=by)
        assert by == {"gpu"}
        assert recall(found, exact) >= 0.99
        for row in range(len(asked())):
            _, here, there = np.intersect1d(exact[1][row], found[1][row], return_indices=True)
            np.testing.assert_array_equal(exact[0][row][here], found[0][row][there])
    assert isinstance(gpu._HELD[index], Inverted)


def test_every_searchable_row_stands_in_one_list(folder: Path) -> None:
    index, _, codes = inverted(folder)
    assert not np.isin([*BAD, *DELETED], index.ok_positions).any()
    files = codes._files.values()
    assert len(files) > 3  # octaves of length
    numbers = []
    for file in files:
        for cell in range(CELLS):
            count = file.invlists.list_size(cell)
            ids = gpu_cells.faiss.rev_swig_ptr(file.invlists.get_ids(cell), count)
            numbers.append(ids.copy())
    np.testing.assert_array_equal(np.sort(np.concatenate(numbers)), index.ok_positions)
    assert codes._sizes.sum() == len(index.ok_positions)
    used = sum(len(ids) for ids in numbers) * (file.code_size + 8)
    assert used <= needs(index)[0] <= 2 * used


def test_candidates_are_ascending_and_as_many_as_promised(folder: Path) -> None:
    index, vectors, codes = inverted(folder)
    for top, count in ((1, 256), (64, 256), (100, 400), (200, 512), (256, 512)):
        proposed = codes.candidates(vectors, top, index.ok_positions)
        assert proposed is not None
        for rows in proposed:
            assert len(rows) == count
            assert (np.diff(rows) > 0).all()
            assert np.isin(rows, index.ok_positions).all()
    # Twice the results is the least that is looked at.
    assert codes.candidates(vectors, 257, index.ok_positions) is None


def test_batches_of_queries_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors, codes = inverted(folder)
    whole = codes.candidates(vectors, 10, index.ok_positions)
    monkeypatch.setattr(gpu_cells, "_SCRATCH_BYTES", 1)
    single = codes.candidates(vectors, 10, index.ok_positions)
    assert whole is not None
    assert single is not None
    for one, other in zip(whole, single, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_long_row_takes_no_precision_from_the_others(tmp_path: Path, folder: Path) -> None:
    rows = make_rows()
    rows[5] *= 1e5
    with IndexWriter.create(tmp_path / "long", feature_space_id="s", recipe={}, dim=DIM) as writer:
        add(writer, rows, 0)
        writer.finish()
    index, vectors, codes = inverted(tmp_path / "long", Metric())
    _, exact = search(index, vectors, 10, exact=True)
    proposed = codes.candidates(vectors, 10, index.ok_positions)
    assert proposed is not None
    shares = [np.isin(best, rows).mean() for best, rows in zip(exact, proposed, strict=True)]
    assert np.mean(shares) >= 0.99


def test_a_part_of_the_rows_is_left_to_the_processor(folder: Path, small_gpu: str) -> None:
    index = StoredIndex.open(folder)
    part, by = index.ok_positions[::2], set[str]()
    exact = search(index, asked(), 10, metric=METRIC, positions=part, exact=True)
    found = search(index, asked(), 10, metric=METRIC, positions=part, proposers=by)
    assert not by
    np.testing.assert_array_equal(found[1], exact[1])


@pytest.fixture
def proved(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index whose cells were made and measured by the processor."""
    for name, value in {
        "FROM_ROWS": 1000, "FROM_CELLS": 1000, "SEGMENT_ROWS": 500, "SHARE": 20, "PER_HIT": 10,
    }.items():  # fmt: skip
        monkeypatch.setattr(accelerator, name, value)
    monkeypatch.setattr(cells, "TOPS", (10, 30))
    for module in (cells, gpu_cells):
        monkeypatch.setattr(module, "TARGET", 0.9)
    write_index(tmp_path / "proved", crowds(), weights=(1.0,))
    index = StoredIndex.open(tmp_path / "proved")
    scale = prepare(index, asked(), METRIC)[1]
    built = Accelerator.ready(index, scale, METRIC).calibration
    assert built is not None
    assert built.visit(10) is not None
    return index.folder


def test_proved_cells_are_all_that_is_scanned(
    proved: Path, small_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*given: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr(Cells, "of_index", again)
    index = StoredIndex.open(proved)
    exact = search(index, asked(crowds), 10, metric=METRIC, exact=True)
    for largest, expected in ((True, {"gpu", "cells"}), (False, {"gpu"})):
        by: set[str] = set()
        found = search(index, asked(crowds), 10, metric=METRIC, largest=largest, proposers=by)
        assert by == expected
        if largest:
            assert recall(found, exact) >= 0.9


@pytest.mark.parametrize("change", ["came", "went"])
def test_cells_prove_nothing_of_rows_that_came_or_once_many_went(
    proved: Path, small_gpu: str, change: str
) -> None:
    with IndexWriter.open(proved) as writer:
        if change == "came":
            add(writer, crowds(100, seed=3), N)
        else:
            writer.write_tombstones(np.arange(0, N, 4))
        writer.finish()
    by: set[str] = set()
    search(StoredIndex.open(proved), asked(crowds), 10, metric=METRIC, proposers=by)
    assert by == {"gpu"}


def test_another_metric_takes_the_place_of_the_one_before(
    folder: Path, small_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = StoredIndex.open(folder)
    former: list[weakref.ref[Inverted]] = []
    to_gpu = gpu._to_gpu

    def placed(empty: Any) -> Any:
        assert all(ref() is None for ref in former)  # its memory is free
        return to_gpu(empty)

    monkeypatch.setattr(gpu, "_to_gpu", placed)
    for metric in (METRIC, METRIC, Metric("cosine", "both", damping=3.0)):
        search(index, asked(), 10, metric=metric)
        held = gpu._HELD[index]
        assert isinstance(held, Inverted)
        assert held.metric == metric
        former.append(weakref.ref(held))
        del held
    assert former[0] is former[1]


def test_cells_visited_by_a_slow_count(proved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, vectors, codes = inverted(proved)
    visit = codes.visit(10)
    assert visit is not None
    assert codes.visit(31) is None  # beyond what was measured
    whitened = codes._whitening.queries(vectors)
    homes = np.full(N, -1)
    for block, rows in index.blocks():
        homes[block] = codes._cells.of(codes._whitening.rows(rows))
    least = accelerator.candidates_for(N, 10)
    needed = 0
    for query in whitened:
        nearest, held, count = np.argsort(-(codes._cells.centres @ query)), 0, 0
        while count < visit or held < least:
            held += int((homes == nearest[count]).sum())
            count += 1
        needed = max(needed, count)
    assert codes._probes(whitened, 10, visit) == needed < CELLS
    proposed = codes.candidates(vectors, 10, index.ok_positions, visit)
    assert proposed is not None
    for query, found in zip(whitened, proposed, strict=True):
        nearest = np.argsort(-(codes._cells.centres @ query))[:needed]
        assert np.isin(homes[found], nearest).mean() > 0.99  # but for ties of rounding
    # Codes of the processor that found less than it should prove nothing here.
    monkeypatch.setattr(gpu_cells, "TARGET", 1.01)
    assert codes.visit(10) is None


def test_cells_that_hold_too_few_rows_are_not_the_last_word(proved: Path) -> None:
    index, vectors, codes = inverted(proved)
    everything = codes.candidates(vectors, 10, index.ok_positions)
    codes._sizes[:] = N  # as if any cell were enough
    few = codes._probes(codes._whitening.queries(vectors), 10, 1)
    assert few == 1
    found = codes.candidates(vectors, 10, index.ok_positions, 1)
    assert found is not None
    assert everything is not None
    short = 0
    for query, rows in enumerate(found):
        assert len(rows) == 256
        short += np.array_equal(rows, everything[query])
    assert short > 0


def test_the_processor_takes_the_cells_that_were_made_for_the_gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "FROM_CELLS", 1000)
    index, _, codes = inverted(folder)
    ready = Accelerator.ready(index, prepare(index, asked(), METRIC)[1], METRIC)
    assert ready.cells is not None
    np.testing.assert_array_equal(ready.cells.centres, codes._cells.centres)


def test_a_folder_that_takes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "FROM_CELLS", 1000)
    index = StoredIndex.open(folder)
    with only_builder(folder_of(index, METRIC)):
        _, vectors, codes = inverted(folder)
    assert not list(folder.rglob("cells.npy"))
    assert codes.candidates(vectors, 10, index.ok_positions) is not None
    # Below FROM_CELLS rows the processor's codes have no cells: none may appear beside them.
    monkeypatch.setattr(accelerator, "FROM_CELLS", N)
    inverted(folder)
    assert not list(folder.rglob("cells.npy"))


def test_what_the_memory_holds_is_chosen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in(monkeypatch)

    class Whole:
        def __init__(self, *given: object) -> None:
            pass

    monkeypatch.setattr(gpu, "Resident", Whole)
    index = StoredIndex.open(folder)
    scale = prepare(index, asked(), METRIC)[1]
    codes, rows = needs(index)
    for room, kind in ((None, Whole), (rows, Whole), (rows - 1, Inverted), (codes, Inverted)):
        assert type(gpu.hold(index, scale, METRIC, room)) is kind
    assert "searched by codes on the GPU" in caplog.text
    assert "by the processor" not in caplog.text
    assert gpu.hold(index, scale, METRIC, codes - 1) is None
    assert "searched by the processor: its codes need" in caplog.text


def test_nothing_half_copied_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Memory that runs out while rows are copied is free before codes are, and after."""
    made: list[weakref.ref[Any]] = []

    class Full:
        def __init__(self, *given: object) -> None:
            made.append(weakref.ref(self))
            raise RuntimeError("out of memory")

    class Small:
        def __init__(self) -> None:
            assert made[0]() is None
            made.append(weakref.ref(self))

        def add_with_ids(self, *given: object) -> None:
            raise RuntimeError("a trace\nalloc fail")

    stand_in(monkeypatch, lambda empty: Small())
    monkeypatch.setattr(gpu, "Resident", Full)
    monkeypatch.setattr(gpu, "room", lambda: None)
    index = StoredIndex.open(folder)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    for _ in range(2):  # it is not tried again
        by: set[str] = set()
        found = search(index, asked(), 10, metric=METRIC, proposers=by)
        np.testing.assert_array_equal(found[1], exact[1])
        assert not by
        assert len(made) == 2
        assert [ref() for ref in made] == [None, None]
    assert "searched by the processor: alloc fail" in caplog.text


@NO_GPU
def test_a_gpu_takes_the_codes_of_the_processor(folder: Path) -> None:
    index, vectors, here = inverted(folder)
    scale = prepare(index, asked(), METRIC)[1]
    there = Inverted(index, scale, METRIC, gpu._to_gpu)
    np.testing.assert_array_equal(there._sizes.sum(), here._sizes.sum())
    for top in (10, 128, 256):
        one = here.candidates(vectors, top, index.ok_positions)
        other = there.candidates(vectors, top, index.ok_positions)
        assert one is not None
        assert other is not None
        shared = [np.isin(a, b).mean() for a, b in zip(one, other, strict=True)]
        assert np.mean(shared) >= 0.99


@NO_GPU
def test_memory_of_a_gpu_is_told_and_given_back(folder: Path) -> None:
    index = StoredIndex.open(folder)
    scale = prepare(index, asked(), METRIC)[1]
    gpu.hold(index, scale, METRIC, needs(index)[0])  # FAISS's own is taken
    before = gpu.room()
    assert before is not None
    assert before > 0
    held = gpu.hold(index, scale, METRIC, needs(index)[0])
    assert isinstance(held, Inverted)
    del held
    assert gpu.room() == before
