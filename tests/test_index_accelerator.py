"""The accelerator finds what an exact search finds, is never stale, and gives way when it must."""

from __future__ import annotations

import fcntl
import logging
import shutil
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt
import pytest
from plain_index import write_index

from headwater.index import IndexWriter, Metric, StoredIndex, accelerator, derived, merge, search
from headwater.index import codes as store
from headwater.index.excerpt import Excerpt
from headwater.index.files import sha256_of
from headwater.index.manifest import Shard
from headwater.index.metrics import prepare
from headwater.index.whitening import Whitening

faiss: Any = _faiss
DIM, N = 128, 6000
METRIC = Metric("ip", "query", damping=3.0)


def make_rows(n: int = N) -> npt.NDArray[np.float32]:
    """Gradient-like: most of the length is one direction, the spectrum falls, there are groups."""
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 1e-2, DIM)
    groups = rng.standard_normal((300, DIM))
    turned = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    rows = (groups[rng.integers(0, 300, n)] + 0.5 * rng.standard_t(4, (n, DIM))) * spectrum
    rows[:, 0] += 2
    return (rows @ turned).astype(np.float32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accelerator") / "idx"
    write_index(folder, make_rows())
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the index, with sizes at which a small index is a large one."""
    for name, value in {
        "FROM_ROWS": 1000, "SEGMENT_ROWS": 2000, "SHARE": 20, "PER_HIT": 20,
    }.items():  # fmt: skip
        monkeypatch.setattr(accelerator, name, value)
    return shutil.copytree(whole, tmp_path / "idx")


def asked(n: int = 20) -> npt.NDArray[np.float64]:
    rows = make_rows(N + 2 * n)[N:].astype(np.float64)
    return rows[:n] - rows[n:]


def codes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.codes")}


def recall(exact: tuple[Any, Any], found: tuple[Any, Any]) -> float:
    """The share of exact hits that were found."""
    pairs = zip(exact[1], found[1], strict=True)
    return float(np.mean([np.isin(one, other).mean() for one, other in pairs]))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(
    "metric",
    [
        METRIC,
        Metric("cosine", "both"),
        Metric("ip", "none"),
        Metric("cosine", "query"),
        Metric("relative", "query"),
        Metric("standard", "query"),
    ],
)
def test_finds_what_exact_search_finds(folder: Path, metric: Metric, largest: bool) -> None:
    index = StoredIndex.open(folder)
    by: set[str] = set()
    exact = search(index, asked(), 10, metric=metric, largest=largest, exact=True, proposers=by)
    assert not codes(folder)
    assert not by
    found = search(index, asked(), 10, metric=metric, largest=largest, proposers=by)
    assert len(codes(folder)) == 3
    assert by == {"accelerator"}
    hits = 0
    for row in range(len(asked())):
        both, here, there = np.intersect1d(exact[1][row], found[1][row], return_indices=True)
        hits += len(both)
        # What is found in both is scored alike, to the bit.
        np.testing.assert_array_equal(exact[0][row][here], found[0][row][there])
    assert hits >= 0.97 * found[1].size


def test_deleted_rows_are_never_proposed(folder: Path) -> None:
    index = StoredIndex.open(folder)
    first = search(index, asked(), 10, metric=METRIC)
    built = codes(folder)
    deleted = np.unique(first[1])  # all that was found
    with IndexWriter.open(folder) as writer:
        writer.write_tombstones(deleted)
        writer.finish(event="delete")
    index = StoredIndex.open(folder)
    vectors, scale = prepare(index, asked(), METRIC)
    proposed = accelerator.candidates(
        index, vectors.astype(np.float32), scale, 10, index.searchable(), METRIC
    )
    assert proposed is not None
    assert not any(np.isin(positions, deleted).any() for positions in proposed)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    assert recall(exact, search(index, asked(), 10, metric=METRIC)) >= 0.97
    assert codes(folder) == built  # a deletion makes no code again


def test_a_build_that_was_cut_short_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    real, done = store.encode, []

    def encode(*arguments: Any) -> Any:
        if len(done) == 2:
            raise Killed
        done.append(arguments)
        return real(*arguments)

    index = StoredIndex.open(folder)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    with monkeypatch.context() as patch:
        patch.setattr(store, "encode", encode)
        with pytest.raises(Killed):
            search(index, asked(), 10, metric=METRIC)
    part = codes(folder)
    assert len(part) == 2
    found = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    assert recall(exact, found) >= 0.97
    now = codes(folder)
    assert len(now) == 3
    assert {name: now[name] for name in part} == part


def test_excerpts_keep_their_codes_apart(folder: Path) -> None:
    manifest = StoredIndex.open(folder).manifest
    search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    for start, stop in ((0, 6), (6, 12), (0, 12)):
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.codes")}
        excerpt = Excerpt(folder, manifest, start, stop)
        exact = search(excerpt, asked(), 10, metric=METRIC, exact=True)
        assert recall(exact, search(excerpt, asked(), 10, metric=METRIC)) >= 0.97
        after = {p: p.stat().st_mtime_ns for p in folder.rglob("*.codes")}
        assert before.items() < after.items()


def test_a_row_of_extreme_length_leaves_the_others_found(folder: Path, tmp_path: Path) -> None:
    rows = make_rows()
    rows[5] *= 1e5
    write_index(tmp_path / "extreme", rows)
    index, metric = StoredIndex.open(tmp_path / "extreme"), Metric("ip", "none")
    exact = search(index, asked(), 10, metric=metric, exact=True)
    assert recall(exact, search(index, asked(), 10, metric=metric)) >= 0.97


def test_whitening_keeps_inner_products_and_shortens_rows(folder: Path) -> None:
    index = StoredIndex.open(folder)
    rows, (solved, _) = make_rows(500), prepare(index, asked(), METRIC)
    whitening = Whitening.of(index, METRIC)
    made, vectors = whitening.rows(rows), whitening.queries(solved.astype(np.float32))
    expected = rows.astype(np.float64) @ solved.T
    factor = (made @ vectors.T) / expected
    assert np.median(np.abs(factor / np.median(factor, axis=0) - 1)) < 1e-3
    assert 0.3 < np.median(np.linalg.norm(made, axis=1)) / np.median(
        np.linalg.norm(rows, axis=1)
    ) < 3  # fmt: skip


def test_long_queries_do_not_overflow(folder: Path) -> None:
    index = StoredIndex.open(folder)
    whitening = Whitening.of(index, METRIC)
    query = make_rows(3)
    long = whitening.queries(query * np.float32(1e30))
    np.testing.assert_allclose(long, whitening.queries(query), rtol=1e-3, atol=1e-2)


def test_a_selection_is_honoured_and_few_survivors_are_searched_exactly(folder: Path) -> None:
    index = StoredIndex.open(folder)
    half = np.arange(1, N, 2)
    exact = search(index, asked(), 10, metric=METRIC, positions=half, exact=True)
    found = search(index, asked(), 10, metric=METRIC, positions=half)
    assert np.isin(found[1], half).all()
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact[1], found[1], strict=True)]) > 0.97
    few = np.arange(0, N, 60)
    vectors, scale = prepare(index, asked(), METRIC)
    single = vectors.astype(np.float32)
    assert accelerator.candidates(index, single, scale, 10, few, METRIC) is None
    assert accelerator.candidates(index, single, scale, 10, half, METRIC) is not None
    assert accelerator.candidates(index, single, scale, 500, half, METRIC) is None
    exact = search(index, asked(), 10, metric=METRIC, positions=few, exact=True)
    found = search(index, asked(), 10, metric=METRIC, positions=few)
    np.testing.assert_array_equal(exact[1], found[1])


def test_candidates_stay_below_a_most(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = StoredIndex.open(folder)
    vectors, scale = prepare(index, asked(), METRIC)
    single, everything = vectors.astype(np.float32), index.ok_positions
    free = accelerator.candidates(index, single, scale, 10, everything, METRIC)
    assert free is not None
    assert {len(row) for row in free} == {300}
    monkeypatch.setattr(accelerator, "MOST", 50)
    few = accelerator.candidates(index, single, scale, 10, everything, METRIC)
    assert few is not None
    assert {len(row) for row in few} == {50}
    # The running cut keeps what one cut over all estimates keeps.
    for row, all_of_them in zip(few, free, strict=True):
        assert np.isin(row, all_of_them).all()
    assert accelerator.candidates(index, single, scale, 40, everything, METRIC) is None


def test_a_running_cut_keeps_what_one_cut_keeps(folder: Path) -> None:
    index = StoredIndex.open(folder)
    vectors, scale = prepare(index, asked(), METRIC)
    ready = accelerator.Accelerator.ready(index, scale, METRIC)
    whitened = ready.whitening.queries(vectors.astype(np.float32))
    parts = [segment.estimates(whitened, 250, index.ok_positions) for segment in ready.segments]
    estimates, positions = (np.concatenate(c, axis=1) for c in zip(*parts, strict=True))
    expected = np.take_along_axis(positions, np.argsort(-estimates, axis=1)[:, :250], axis=1)
    found = ready.candidates(vectors.astype(np.float32), 250, index.ok_positions)
    np.testing.assert_array_equal(np.stack(found), np.sort(expected, axis=1))


def test_kept_codes_are_used_again_and_those_of_a_copy_are_built_once(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    assert "building" in caplog.text
    caplog.clear()
    built = codes(folder)
    again = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(first[1], again[1])
    assert codes(folder) == built
    assert not caplog.text
    # Whoever made the copy, or the codes in it: FAISS must not read what this user did not write.
    moved = shutil.copytree(folder, tmp_path / "moved")
    copied = next(moved.rglob("*.codes"))
    copied.write_bytes(b"hostile")
    copied.with_name(copied.name + ".sha256").write_text(sha256_of(copied))
    for _ in range(2):
        again = search(StoredIndex.open(moved), asked(), 10, metric=METRIC)
        np.testing.assert_array_equal(first[1], again[1])
        assert caplog.text.count("building") == 1
    assert len(codes(moved)) == 3
    assert codes(folder) == built


def test_without_a_place_for_checksums_every_row_is_looked_at(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = StoredIndex.open(folder)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = search(index, asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(exact[1], found[1])
    assert "every row is looked at" in caplog.text


@pytest.mark.parametrize("other", ["codes", "whitening"])
def test_what_is_not_of_these_rows_counts_as_damaged(
    folder: Path, other: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    path = next(folder.rglob("*.npz" if other == "whitening" else "*.codes"))
    if other == "codes":
        small = faiss.index_factory(8, store.FACTORY, faiss.METRIC_INNER_PRODUCT)
        small.train(np.eye(8, dtype=np.float32))
        derived.keep(folder, path, lambda file: store.write(small, file))
    else:
        arrays = {"vectors": np.eye(8), "factors": np.ones(8)}
        derived.keep(folder, path, lambda file: np.savez(file, **arrays))
    again = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(first[1], again[1])
    assert f"{path} is damaged" in caplog.text


def test_other_shards_and_other_weights_make_other_codes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = StoredIndex.open(folder)
    search(index, asked(), 10, metric=METRIC)
    built = codes(folder)
    # Two shards more than before: as an append leaves the folder.
    grown = tmp_path / "grown"
    write_index(grown, np.concatenate([make_rows(), make_rows(1000)]))
    shutil.copytree(grown, folder, dirs_exist_ok=True)
    larger = StoredIndex.open(folder)
    exact = search(larger, asked(), 10, metric=METRIC, exact=True)
    found = search(larger, asked(), 10, metric=METRIC)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact[1], found[1], strict=True)]) > 0.97
    assert (found[1] >= N).any()
    now = codes(folder)
    assert len(now) == 4
    assert built.keys() < now.keys()
    assert {name: now[name] for name in built} == built  # read, not written again
    # Other weights of the same rows: nothing old may be used.
    monkeypatch.setattr(StoredIndex, "weights", np.linspace(-1, 1, N + 1000).astype(np.float32))
    weighted = StoredIndex.open(folder)
    exact = search(weighted, asked(), 10, metric=METRIC, exact=True)
    found = search(weighted, asked(), 10, metric=METRIC)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact[1], found[1], strict=True)]) > 0.97
    assert not codes(folder).keys() & built.keys()


@pytest.mark.parametrize("damage", ["flip", "cut", "whitening"])
def test_damage_is_noticed_and_mended(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    caplog.clear()
    path = next(folder.rglob("*.npz" if damage == "whitening" else "*.codes"))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)
    again = search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(first[1], again[1])
    assert f"{path} is damaged" in caplog.text
    caplog.clear()
    search(StoredIndex.open(folder), asked(), 10, metric=METRIC)
    assert not caplog.text


def test_a_folder_that_takes_nothing_and_a_builder_elsewhere_mean_exact(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = StoredIndex.open(folder)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    (folder / "faiss").write_text("a file where the folder would be")  # root may write anywhere
    found = search(index, asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(exact[1], found[1])
    assert "every row is looked at" in caplog.text
    (folder / "faiss").unlink()
    index = StoredIndex.open(folder)  # the other remembers
    kind = folder / "faiss" / "all" / "ip-query-3"
    kind.mkdir(parents=True)
    caplog.clear()
    with (kind / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = search(index, asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(exact[1], found[1])
    assert "every row is looked at" in caplog.text
    with caplog.at_level(logging.WARNING):
        search(index, asked(), 10, metric=METRIC)
    assert len(codes(folder)) == 3


def test_a_disk_that_fills_up_means_exact(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", lambda codes, file, real=store.write: real(codes, Full()))
    tried = []
    encode = store.encode
    monkeypatch.setattr(store, "encode", lambda *a: tried.append(1) or encode(*a))
    index = StoredIndex.open(folder)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    for _ in range(2):
        found = search(index, asked(), 10, metric=METRIC)
        np.testing.assert_array_equal(exact[1], found[1])
    assert len(tried) == 1  # of three segments, in two searches
    assert "No space left" in caplog.text
    assert "every row is looked at" in caplog.text
    assert not list(folder.rglob("*.writing"))
    assert not codes(folder)


@pytest.mark.parametrize("step", ["faiss", "faiss/all", "faiss/all/ip-query-3/lock"])
def test_a_link_is_not_followed_to_files_outside(
    folder: Path, tmp_path: Path, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    if step.endswith("lock"):
        outside.write_text("of the user")
    else:
        outside.mkdir()
    (folder / step).parent.mkdir(parents=True, exist_ok=True)
    (folder / step).symlink_to(outside)
    index = StoredIndex.open(folder)
    exact = search(index, asked(), 10, metric=METRIC, exact=True)
    found = search(index, asked(), 10, metric=METRIC)
    np.testing.assert_array_equal(exact[1], found[1])
    assert "every row is looked at" in caplog.text
    assert (
        outside.read_text() == "of the user" if outside.is_file() else not list(outside.iterdir())
    )


def test_segments_take_whole_shards() -> None:
    def shards(*sizes: int) -> list[Shard]:
        return [Shard(f"part-{i:05d}", size, 0, {}) for i, size in enumerate(sizes)]

    assert accelerator.segments(shards(5, 5, 5, 5, 5), 10) == [(0, 2), (2, 4), (4, 5)]
    assert accelerator.segments(shards(30, 4), 10) == [(0, 1), (1, 2)]
    assert accelerator.segments(shards(), 10) == []


def test_results_of_parts_merge_into_that_of_the_whole(folder: Path) -> None:
    index = StoredIndex.open(folder)
    whole = search(index, asked(), 30, metric=METRIC, exact=True)
    parts = [
        search(index, asked(), 30, metric=METRIC, exact=True, positions=part)
        for part in (np.arange(40), np.arange(40, 4000), np.arange(4000, N))
    ]
    merged = merge(parts, 30)
    for one, other in zip(whole, merged, strict=True):
        np.testing.assert_array_equal(one, other)
