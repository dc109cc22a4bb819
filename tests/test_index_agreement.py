"""What hashes alone do not show: files as they are listed that do not belong together."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forged_index import DIM, forge, items, named, npy, parquet, thumbs, with_column, write_index

import headwater as hw
from headwater.index import IndexStoreError, IndexWriter, StoredIndex, verify


@pytest.fixture
def index(committed: Path, tmp_path: Path) -> Path:
    """A copy that can be damaged."""
    return Path(shutil.copytree(committed, tmp_path / "idx"))


def scaled(place: int, factor: float) -> Callable[[Any], Any]:
    def change(rows: Any) -> Any:
        rows = rows.copy()
        rows[place] = np.float16(factor) if place == 1 else rows[place] * np.float16(factor)
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (scaled(0, 1.002), "row 0 has length 1.00"),
        (scaled(4, 0.0), "row 4 has length 0, not 1"),
        (scaled(4, np.nan), "row 4 has length nan, not 1"),
        (scaled(1, 1e-4), "row 1 has length"),  # a quarantined one
        (lambda rows: rows[:-1], "holds float16 (4, 24), the manifest says float16 (5, 24)"),
        (lambda rows: rows[:, :-1].copy(), "holds float16 (5, 23)"),
        (lambda rows: rows.astype(np.float32), "holds float32 (5, 24)"),
    ],
)
def test_rows_that_are_no_unit_rows(
    index: Path, change: Callable[[Any], Any], problem: str
) -> None:
    name = "features/part-00000.npy"
    forge(index, name, npy(change(np.load(index / name))))
    found = verify(index)
    assert named(found) == [name]
    assert problem in found.damaged[0].problem


@pytest.mark.parametrize("dim", [1, 3, 4096, 100_000])
def test_rounded_unit_rows_of_any_width_are_whole(tmp_path: Path, dim: int) -> None:
    rows = np.random.default_rng(dim).standard_t(1.1, (5, dim)).astype(np.float32)
    rows[4] = 1
    with IndexWriter.create(tmp_path / "i", feature_space_id="x", recipe={}, dim=dim) as writer:
        writer.add_shard(items(0, 5), rows, thumbs(0, 5))
        writer.finish()
    assert verify(tmp_path / "i").whole


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.slice(1), "it has 3 items, the manifest says 4"),
        (lambda t: t.drop_columns(["row_norm"]), "it has no column row_norm"),
        (lambda t: with_column(t, "status", 0, "fine"), "neither 'ok' nor 'quarantined'"),
        (lambda t: with_column(t, "status", 0, None), "neither 'ok' nor 'quarantined'"),
        (lambda t: with_column(t, "status", 0, "quarantined"), "2 items are quarantined"),
        (lambda t: with_column(t, "error", 0, "x"), "states no reason, or an ok one does"),
        (lambda t: with_column(t, "item_id", 0, None), "an item has no item_id"),
        (lambda t: with_column(t, "item_id", 0, ""), "an item has no item_id"),
        (lambda t: with_column(t, "row_norm", 0, float("inf")), "row_norm of an ok item"),
        (lambda t: with_column(t, "row_norm", 0, 0.0), "row_norm is not above 0"),
        (lambda t: with_column(t, "row_norm", 2, 1.0), "row_norm is not above 0"),
        (lambda t: with_column(t, "row_weight", 0, float("nan")), "row_weight of an ok item"),
        (lambda t: with_column(t, "row_weight", 0, None), "row_weight of an ok item"),
        (lambda t: with_column(t, "item_id", 1, "id8"), "item_id 'id8' occurs twice, at positions"),
        (lambda t: with_column(t, "item_id", 1, "id2"), "'id2' occurs twice, at positions 2 and 6"),
    ],
)  # fmt: skip
def test_items_that_do_not_fit(
    index: Path, change: Callable[[pa.Table], pa.Table], problem: str
) -> None:
    name = "items/part-00001.parquet"
    forge(index, name, parquet(change(pq.read_table(index / name))))
    found = verify(index)
    assert named(found)[0] == name
    assert problem in found.damaged[0].problem


@pytest.mark.parametrize(
    ("first", "second"),
    [(pa.array([2**60] * 4), pa.array([0.5] * 11)), (pa.array([1] * 4), pa.array(["x"] * 11))],
)
def test_columns_that_cannot_be_read_together(index: Path, first: pa.Array, second: Any) -> None:
    for part, values in ((1, first), (2, second)):
        name = f"items/part-0000{part}.parquet"
        forge(index, name, parquet(pq.read_table(index / name).append_column("post", values)))
        (index / "ledger.jsonl").write_bytes(b"")
    with pytest.raises(pa.ArrowException):
        StoredIndex.open(index).items()
    found = verify(index)
    assert len(named(found)) == 2  # the ledger, which the forgery took away
    assert "do not fit those of the other parts" in found.damaged[0].problem


def test_an_id_may_stand_again_on_a_deleted_row(index: Path) -> None:
    name = "items/part-00001.parquet"
    table = pq.read_table(index / name)  # positions 5 to 8; 0 and 7 are deleted
    forge(
        index,
        name,
        parquet(with_column(with_column(table, "item_id", 1, "id0"), "item_id", 2, "id2")),
    )
    forge(index, "thumbs/part-00001.parquet", parquet(thumbs(5, 6)))
    assert verify(index).whole


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        (["id5", "id5"], "an item has two previews"),
        (["id0"], "a preview belongs to no item of its part"),
    ],
)
def test_previews_that_do_not_fit(index: Path, ids: list[str], problem: str) -> None:
    name = "thumbs/part-00001.parquet"
    forge(index, name, parquet(pa.table({"item_id": ids, "image": [b"x"] * len(ids)})))
    found = verify(index)
    assert [(d.file, d.problem) for d in found.damaged] == [(name, problem)]


@pytest.mark.parametrize(
    "positions",
    [np.array([0, 7, 7]), np.array([7, 0, 19]), np.array([-1, 7, 19]), np.array([0, 7, 20]),
     np.array([0, 7]), np.array([0, 7, 19], np.int32), np.array([[0, 7, 19]])],
)  # fmt: skip
def test_tombstones_that_are_none(index: Path, positions: Any) -> None:
    forge(index, "tombstones/00002.npy", npy(positions))
    assert named(verify(index)) == ["tombstones/00002.npy"]


@pytest.mark.parametrize(
    "name", ["features/part-00000.npy", "tombstones/00002.npy", "curvature/00002/gram.npy"]
)
def test_an_array_of_objects_is_never_unpickled(index: Path, tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    forge(index, name, npy(np.array([Trap(), 1], object)))
    found = verify(index)
    assert named(found) == [name]
    assert "Python objects" in found.damaged[0].problem
    stored = StoredIndex.open(index)
    read: dict[str, Callable[[], Any]] = {
        "features": lambda: stored.features(stored.manifest.shards[0]),
        "tombstones": lambda: stored.deleted_positions,
        "curvature": stored.curvature,
    }
    with pytest.raises(IndexStoreError, match="Python objects"):
        read[name.split("/")[0]]()
    assert not (tmp_path / "sprung").exists()


def test_curvature_with_nan_is_damaged(index: Path) -> None:
    forge(index, "curvature/00002/gram.npy", npy(np.full((DIM, DIM), np.nan)))
    assert named(verify(index)) == ["curvature/00002/gram.npy"]


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("rows", lambda a: a - 1, "usable rows"),
        ("rows", lambda a: np.array([a]), "usable rows"),
        ("eigenvalues", lambda a: a * 1.002, "its trace is"),
        ("eigenvalues", lambda a: a[1:], "its trace is"),
        ("eigenvectors", lambda a: a[:, 1:], "not (24, 24)"),
        ("gram", lambda a: a * 7, "its trace is"),
    ],
)
def test_curvature_of_other_rows_is_found(
    index: Path, name: str, change: Callable[[Any], Any], problem: str
) -> None:
    stored = StoredIndex.open(index)
    rows = np.concatenate([block for _, block in stored.blocks(weighted=False)]).astype(float)
    gram = rows.T @ rows
    write_curvature(index, {"gram": gram, **eigenpairs(gram), "rows": np.array(len(rows))})
    assert verify(index).whole
    path = f"curvature/00003/{name}.npy"
    forge(index, path, npy(change(np.load(index / path))))
    found = verify(index)
    told = {damage.file: damage.problem for damage in found.damaged}
    assert problem in told[path]


def eigenpairs(gram: np.ndarray[Any, Any]) -> dict[str, Any]:
    values, vectors = np.linalg.eigh(gram)
    return {"eigenvalues": values[::-1], "eigenvectors": vectors[:, ::-1]}


def write_curvature(index: Path, arrays: dict[str, Any]) -> None:
    with IndexWriter.open(index) as writer:
        writer.write_curvature(arrays)
        writer.finish(event="test")


@pytest.mark.parametrize("left", [[], ["rows", "eigenvalues"], ["gram", "gram_peak"]])
def test_a_curvature_of_an_ingest_that_is_not_listed_is_damage(
    corpus: Path, model_folder: Path, tmp_path: Path, left: list[str]
) -> None:
    """The manifest agrees with the ledger, and what it lists is there: too little."""
    folder = tmp_path / "idx"
    model = hw.Model.from_pretrained(model_folder, device="cpu")
    hw.build_index(corpus, model, folder, recipe=hw.Recipe(dim=8, timesteps=1))
    arrays = {name: np.array(array) for name, array in StoredIndex.open(folder).curvature().items()}
    assert verify(folder).whole
    write_curvature(folder, {name: arrays[name] for name in left})
    (damage,) = verify(folder).damaged
    assert damage.file == "manifest.json"
    missing = [n for n in ("eigenvalues", "eigenvectors", "rows") if n not in left]
    assert damage.problem == f"it lists no {' and no '.join(missing)} of the curvature"
    hw.delete(folder, where="true")  # no row, no curvature
    assert verify(folder).whole


def test_what_duckdb_cannot_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is known that Arrow reads and DuckDB does not, so here DuckDB itself fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise duckdb.IOException("IO Error: it\ncannot")

    folder = write_index(tmp_path / "i")
    monkeypatch.setattr(sys.modules["headwater.index.agreement"], "connect_items", fail)
    (damage,) = verify(folder).damaged
    assert damage.file == "items"
    assert damage.problem == "item ids cannot be compared: IO Error: it cannot"
