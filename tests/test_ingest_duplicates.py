"""The duplicates that an index keeps are those of its searchable items, whatever was done to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import Command, corpus_table, png
from forged_index import forge, named, parquet, with_column
from test_index_writer import VERSION_1, without_ledger

import headwater as hw
from headwater.index import IndexStoreError, StoredIndex, duplicate_groups, sql, write_manifest
from headwater.ingest import job

NONE = (None, None, None)


@pytest.fixture(scope="module")
def model() -> hw.Model:
    return hw.Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", 4)


def source(path: Path, pictures: list[int], first: int = 0) -> Path:
    """Records of which those with the same number have the same file; -1 is broken."""
    table = corpus_table(first + len(pictures)).slice(first)
    images = pa.array([b"broken" if n < 0 else png(n) for n in pictures])
    pq.write_table(table.set_column(table.column_names.index("image"), "image", images), path)
    return path


def ingest(path: Path, model: hw.Model, out: Path, **settings: Any) -> hw.IngestSummary:
    recipe = hw.Recipe(timesteps=1, dim=16)
    return hw.build_index(path, model, out, **{"recipe": recipe, "batch_size": 2, **settings})


def kept(folder: Path) -> dict[str, tuple[str | None, str | None, int | None]]:
    """What the file says, after checking that it is what the items give."""
    index = StoredIndex.open(folder)
    table = index.duplicates()
    assert table is not None
    found = {row["item_id"]: tuple(row.values())[1:] for row in table.to_pylist()}
    items = index.items().take(pa.array(index.ok_positions))
    groups = duplicate_groups(items).to_pylist()
    expected = {row["item_id"]: tuple(row.values())[1:] for row in groups}
    assert found == {name: told for name, told in expected.items() if told != NONE}
    assert hw.verify(folder).whole
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: hw.Model) -> Path:
    """A folder with a source and the index of it."""
    folder = tmp_path_factory.mktemp("duplicates")
    pictures = [0, 1, -1, 0, 2, 1, 0, -1, 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SHARD_ITEMS", 4)
        summary = ingest(source(folder / "a.parquet", pictures), model, folder / "idx")
    assert summary.duplicates is not None
    assert (summary.duplicates.exact, summary.duplicates.near) == (3, 0)
    return folder


@pytest.fixture
def index(made: Path, tmp_path: Path) -> Path:
    """A copy that can be changed."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "idx"


def exact(folder: Path) -> dict[str, str | None]:
    return {name: first for name, (first, _, _) in kept(folder).items()}


def test_they_follow_every_change(index: Path, tmp_path: Path, model: hw.Model) -> None:
    first = {"img-003": "img-000", "img-005": "img-001", "img-006": "img-000"}
    assert exact(index) == first
    files = {"duplicates/00001.parquet"}

    def listed() -> set[str]:
        return {name for name in without_ledger(index) if name.startswith("duplicates/")}

    assert listed() == files
    # Added: one that repeats a row of the index, and one that repeats a new one.
    ingest(source(tmp_path / "b.parquet", [9, 9, 2], first=9), model, index)
    assert exact(index) == first | {"img-010": "img-009", "img-011": "img-004"}
    assert listed() == {"duplicates/00002.parquet"}
    # Replaced: the first of its group becomes the last one.
    ingest(source(tmp_path / "c.parquet", [40, 0]), model, index, limit=1)
    assert "img-000" not in exact(index)
    assert exact(index)["img-006"] == "img-003"
    before = kept(index)
    # Deleted: the first of another group.
    hw.delete(index, ids=["img-001", "img-002"])
    assert exact(index) == {
        "img-006": "img-003", "img-010": "img-009", "img-011": "img-004",
    }  # fmt: skip
    assert len(before) == 4
    # Neither rows taken from the disk nor the deletion of what no search sees change anything.
    stays = listed()
    hw.compact(index)
    hw.delete(index, ids=["img-007"])
    assert listed() == stays
    assert len(kept(index)) == 3
    hw.delete(index, where="true")
    assert kept(index) == {}


def test_an_ingest_cut_short_ends_in_the_same_file(
    index: Path, tmp_path: Path, model: hw.Model
) -> None:
    class Stopped(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.done >= 5:
            raise Stopped

    for size in (1, 3):
        out = tmp_path / f"again-{size}"
        with pytest.raises(Stopped):
            ingest(tmp_path / "a.parquet", model, out, progress=stop)
        ingest(tmp_path / "a.parquet", model, out, batch_size=size)
        assert without_ledger(out) == without_ledger(index)


def row(*values: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.Table.from_pylist(
        [dict(zip(table.column_names, values, strict=True))], table.schema
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.drop_columns(["near_distance"]), "its columns are"),
        (lambda t: t.set_column(3, "near_distance", t["near_distance"].cast("int64")), "of other"),
        (lambda t: t.take([1, 0]), "in their order"),
        (lambda t: t.take([0, 0]), "each once"),
        (row("nobody", "img-000", None, None), "not searchable ones"),
        (row("img-002", "img-000", None, None), "not searchable ones"),  # in quarantine
        (row("img-003", "nobody", None, None), "duplicate_of 'nobody' is no searchable item"),
        (row("img-003", "img-005", None, None), "duplicate_of 'img-005' is no .* before the one"),
        (row("img-003", None, "img-005", 1), "near_duplicate_of 'img-005' is no"),
        (row("img-003", "img-001", None, None), "not the same sha256"),
        (row("img-003", "img-000", "img-000", None), "do not stand together"),
        (row("img-003", None, None, None), "names no other"),
        (lambda t: with_column(t, "item_id", 0, None), "not searchable ones"),
    ],
)
def test_what_cannot_be_is_found(
    index: Path, change: Callable[[pa.Table], pa.Table], problem: str
) -> None:
    name = "duplicates/00001.parquet"
    forge(index, name, parquet(change(pq.read_table(index / name))))
    (damage,) = hw.verify(index).damaged
    assert damage.file == name
    assert re.search(problem, damage.problem), damage.problem


def test_a_file_that_is_gone_is_named(index: Path, headwater: Command) -> None:
    name = "duplicates/00001.parquet"
    forge(index, name, b"no Parquet")
    assert named(hw.verify(index)) == [name]
    (index / name).unlink()
    assert named(hw.verify(index)) == [name]
    code, _, errors = headwater("inspect", index)
    assert (code, name in errors) == (2, True)


def test_they_are_asked_in_sql(index: Path) -> None:
    hw.delete(index, ids=["img-000"])
    found = sql(
        index,
        "SELECT item_id, duplicate_of, licence FROM duplicates JOIN items USING (item_id) "
        "ORDER BY position",
    )
    licences = corpus_table(9)["licence"].to_pylist()
    assert found.to_pylist() == [
        {"item_id": "img-005", "duplicate_of": "img-001", "licence": licences[5]},
        {"item_id": "img-006", "duplicate_of": "img-003", "licence": licences[6]},
    ]
    before = without_ledger(index)
    path = index / "duplicates/00002.parquet"
    for text in (
        f"COPY items TO '{path}'",
        f"WITH x AS (COPY items TO '{path}') FROM x",
        f"FROM read_parquet('{path}')",
        f"FROM '{path}'",
        "INSERT INTO duplicates VALUES ('a', 'b', NULL, NULL)",
    ):
        with pytest.raises(IndexStoreError, match=r"^sql "):
            sql(index, text)
    assert without_ledger(index) == before


def test_the_commands_print_what_the_file_says(
    index: Path, tmp_path: Path, headwater: Command, model_folder: Path
) -> None:
    def inspected(folder: Path) -> str:
        code, out, errors = headwater("inspect", folder)
        assert (code, errors) == (0, "")
        return " ".join(out.split())

    assert "duplicates 3 of a file, 0 near by its looks" in inspected(index)
    code, out, errors = headwater(
        *("ingest", tmp_path / "a.parquet", "--model", model_folder, "--out", tmp_path / "new"),
        *("--timesteps", 1, "--dim", 16, "--quiet"),
    )
    assert code == 0, errors
    assert "duplicates in the index: 3 of a file, 0 near by its looks" in out
    # Another file is another answer: nothing is computed.
    name = "duplicates/00001.parquet"
    forge(index, name, parquet(pq.read_table(index / name).slice(0, 1)))
    assert "duplicates 1 of a file, 0 near by its looks" in inspected(index)


def test_an_index_that_was_not_looked_through(
    index: Path, tmp_path: Path, headwater: Command
) -> None:
    shutil.copytree(VERSION_1, tmp_path / "v1")
    manifest = StoredIndex.open(index).manifest
    others = {k: v for k, v in manifest.files.items() if not k.startswith("duplicates/")}
    write_manifest(index, replace(manifest, files=others))
    for folder in (index, tmp_path / "v1"):
        assert StoredIndex.open(folder).duplicates() is None
        with pytest.raises(IndexStoreError, match=r"no table duplicates.*not looked through"):
            sql(folder, "FROM duplicates")
    code, out, _ = headwater("inspect", index)
    assert (code, "duplicates not looked for" in " ".join(out.split())) == (0, True)
    hw.delete(index, ids=["img-004"])
    assert len(kept(index)) == 3
    # Items without the columns that tell.
    hw.delete(tmp_path / "v1", ids=["id2"])
    assert StoredIndex.open(tmp_path / "v1").duplicates() is None
    assert json.loads((tmp_path / "v1/manifest.json").read_text())["schema_version"] == 2
