"""Eight metrics equal a dense float64 reference, on the processor and on a GPU if FAISS has one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from headwater.index import (
    IndexStoreError,
    IndexWriter,
    Metric,
    StoredIndex,
    derived,
    gpu,
    metrics,
    scores,
    search,
)
from headwater.index.metrics import Curvature, prepare, row_scale

Float64 = npt.NDArray[np.float64]
DIM, N, RANK = 64, 900, 40
BAD = (5, 400)
METRICS = [
    Metric(similarity, preconditioning, damping=0.5)
    for similarity in ("ip", "cosine")
    for preconditioning in ("none", "query", "both")
] + [Metric(similarity, "query", damping=0.5) for similarity in ("relative", "standard")]
ON_GPU = pytest.param(
    "gpu",
    marks=pytest.mark.skipif(not gpu.available(), reason="no GPU, or a FAISS built without it"),
)
PIECE_ROWS = 300  # no multiple of a shard's


def write_index(
    folder: Path, rank: int = RANK, dim: int = DIM, n: int = N, unit: float = 1.0
) -> StoredIndex:
    """Rows of a falling spectrum around a far mean, lengths and weights over decades."""
    rng = np.random.default_rng(3)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:rank] * (
        0.85 ** np.arange(rank)[:, None]
    )
    rows = (rng.standard_normal((n, rank)) + 0.5) @ basis
    rows *= unit * rng.lognormal(-6, 1, (n, 1))
    weights = rng.uniform(0.2, 3, n).astype(np.float32)
    writer = IndexWriter.create(folder, feature_space_id="s", recipe={}, dim=dim)
    stored = []
    for first in range(0, n, 250):
        numbers = range(first, min(first + 250, n))
        items = pa.table(
            {
                "item_id": [str(i) for i in numbers],
                "status": ["quarantined" if i in BAD else "ok" for i in numbers],
                "error": pa.array(["broken" if i in BAD else None for i in numbers], pa.string()),
                "row_weight": weights[first : first + 250],
            }
        )
        thumbs = pa.table(
            {"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())}
        )
        part = rows[first : first + 250].astype(np.float32)
        stored.append(writer.add_shard(items, part, thumbs).astype(np.float64))
    phi = np.concatenate(stored)
    values, vectors = np.linalg.eigh(phi.T @ phi)
    solid = values > values[-1] * 1e-12
    writer.write_curvature(
        {
            "eigenvalues": values[solid][::-1],
            "eigenvectors": np.ascontiguousarray(vectors[:, solid][:, ::-1]),
            "rows": np.array(n - len(BAD)),
        }
    )
    writer.finish()
    return StoredIndex.open(folder)


@pytest.fixture(scope="module", params=[RANK, DIM])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StoredIndex:
    """Once with a curvature of full rank, once with directions that no row has."""
    return write_index(tmp_path_factory.mktemp("metrics") / "idx", request.param)


def root(matrix: Float64) -> Float64:
    """The symmetric inverse square root."""
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def reference(index: StoredIndex, queries: Float64, metric: Metric) -> Float64:
    """[Q, N] from the files, by dense matrices and the definitions as they are written down."""
    units = np.concatenate([index.features(s).astype(np.float64) for s in index.manifest.shards])
    items = index.items()
    phi = units * items["row_norm"].to_numpy().astype(np.float64)[:, None]
    weights = items["row_weight"].to_numpy().astype(np.float64)
    gram = phi.T @ phi
    lam = metric.damping * np.trace(gram) / (phi.any(axis=1).sum())
    inverse_root = root(gram + lam * np.eye(len(gram)))
    left, right = queries, phi
    if metric.preconditioning == "query":
        left = queries @ inverse_root @ inverse_root
    if metric.preconditioning == "both":
        left, right = queries @ inverse_root, phi @ inverse_root
    if metric.similarity == "cosine":
        left = left / np.linalg.norm(left, axis=1, keepdims=True)
        lengths = np.linalg.norm(right, axis=1)
        if metric.preconditioning != "both":  # before rounding to half precision
            lengths = items["row_norm"].to_numpy().astype(np.float64)
        right = right / np.maximum(lengths, 1e-300)[:, None]
    if metric.similarity == "relative":
        solved = phi @ np.linalg.inv(gram + lam * np.eye(len(gram)))
        right = right / np.maximum(np.linalg.norm(solved, axis=1), 1e-300)[:, None]
    if metric.similarity == "standard":
        solved = phi @ np.linalg.inv(gram + lam * np.eye(len(gram)))
        variances = np.einsum("nd,de,ne->n", solved, gram / phi.any(axis=1).sum(), solved)
        right = right / np.sqrt(np.maximum(variances, 1e-300))[:, None]
    return np.asarray((left @ right.T) * weights)


def asked(index: StoredIndex, n: int = 7) -> Float64:
    rows = np.concatenate([block for _, block in index.blocks()]).astype(np.float64)
    rng = np.random.default_rng(1)
    return rows[rng.integers(0, 800, n)] - rows[rng.integers(0, 800, n)]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, if there is one, takes the rows of any index, a small one in several pieces."""
    monkeypatch.setattr(gpu, "FROM_ROWS", 1)
    monkeypatch.setattr(gpu, "FROM_QUERIES", 1)
    monkeypatch.setattr(gpu, "PIECE_BYTES", 2 * DIM * PIECE_ROWS)
    monkeypatch.setattr(gpu, "_HELD", WeakKeyDictionary())  # no rows of a test before


def stand_in(monkeypatch: pytest.MonkeyPatch, flat: Callable[[int], Any]) -> None:
    """A flat index on the processor, in single precision, for one on a GPU."""
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu, "honours_selectors", lambda: True)
    monkeypatch.setattr(gpu, "room", lambda: None)
    monkeypatch.setattr(gpu, "_flat", flat)


@pytest.mark.parametrize("way", ["blocks", "pieces", ON_GPU])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("metric", METRICS, ids=lambda m: f"{m.similarity}-{m.preconditioning}")
def test_equals_dense_float64(
    index: StoredIndex,
    metric: Metric,
    largest: bool,
    way: str,
    pieces: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "pieces":
        stand_in(monkeypatch, faiss.IndexFlatIP)
    queries = asked(index)
    truth = reference(index, queries, metric)
    some = index.ok_positions[PIECE_ROWS // 2 : -PIECE_ROWS : 2]  # none of the last piece
    for positions in (index.ok_positions, some):
        by: set[str] = set()
        found, where = search(
            index, queries, 20, metric=metric, largest=largest, positions=positions, proposers=by,
            exact=way == "blocks",
        )  # fmt: skip
        proposed = way != "blocks" and (positions is not some or gpu.honours_selectors())
        assert by == ({"gpu"} if proposed else set())
        for values, got, row in zip(truth, found, where, strict=True):
            allowed = values[positions]
            best = np.sort(allowed)[::-1][:20] if largest else np.sort(allowed)[:20]
            tolerance = 1e-5 * np.abs(allowed).max()
            np.testing.assert_allclose(got, best, atol=tolerance, rtol=0)
            np.testing.assert_allclose(got, values[row], atol=tolerance, rtol=0)
            assert np.isin(row, positions).all()


def test_rows_are_there_once_and_a_piece_twice(
    index: StoredIndex, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAISS copies what a piece has to new room for it and what is added."""
    made: list[faiss.IndexFlatIP] = []
    peak = 0

    class Exact(faiss.IndexFlatIP):  # type: ignore[misc]
        def add(self, rows: npt.NDArray[np.float32]) -> None:
            nonlocal peak
            held = sum(piece.ntotal for piece in made)
            super().add(rows)
            peak = max(peak, held + self.ntotal)

    def flat(dim: int) -> Any:
        made.append(Exact(dim))
        return made[-1]

    stand_in(monkeypatch, flat)
    monkeypatch.setattr(gpu, "_BLOCK_ROWS", 100)
    metric = METRICS[0]
    gpu.Resident(index, row_scale(index, metric), metric)
    count = len(index.ok_positions)
    assert [piece.ntotal for piece in made] == [300, 300, count - 600]
    needed = gpu.rows_bytes(count, DIM) / (2 * DIM + 4)
    assert needed - PIECE_ROWS < peak <= needed
    assert gpu.rows_bytes(PIECE_ROWS, DIM) == 2 * PIECE_ROWS * (2 * DIM + 4)


def test_a_gpu_is_tried_once_and_not_for_the_first_queries(
    index: StoredIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(*given: object) -> None:
        tried.append(given)
        raise RuntimeError("out of memory")

    index = StoredIndex.open(index.folder)
    monkeypatch.setattr(gpu, "available", lambda: True)
    monkeypatch.setattr(gpu, "room", lambda: gpu.rows_bytes(N, DIM))
    monkeypatch.setattr(gpu, "Resident", full)
    monkeypatch.setattr(gpu, "FROM_ROWS", 1)
    monkeypatch.setattr(gpu, "FROM_QUERIES", 10)
    expected = search(index, asked(index), 20, exact=True)
    for attempts in (0, 1, 1):  # of seven queries each
        found = search(index, asked(index), 20)
        np.testing.assert_array_equal(found[1], expected[1])
        assert len(tried) == attempts


@pytest.mark.skipif(not gpu.available(), reason="no GPU, or a FAISS built without it")
@pytest.mark.parametrize("metric", METRICS, ids=lambda m: f"{m.similarity}-{m.preconditioning}")
def test_half_precision_scores_on_a_gpu(index: StoredIndex, metric: Metric, pieces: None) -> None:
    queries = asked(index)
    vectors, scale = prepare(index, queries, metric)
    resident = gpu.Resident(index, scale, metric)
    truth = reference(index, queries, metric)
    in_half = resident.scores(vectors.astype(np.float32), 20)
    assert in_half is not None
    found, where = in_half
    for values, got, row in zip(truth, found, where, strict=True):
        np.testing.assert_allclose(got, values[row], atol=1e-2 * np.abs(values).max(), rtol=0)


@pytest.mark.parametrize("unit", [2.0**-50, 2.0**30])
def test_the_unit_of_raw_gradients_does_not_matter(tmp_path: Path, unit: float) -> None:
    """Rows near 1e-18 and 1e6: the scores of the same rows in another unit, to rounding."""
    index = write_index(tmp_path / "one")
    other = write_index(tmp_path / "other", unit=unit)
    query = asked(index)[0]
    for metric in METRICS:
        expected = scores(index, query, metric=metric).astype(np.float64)
        if metric.similarity == "ip" and metric.preconditioning == "none":
            expected *= unit**2
        elif metric.similarity == "relative":
            expected *= unit
        found = scores(other, query * unit, metric=metric)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_both_sides_under_an_inner_product_rank_as_one(index: StoredIndex) -> None:
    query = asked(index)[0]
    one = scores(index, query, metric=Metric("ip", "query"))
    both = scores(index, query, metric=Metric("ip", "both"))
    np.testing.assert_array_equal(one, both)
    cosine = scores(index, query, metric=Metric("cosine", "both"))
    assert np.argsort(cosine).tolist() != np.argsort(one).tolist()


@pytest.mark.parametrize("damping", [0.01, 10.0])
def test_standard_scores_of_the_rows_themselves_have_deviation_one(
    index: StoredIndex, damping: float
) -> None:
    """Asked with every row and its negative, each row scores 0 on average and scatters by 1."""
    units = np.concatenate([index.features(s).astype(np.float64) for s in index.manifest.shards])
    rows = (units * index.norms[:, None])[index.ok_positions]
    vectors, scale = prepare(index, rows, Metric("standard", "query", damping))
    found = vectors @ units.T * (scale / index.weights)
    spread = np.sqrt(np.square(found).mean(axis=0))
    np.testing.assert_allclose(spread[index.ok_positions], 1, rtol=1e-5)
    assert not scale[list(BAD)].any()


def test_a_row_outside_of_the_curvature_has_no_deviation() -> None:
    """As one that was taken out of it may be: what is left of it there is rounding."""
    turned = np.linalg.qr(np.random.default_rng(0).standard_normal((DIM, DIM)))[0]
    curvature = Curvature(np.geomspace(1, 1e-6, RANK), turned[:, :RANK], N)
    rows = np.stack([*turned.T, np.zeros(DIM)])
    assert ((rows[RANK:DIM] @ curvature.eigenvectors) != 0).any()
    found = curvature.lengths(rows, 0.5, "standard")
    assert (found[:RANK] > 0).all()
    assert not found[RANK:].any()
    lam = 0.5 * np.geomspace(1, 1e-6, RANK).sum() / N
    for similarity, length in (("cosine", lam**-0.5), ("relative", 1 / lam)):
        np.testing.assert_allclose(curvature.lengths(rows, 0.5, similarity)[RANK:-1], length)


def test_solve_is_what_attribution_computes(index: StoredIndex) -> None:
    import torch

    from headwater import attribution

    queries = asked(index)
    theirs = attribution.Curvature.from_arrays(index.curvature())
    expected = theirs.precondition(torch.from_numpy(queries), 0.5).numpy()
    found = Curvature.of(index).solve(queries, 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * np.abs(expected).max())


def test_lengths_are_kept_and_made_again_when_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_index(tmp_path / "idx")
    metric = Metric("cosine", "both")
    first = row_scale(index, metric)
    (path,) = (tmp_path / "idx" / "faiss").rglob("*.npy")
    written = path.stat().st_mtime_ns
    np.testing.assert_array_equal(row_scale(index, metric), first)
    assert path.stat().st_mtime_ns == written
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    np.testing.assert_array_equal(row_scale(index, metric), first)
    assert "damaged" in caplog.text
    caplog.clear()
    derived.keep(index.folder, path, lambda file: np.save(file, np.ones(3)))
    np.testing.assert_array_equal(row_scale(index, metric), first)
    assert "damaged" in caplog.text
    for other in (
        Metric("cosine", "both", damping=7.0),
        Metric("relative", "query", damping=10.0),
        Metric("standard", "query", damping=10.0),
    ):
        assert (row_scale(index, other) != first).any()
    # Of an index that was changed, only the lengths as they are now stay.
    kept = set((tmp_path / "idx" / "faiss").rglob("lengths-*.npy"))
    assert len(kept) == 4
    with IndexWriter.open(tmp_path / "idx") as writer:
        writer.write_tombstones(np.array([1]))
        writer.finish(event="delete")
    row_scale(StoredIndex.open(tmp_path / "idx"), metric)
    now = set((tmp_path / "idx" / "faiss").rglob("lengths-*.npy"))
    assert len(now) == 4
    assert path not in now
    assert len(kept & now) == 3  # of the other damping and the other kinds


def test_lengths_where_they_formerly_stood_are_removed(tmp_path: Path) -> None:
    index = write_index(tmp_path / "idx")
    faiss = tmp_path / "idx" / "faiss"
    former, of_a_part = faiss / "lengths-0123456789abcdef.npy", faiss / "part" / "lengths-1-0.5.npy"
    for path in (former, of_a_part, faiss / "notes.npy"):
        derived.keep(index.folder, path, lambda file: np.save(file, np.ones(N)))
    row_scale(index, Metric("cosine", "both"))
    assert not former.exists()
    assert not derived.checksum(index.folder, former).exists()
    assert of_a_part.exists()
    assert (faiss / "notes.npy").exists()


def test_the_lengths_of_many_rows_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_index(tmp_path / "idx")
    for told_from, count in ((N + 1, 0), (N, 1), (N, 1)):
        monkeypatch.setattr(metrics, "_TOLD_FROM", told_from)
        row_scale(index, Metric("standard", "query", damping=float(told_from)))
        assert caplog.text.count("lengths of all rows that 'standard' divides by") == count


def test_lengths_are_not_read_or_written_through_a_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_index(tmp_path / "idx")
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "idx" / "faiss").symlink_to(outside)
    assert (row_scale(index, Metric("cosine", "both")) > 0).any()
    assert "is a link" in caplog.text
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Metric("dot"),
            "similarity 'dot' is unknown; choose ip, cosine, relative, standard",
        ),
        (lambda: Metric("relative", "both"), "preconditioning is 'both'; choose .* 'query'"),
        (lambda: Metric("relative"), "preconditioning is 'none'; choose .* 'query'"),
        (lambda: Metric("standard", "both"), "'standard' divides .* choose .* 'query'"),
        (lambda: Metric("ip", "rows"), "choose none, query, both"),
        (lambda: Metric(damping=0.0), "damping is 0.0"),
        (lambda: Metric(damping=float("nan")), "damping is nan"),
    ],
)
def test_refused_metrics(call: Any, message: str) -> None:
    with pytest.raises(IndexStoreError, match=message):
        call()


def test_refused_queries(index: StoredIndex, tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="no cosine"):
        search(index, np.zeros((1, DIM)), 1, metric=Metric("cosine"))
    writer = IndexWriter.create(tmp_path / "bare", feature_space_id="s", recipe={}, dim=2)
    items = pa.table({"item_id": ["a"], "status": ["ok"], "error": pa.array([None], pa.string())})
    thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    writer.add_shard(items, np.ones((1, 2), np.float32), thumbs)
    writer.finish()
    bare = StoredIndex.open(tmp_path / "bare")
    with pytest.raises(IndexStoreError, match="holds no curvature"):
        search(bare, np.ones((1, 2)), 1, metric=Metric("ip", "query"))
