"""Cells before the codes: used as far as the index itself shows that they hold the hits."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Command
from plain_index import SHARD, Rows, add, write_index

from headwater.index import (
    IndexWriter,
    Metric,
    StoredIndex,
    accelerator,
    calibrations,
    cells,
    codes,
    derived,
    search,
)
from headwater.index.accelerator import Accelerator, candidates_for
from headwater.index.cells import Calibration, Cells, Measured
from headwater.index.metrics import prepare
from headwater.queries.ask import _told

DIM, N, CELLS = 128, 6000, 32
METRIC = Metric("ip", "query", damping=3.0)
METRICS = [Metric(s, p) for s in ("ip", "cosine") for p in ("none", "query", "both")]
METRICS += [Metric(s, "query") for s in ("relative", "standard")]
GROUPS = np.random.default_rng(99).standard_normal((40, DIM))


def crowds(n: int = N, seed: int = 0) -> Rows:
    """Rows in 40 tight groups of their own directions: the best of a query share a cell."""
    rng = np.random.default_rng(seed)
    return (GROUPS[rng.integers(0, 40, n)] + 0.2 * rng.standard_t(8, (n, DIM))).astype(np.float32)


def fog(n: int = N) -> Rows:
    """Rows in all directions alike: no cell is better than another."""
    return np.random.default_rng(3).standard_normal((n, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cells") / "crowds"
    write_index(folder, crowds())
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the index, with sizes at which a small index is a large one."""
    for name, value in {
        "FROM_ROWS": 1000, "FROM_CELLS": 2000, "SEGMENT_ROWS": 2000, "SHARE": 20, "PER_HIT": 10,
    }.items():  # fmt: skip
        monkeypatch.setattr(accelerator, name, value)
    monkeypatch.setattr(cells, "TOPS", (10, 30))
    monkeypatch.setattr(cells, "LEAST_SHARE", 1 / 64)
    monkeypatch.setattr(cells, "TARGET", 0.95)  # a contrast within a group finds no cell
    monkeypatch.setattr(cells, "cell_count", lambda rows: CELLS)
    return shutil.copytree(written, tmp_path / "idx")


def asked(n: int = 20) -> npt.NDArray[np.float64]:
    """Differences of rows of two groups."""
    found = np.random.default_rng(5).standard_normal((n, DIM)) * 0.2
    return GROUPS[:n] - GROUPS[n : 2 * n] + found


def ready(folder: Path, metric: Metric = METRIC) -> tuple[StoredIndex, Accelerator]:
    index = StoredIndex.open(folder)
    return index, Accelerator.ready(index, prepare(index, asked(1), metric)[1], metric)


def recall(index: StoredIndex, top: int = 10, **options: object) -> tuple[float, set[str]]:
    """The share of exact hits that are found, and who proposed."""
    by: set[str] = set()
    options = {"metric": METRIC} | options
    exact = search(index, asked(), top, exact=True, **options)
    found = search(index, asked(), top, proposers=by, **options)
    pairs = zip(exact[1], found[1], strict=True)
    return float(np.mean([np.isin(one, other).mean() for one, other in pairs])), by


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("metric", METRICS, ids=lambda m: f"{m.similarity}-{m.preconditioning}")
def test_finds_what_exact_search_finds(folder: Path, metric: Metric, largest: bool) -> None:
    index = StoredIndex.open(folder)
    share, by = recall(index, metric=metric, largest=largest)
    assert share >= 0.97
    (calibration,) = calibrations(index).values()
    assert calibration.visit(10) is not None
    # What is least like a query gathers in no cell: all codes are scanned.
    assert by == ({"accelerator", "cells"} if largest else {"accelerator"})
    # Scores are exact to the bit, as without.
    exact = search(index, asked(), 10, metric=metric, largest=largest, exact=True)
    found = search(index, asked(), 10, metric=metric, largest=largest)
    for row in range(len(asked())):
        _, here, there = np.intersect1d(exact[1][row], found[1][row], return_indices=True)
        np.testing.assert_array_equal(exact[0][row][here], found[0][row][there])


def test_cells_that_do_not_hold_the_hits_are_not_used(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, headwater: Command
) -> None:
    write_index(tmp_path / "fog", fog())
    index = StoredIndex.open(tmp_path / "fog")
    _, by = recall(index)
    assert by == {"accelerator"}
    (calibration,) = calibrations(index).values()
    for found in calibration.measured:
        assert found.visit is None
        assert found.recall < cells.TARGET or found.scanned > cells.MOST_SHARE
        why = "would read" if found.scanned > cells.MOST_SHARE else "half of 32 cells"
        line = next(line for line in calibration.told() if f"for {found.top} " in line)
        assert why in line
        assert line in caplog.text
    code, out, _ = headwater("inspect", tmp_path / "fog")
    assert code == 0
    assert "scans all codes" in " ".join(out.split())


def test_below_a_number_of_rows_there_are_no_cells(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accelerator, "FROM_CELLS", N + 1)
    index = StoredIndex.open(folder)
    assert recall(index)[1] == {"accelerator"}
    assert not list(folder.rglob("*.layout"))
    assert not calibrations(index)
    # Grown to enough: the codes are made again, sorted.
    monkeypatch.setattr(accelerator, "FROM_CELLS", N)
    share, by = recall(StoredIndex.open(folder))
    assert share >= 0.97
    assert by == {"accelerator", "cells"}
    assert len(list(folder.rglob("*.codes"))) == len(list(folder.rglob("*.layout"))) == 3


def test_as_few_cells_as_suffice_by_a_slow_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration, over: dense scores in double precision, query by query."""
    monkeypatch.setattr(cells, "TARGET", 0.975)  # more than the first number of cells gives
    index, built = ready(folder)
    assert built.calibration is not None
    assert built.cells is not None
    rows = np.concatenate([block for _, block in index.blocks()]).astype(np.float64)
    kinds = [
        [
            (vector, np.setdiff1d(np.argsort(-rows @ vector)[:40], of, assume_unique=True))
            for vector, of in zip(queries.astype(np.float64), sources, strict=True)
        ]
        for queries, sources in cells._sample_queries(index, METRIC)
    ]
    assert [len(kind) for kind in kinds] == [cells.SAMPLED, cells.SAMPLED]
    assert built.calibration.queries == 2 * cells.SAMPLED

    def worst(top: int, visit: int | None) -> float:
        count = candidates_for(N, top)
        shares = []
        for kind in kinds:
            hits = []
            for vector, best in kind:
                single = vector[None].astype(np.float32)
                proposed = built.candidates(single, count, index.ok_positions, visit)[0]
                hits.append(np.isin(best[:top], proposed).mean())
            shares.append(np.mean(hits))
        return float(min(shares))

    for found in built.calibration.measured:
        target = min(cells.TARGET, found.everything)
        tried = cells._visits(built.cells.count)
        assert found.everything == pytest.approx(worst(found.top, None), abs=1e-9)
        fewer = tried
        if found.visit is not None:
            assert found.recall == pytest.approx(worst(found.top, found.visit), abs=1e-9)
            assert found.recall >= target
            assert found.scanned <= cells.MOST_SHARE
            fewer = [visit for visit in tried if visit < found.visit]
        assert fewer
        assert all(worst(found.top, visit) < target for visit in fewer)


def test_sample_queries_are_made_of_the_rows_they_leave_out(folder: Path) -> None:
    index = StoredIndex.open(folder)
    rows = np.concatenate([block for _, block in index.blocks()]).astype(np.float64)
    for metric in (METRIC, Metric("cosine", "both", damping=3.0)):
        (single, of), (contrast, two) = cells._sample_queries(index, metric)
        assert (of[:, 0] == of[:, 1]).all()
        assert (two[:, 0] != two[:, 1]).all()
        made = (rows[of[:, 0]], rows[two[:, 0]] - rows[two[:, 1]])
        for vectors, raw in zip((single, contrast), made, strict=True):
            expected, _ = prepare(index, raw, metric)
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(vectors, expected, atol=1e-6)


def test_only_rows_of_the_nearest_cells_are_proposed(folder: Path) -> None:
    index, built = ready(folder)
    assert built.cells is not None
    vectors = prepare(index, asked(), METRIC)[0].astype(np.float32)
    whitened = built.whitening.queries(vectors)
    home = np.argmax(built.whitening.rows(crowds()) @ built.cells.centres.T, axis=1)
    orders = np.argsort(-whitened @ built.cells.centres.T, axis=1)[:, :9]
    proposed = built.candidates(vectors, 50, index.ok_positions, 9)
    inside = [np.isin(home, order) for order in orders]
    # A row in half precision may lie in the other of two cells as near.
    assert np.mean([seen[rows].mean() for seen, rows in zip(inside, proposed, strict=True)]) > 0.99
    assert built.share(vectors, 50, 9) == pytest.approx(np.mean(inside), rel=0.01)
    assert built.share(vectors, 50, None) == 1
    # All cells visited: what all codes propose.
    everything = built.candidates(vectors, 50, index.ok_positions)
    visited = built.candidates(vectors, 50, index.ok_positions, built.cells.count)
    np.testing.assert_array_equal(np.stack(everything), np.stack(visited))


def test_cells_that_hold_too_few_rows_do_not_shorten_the_answer(folder: Path) -> None:
    index, built = ready(folder)
    vectors = prepare(index, asked(3), METRIC)[0].astype(np.float32)
    proposed = built.candidates(vectors, 2500, index.ok_positions, 1)
    assert {len(rows) for rows in proposed} == {2500}


def test_sorted_codes_estimate_as_unsorted_ones(folder: Path) -> None:
    index, built = ready(folder)
    _, scale = prepare(index, asked(1), METRIC)
    first = built.segments[0].codes.ntotal
    plain, none = codes.encode(index, built.whitening, None, 0, scale[:first])
    assert none is None
    unsorted = codes.Segment("", 0, codes.unit_of(scale[:first]), plain, None)
    queries = built.whitening.queries(prepare(index, asked(), METRIC)[0].astype(np.float32))
    for wanted in (index.ok_positions, index.ok_positions[::3]):
        values, rows = built.segments[0].estimates(queries, first, wanted)
        expected, where = unsorted.estimates(queries, first, wanted)
        np.testing.assert_array_equal(
            np.take_along_axis(values, np.argsort(rows, axis=1), axis=1),
            np.take_along_axis(expected, np.argsort(where, axis=1), axis=1),
        )


def test_a_part_of_the_rows_is_searched_in_all_cells(folder: Path) -> None:
    index = StoredIndex.open(folder)
    assert recall(index)[1] == {"accelerator", "cells"}
    share, by = recall(index, positions=np.arange(1, N, 2))
    assert share >= 0.97
    assert by == {"accelerator"}
    share, by = recall(index, top=40)  # more results than it was measured for
    assert share >= 0.97
    assert by == {"accelerator"}


def test_deleted_rows_are_left_out_and_many_of_them_mean_measuring_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)[1]
    built = {p: p.stat().st_mtime_ns for p in folder.rglob("*.codes")}
    for deleted in (np.unique(first), np.arange(0, N, 4)):
        with IndexWriter.open(folder) as writer:
            writer.write_tombstones(np.union1d(StoredIndex.open(folder).deleted_positions, deleted))
            writer.finish(event="delete")
        caplog.clear()
        index = StoredIndex.open(folder)
        share, by = recall(index)
        assert share >= 0.97
        assert by == {"accelerator", "cells"}
        assert not np.isin(search(index, asked(), 10, metric=METRIC)[1], deleted).any()
        assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.codes")} == built
        assert ("a search for 10 visits" in caplog.text) == (len(deleted) > N // 8)


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_calibration_that_cannot_be_kept_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "keep", full)
    share, by = recall(StoredIndex.open(folder))
    assert share >= 0.97
    assert by == {"accelerator", "cells"}
    assert "No space left" in caplog.text
    assert "every row is looked at" not in caplog.text
    assert not calibrations(StoredIndex.open(folder))


def test_where_nothing_can_be_written_an_aged_calibration_means_all_codes(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    with IndexWriter.open(folder) as writer:
        writer.write_tombstones(np.arange(0, N, 6))
        writer.finish(event="delete")
    monkeypatch.setattr(derived, "keep", full)
    lock = folder / "faiss" / "all" / "ip-query-3" / "lock"
    lock.unlink()
    lock.mkdir()  # root may write anywhere, but no one into a folder as into a file
    caplog.clear()
    share, by = recall(StoredIndex.open(folder))
    assert share >= 0.97
    assert by == {"accelerator"}
    assert "a search scans all codes" in caplog.text
    assert "every row is looked at" not in caplog.text
    # A builder elsewhere will have measured soon: nothing is settled for this process.
    lock.rmdir()
    index = StoredIndex.open(folder)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert recall(index)[1] == set()


def test_appended_rows_are_scanned_whole_until_they_are_many(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, before = ready(folder)
    for count, again in ((SHARD, False), (2 * SHARD, True)):
        caplog.clear()
        with IndexWriter.open(folder) as writer:
            pairs = np.random.default_rng(count).integers(0, 40, (2, count))
            new = (GROUPS[pairs[0]] - GROUPS[pairs[1]] + 0.1 * fog(count)).astype(np.float32)
            add(writer, new, writer.manifest.rows)
            writer.finish()
        index = StoredIndex.open(folder)
        share, by = recall(index)
        assert share >= 0.97
        _, after = ready(folder)
        assert ("of the exact best of" in caplog.text) == again
        assert after.cells is not None
        assert before.cells is not None
        np.testing.assert_array_equal(after.cells.centres, before.cells.centres)
        if not again:
            assert by == {"accelerator", "cells"}
            assert after.calibration == before.calibration
            vectors = prepare(index, new[:20], METRIC)[0].astype(np.float32)
            # One cell visited: what was appended is proposed wherever it lies.
            proposed = after.candidates(vectors, 300, index.ok_positions, 1)
            for row, rows in enumerate(proposed):
                assert N + row in rows
            assert after.share(vectors, 300, 1) > SHARD / (N + SHARD)


def test_negative_weights_turn_rows_round(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.linspace(-1, 1, N).astype(np.float32)
    monkeypatch.setattr(StoredIndex, "weights", weights)
    share, by = recall(StoredIndex.open(folder))
    assert share >= 0.97
    assert by == {"accelerator", "cells"}


@pytest.mark.parametrize("name", ["cells.npy", "calibration.json", "*.layout"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_noticed_and_mended(
    folder: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    path = next(folder.rglob(name))
    content = path.read_bytes()
    caplog.clear()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 0x40]) + content[-8:])
    again = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(first[1], again[1])
    assert (f"{path} is damaged" in caplog.text) == (damage != "gone")
    caplog.clear()
    search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    assert not caplog.text
    assert path.read_bytes() == content


def test_what_is_of_another_index_counts_as_damaged(folder: Path) -> None:
    index, built = ready(folder)
    assert built.cells is not None
    assert built.calibration is not None
    place = folder / "faiss" / "all" / "ip-query-3"
    Cells(np.ones((4, 8), np.float32)).keep(folder, place / "cells.npy")
    assert Cells.kept(index, built.whitening, place / "cells.npy") is None
    layout = next(iter(place.glob("*.layout")))
    with pytest.raises(OSError, match=layout.name):
        codes.Layout.load(layout, N, built.cells.count)
    derived.keep(folder, place / "other.json", lambda file: file.write(b'{"cells": 3}'))
    assert Calibration.kept(folder, place / "other.json") is None


def test_cells_grow_with_the_root_of_the_rows() -> None:
    assert [cells.cell_count(n) for n in (0, 10_000, 1_000_000, 4_000_000)] == [1, 128, 1024, 2048]
    assert cells.cell_count(10**9) == cells.MOST_CELLS


def test_far_too_few_cells_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, built = ready(folder)
    assert built.cells is not None
    assert built.cells.count == CELLS
    np.testing.assert_allclose(np.linalg.norm(built.cells.centres, axis=1), 1, atol=1e-4)
    place = folder / "faiss" / "all" / "ip-query-3" / "cells.npy"
    for factor, kept in ((2, True), (4, False)):
        monkeypatch.setattr(cells, "cell_count", lambda rows, by=CELLS * factor: by)
        assert (Cells.kept(index, built.whitening, place) is not None) == kept


def test_the_result_says_that_some_cells_were_scanned() -> None:
    (told,) = _told(False, {"accelerator", "cells"})
    assert "nearest cells only" in told
    (told,) = _told(False, {"accelerator"})
    assert "cells" not in told
    assert "in a hundred" in told
    assert not list(_told(False, {"gpu"}))
    assert list(_told(False, {"gpu", "cells"})) == list(_told(False, {"accelerator", "cells"}))
    assert "in ten" in list(_told(True, {"accelerator"}))[-1]


def test_what_was_measured_is_told() -> None:
    found = Calibration(
        1024, 128, 10**6, ("a",),
        (
            Measured(10, 64, 0.9931, 0.071, 0.996), Measured(100, None, 0.9312, 0.46, 0.98),
            Measured(200, None, 0.9951, 0.62, 0.999),
        ),
    )  # fmt: skip
    one, other, third = found.told()
    assert "for 10 visits 64 of 1,024 cells (7% of the codes)" in one
    assert "0.993 of the exact best of 128 sample queries (all codes 0.996)" in one
    assert "for 100 scans all codes: half of 1,024 cells proposed only 0.931" in other
    assert (
        "for 200 scans all codes: cells would read 62% of the codes, which proposed 0.995" in third
    )
    assert "half" not in third
    assert [found.visit(top) for top in (1, 10, 11, 100, 101)] == [64, 64, None, None, None]


def test_a_calibration_ages_by_one_row_in_eight() -> None:
    found = Calibration(1024, 128, 10**6, ("a",), ())
    sizes = {"a": 1_000_000, "b": 100_000}
    assert not found.aged(sizes, 1_100_000)
    assert found.aged(sizes | {"b": 200_000}, 1_200_000)
    assert found.aged({"a": 10**6}, 870_000)
    assert not found.aged({"a": 10**6}, 880_000)
    # The last segment grew: it has another name, and its old rows neither came nor went.
    found = Calibration(1024, 128, 10**6, ("a", "b"), ())
    assert not found.aged({"a": 920_000, "c": 80_100}, 1_000_100)
    assert not found.aged({"a": 880_000, "c": 120_000 + 100}, 1_000_100)
    assert found.aged({"a": 920_000, "c": 131_072, "d": 8_928}, 1_060_000)
    # Rows were deleted besides.
    assert not found.aged({"a": 920_000, "c": 100_000}, 980_000)
    assert found.aged({"a": 920_000, "c": 100_000}, 960_000)
    # A compaction left no segment as it was.
    assert found.aged({"c": 900_000, "d": 90_000}, 990_000)
