"""`headwater verify`: whatever is damaged is found and named; what is whole is called whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Command

import headwater as hw
from headwater.index import (
    IndexStoreError,
    IndexWriter,
    StoredIndex,
    Verification,
    ledger,
    read_manifest,
    verify,
    write_manifest,
)
from headwater.index.manifest import NewerSchemaError

DIM = 24
PARTS = ((0, 5), (5, 9), (9, 20))
DATA = Path(__file__).parent / "data"


def items(start: int, stop: int) -> pa.Table:
    bad = [n % 6 == 1 for n in range(start, stop)]
    return pa.table(
        {
            "item_id": [f"id{n}" for n in range(start, stop)],
            "caption": [f"caption {n}" for n in range(start, stop)],
            "status": ["quarantined" if b else "ok" for b in bad],
            "error": pa.array(["broken" if b else None for b in bad], pa.string()),
        }
    )


def thumbs(start: int, stop: int) -> pa.Table:
    return pa.table(
        {"item_id": [f"id{n}" for n in range(start, stop, 2)],
         "image": [bytes([n]) * 9 for n in range(start, stop, 2)]}
    )  # fmt: skip


def write_index(folder: Path) -> Path:
    """Two commits, the second with tombstones; then two queries in the ledger."""
    rng = np.random.default_rng(0)
    for first, parts in ((True, PARTS[:2]), (False, PARTS[2:])):
        writer = (
            IndexWriter.create(folder, feature_space_id="x", recipe={"a": 1}, dim=DIM)
            if first
            else IndexWriter.open(folder)
        )
        with writer:
            for start, stop in parts:
                scale = 10.0 ** rng.uniform(-9, 3, (stop - start, 1))
                rows = (rng.standard_t(2, (stop - start, DIM)) * scale).astype(np.float32)
                writer.add_shard(items(start, stop), rows, thumbs(start, stop))
            writer.write_curvature({"gram": np.eye(DIM), "trace": np.array(3.5)})
            if not first:
                writer.write_tombstones(np.array([0, 7, 19]))
            writer.finish()
    for prompt in ("a cat", "un café"):
        StoredIndex.open(folder).append_ledger("query", {"prompt": prompt})
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_index(tmp_path_factory.mktemp("verify") / "idx")


@pytest.fixture
def index(whole: Path, tmp_path: Path) -> Path:
    """A copy that can be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "idx"))


def files(folder: Path) -> list[str]:
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != "lock")


def named(found: Verification) -> list[str]:
    return [damage.file for damage in found.damaged]


def named_or_refused(folder: Path) -> list[str]:
    """The damaged files; a manifest whose version became a higher one is refused by name."""
    try:
        return named(verify(folder))
    except NewerSchemaError as error:
        assert f"{folder / 'manifest.json'} has schema version" in str(error)  # noqa: PT017
        return ["manifest.json"]


def test_a_whole_index_is_whole_and_nothing_is_changed(index: Path) -> None:
    before = {name: (index / name).read_bytes() for name in files(index)}
    steps: list[tuple[int, int]] = []
    found = hw.verify(index, progress=lambda done, total: steps.append((done, total)))
    assert found.whole
    assert found.damaged == ()
    assert found.leftovers == ()
    assert not found.unfinished
    assert (found.rows, found.files) == (20, len(before))
    assert found.bytes == sum(map(len, before.values()))
    last = json.loads(before["ledger.jsonl"].splitlines()[-1])
    assert (found.ledger_lines, found.ledger_head) == (4, last["hash"])
    assert steps[-1][0] == steps[-1][1] > 0
    assert {name: (index / name).read_bytes() for name in files(index)} == before


@pytest.mark.parametrize("seed", range(6))
def test_random_damage_is_found_and_named(index: Path, seed: int) -> None:
    draw = random.Random(seed)
    names = files(index)
    for name in [*draw.sample(names, 6), "manifest.json", "ledger.jsonl"]:
        path = index / name
        content = path.read_bytes()
        place = draw.randrange(len(content))
        damages = {
            "flip": content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)])
            + content[place + 1 :],
            "truncate": content[:place],
            "zeros": content[:place] + bytes(len(content) - place),
            "insert": content[:place] + b"\x00" + content[place:],
            "extend": content + b"\x00",
        }  # fmt: skip
        for kind, damaged in damages.items():
            if damaged == content:
                continue
            path.write_bytes(damaged)
            found = named_or_refused(index)
            assert name in found, (name, kind, place)
            if name not in ("manifest.json", "ledger.jsonl"):
                assert found == [name]
        path.unlink()
        assert name in named(verify(index))
        path.write_bytes(content)
    assert verify(index).whole


def test_every_damaged_file_is_listed_the_first_of_the_manifest_first(index: Path) -> None:
    for name in ("thumbs/part-00002.parquet", "items/part-00001.parquet", "ledger.jsonl"):
        (index / name).unlink()
    found = verify(index)
    assert named(found)[-3:] == [
        "items/part-00001.parquet", "thumbs/part-00002.parquet", "ledger.jsonl",
    ]  # fmt: skip
    assert not found.whole


LINES = 4


@pytest.mark.parametrize(
    ("tamper", "problem"),
    [
        (lambda lines: [*lines[:2], lines[2].replace(b"a cat", b"a dog"), lines[3]],
         "line 3 is not what was written: its own hash differs"),
        (lambda lines: [lines[0], *lines[2:]], "line 2 hashes another line before it"),
        (lambda lines: lines[1:], "line 1 hashes another line before it"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2 hashes another line"),
        (lambda lines: [*lines[:2], lines[2], lines[2], lines[3]], "line 4 hashes another line"),
        (lambda lines: [*lines[:2], b"", *lines[2:]], "line 3 is not what was written, or"),
        (lambda lines: [*lines[:2], b" " + lines[2], lines[3]], "line 3 is not what was written"),
        (lambda lines: [*lines, b'{"event": "query"}'], "line 5 is cut short or overwritten"),
        (lambda lines: [*lines, b"[" * 5000], "line 5 is cut short or overwritten"),
        (lambda lines: [], "it is empty"),
    ],
)  # fmt: skip
def test_a_tampered_ledger_is_found(
    index: Path, tamper: Callable[[list[bytes]], list[bytes]], problem: str
) -> None:
    path = index / "ledger.jsonl"
    lines = path.read_bytes().splitlines()
    assert len(lines) == LINES
    path.write_bytes(b"".join(line + b"\n" for line in tamper(lines)))
    found = [d.problem for d in verify(index).damaged if d.file == "ledger.jsonl"]
    assert any(problem in text for text in found), found


def test_a_line_edited_and_hashed_anew_is_found_by_the_next(index: Path) -> None:
    path = index / "ledger.jsonl"
    lines = path.read_bytes().splitlines()
    entry = json.loads(lines[2])
    entry["details"]["prompt"] = "a dog"
    del entry["hash"]
    encode = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False}
    entry["hash"] = hashlib.sha256(json.dumps(entry, **encode).encode()).hexdigest()
    lines[2] = json.dumps(entry, **encode).encode()
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    assert ["line 4 hashes another line" in d.problem for d in verify(index).damaged] == [True]


def test_lines_removed_from_the_end_are_found_up_to_the_last_commit(index: Path) -> None:
    """Queries after it are known by the hash that was noted elsewhere, and by nothing else."""
    path = index / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    head = verify(index).ledger_head
    path.write_bytes(b"".join(lines[:-1]))
    found = verify(index)
    assert found.whole
    assert (found.ledger_lines, found.ledger_head != head) == (3, True)
    path.write_bytes(b"".join(lines[:1]))
    assert named(verify(index)) == ["manifest.json"]
    assert "no line of ledger.jsonl tells of generation 2" in verify(index).damaged[0].problem


def test_an_older_manifest_put_back_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    with IndexWriter.create(folder, feature_space_id="x", recipe={}, dim=2) as writer:
        writer.add_shard(items(0, 1), np.ones((1, 2), np.float32), thumbs(0, 1))
        writer.finish()
    old = (folder / "manifest.json").read_bytes()
    with IndexWriter.open(folder) as writer:
        writer.add_shard(items(2, 3), np.ones((1, 2), np.float32), thumbs(2, 3))
        writer.finish()
    assert verify(folder).whole
    (folder / "manifest.json").write_bytes(old)
    found = verify(folder)
    assert named(found) == ["manifest.json"]
    assert "later generation, 2" in found.damaged[0].problem
    content = json.loads(old) | {"generation": 0}  # as if of version 1
    (folder / "manifest.json").write_text(json.dumps(content))
    assert named(verify(folder)) == ["manifest.json"]


def test_a_commit_killed_before_its_line_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_index(tmp_path / "idx")
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "append", lambda *_: (_ for _ in ()).throw(OSError("killed")))
        with IndexWriter.open(folder) as writer:
            writer.write_tombstones(np.array([2, 3]))
            with pytest.raises(OSError, match="killed"):
                writer.finish()
    assert (folder / "commit.json").exists()
    assert verify(folder).whole
    assert StoredIndex.open(folder).manifest.generation == 3
    with IndexWriter.open(folder):
        pass
    assert verify(folder).whole
    assert verify(folder).ledger_lines == LINES + 1


def test_a_commit_killed_before_its_manifest_is_whole(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("headwater.index.writer.write_manifest", lambda *_: 1 / 0)
        with IndexWriter.open(index) as writer:
            writer.write_tombstones(np.array([2, 3]))
            with pytest.raises(ZeroDivisionError):
                writer.finish()
    found = verify(index)
    assert found.whole
    assert found.leftovers == ("tombstones/00003.npy",)
    (index / "commit.json").write_text("nonsense")
    assert verify(index).whole


# What hashes alone do not show: files that are as listed, but do not belong together. ------------


def forge(folder: Path, name: str, content: bytes, **changes: Any) -> None:
    """Replace a file and list its new hash, in a manifest that no ledger speaks of."""
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = read_manifest(folder)
    shards = tuple(
        replace(shard, files={k: digest if k == name else v for k, v in shard.files.items()})
        for shard in manifest.shards
    )
    others = {k: digest if k == name else v for k, v in manifest.files.items()}
    changes = {"shards": shards, "files": others, "generation": 0} | changes
    write_manifest(folder, replace(manifest, **changes))
    (folder / "ledger.jsonl").unlink()
    ledger.append(folder, "ingest", {})


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def with_column(table: pa.Table, name: str, place: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[place] = value
    return table.set_column(
        table.column_names.index(name), name, pa.array(values, table.schema.field(name).type)
    )


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


def test_files_and_folders_that_lead_out_are_refused(index: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in ("items/part-00001.parquet", "curvature/00002", "manifest.json", "ledger.jsonl"):
        target = outside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(index / name, target)
        (index / name).symlink_to(target)
        found = verify(index)
        assert "leads out of the index" in found.damaged[0].problem
        assert found.damaged[0].file.startswith(name)
        (index / name).unlink()
        shutil.move(target, index / name)
    assert verify(index).whole
    content = json.loads((index / "manifest.json").read_text())
    content["files"]["../outside/x.npy"] = "0" * 64
    (index / "manifest.json").write_text(json.dumps(content))
    assert "../outside/x.npy" in verify(index).damaged[0].problem


def test_leftovers_are_told_apart(index: Path, tmp_path: Path) -> None:
    for name in ("items/part-00009.parquet", "manifest.json.writing", "faiss/key/x.faiss", "notes"):
        (index / name).parent.mkdir(parents=True, exist_ok=True)
        (index / name).write_bytes(b"x")
    (index / "link").symlink_to(tmp_path)
    found = verify(index)
    assert found.whole
    assert found.leftovers == ("link", "manifest.json.writing", "notes", "items/part-00009.parquet")
    assert not found.unfinished
    (index / "job").mkdir()
    (index / "job" / "job.json").write_text('{"first_part": 3}')
    found = verify(index)
    assert (found.whole, found.unfinished) == (True, True)
    assert "job/job.json" not in found.leftovers
    assert "items/part-00009.parquet" not in found.leftovers  # it waits for the job's end


def test_what_is_no_index_is_a_mistake_not_a_damage(index: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none"):
        with pytest.raises(IndexStoreError):
            verify(folder)
    content = json.loads((index / "manifest.json").read_text()) | {"schema_version": 99}
    (index / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(IndexStoreError, match="schema version 99"):
        verify(index)


def test_a_change_meanwhile_is_told(index: Path) -> None:
    def change(done: int, total: int) -> None:
        path = index / "manifest.json"
        path.write_text(path.read_text() + " ")

    with pytest.raises(IndexStoreError, match="was changed while it was verified"):
        verify(index, progress=change)


def test_an_index_of_version_1_is_verified(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DATA / "index-v1", tmp_path / "old"))
    assert verify(folder).whole
    for name in files(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-3])
        assert named(verify(folder))[0] == name
        (folder / name).write_bytes(content)


def test_the_command(index: Path, headwater: Command, tmp_path: Path) -> None:
    code, out, _ = headwater("verify", index)
    assert code == 0
    assert f"{index} is whole" in out
    assert f"{len(files(index))} files" in out
    assert "20 rows checked" in out
    assert f"ledger: 4 lines, last hash {verify(index).ledger_head}" in out
    (index / "notes").write_text("x")
    (index / "job").mkdir()
    (index / "job" / "job.json").write_text('{"first_part": 3}')
    (index / "thumbs" / "part-00001.parquet").write_bytes(b"")
    (index / "items" / "part-00002.parquet").unlink()
    code, out, _ = headwater("verify", index, "--quiet")
    assert code == 1
    assert "damaged: thumbs/part-00001.parquet: its sha256" in out
    assert "damaged: items/part-00002.parquet: it is missing" in out
    assert "is damaged, first in thumbs/part-00001.parquet" in out
    assert "left over, part of nothing: notes" in out
    assert "an ingest runs or was cut short" in out
    code, out, _ = headwater("verify", index, "--json", "--quiet")
    assert code == 1
    told = json.loads(out)
    assert told["whole"] is False
    assert [d["file"] for d in told["damaged"]] == [
        "thumbs/part-00001.parquet", "items/part-00002.parquet",
    ]  # fmt: skip
    code, _, err = headwater("verify", tmp_path)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_what_duckdb_cannot_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is known that Arrow reads and DuckDB does not, so here DuckDB itself fails."""

    def fail(*_: Any, **__: Any) -> None:
        raise duckdb.IOException("IO Error: it\ncannot")

    folder = write_index(tmp_path / "i")
    monkeypatch.setattr(sys.modules["headwater.index.agreement"], "connect_items", fail)
    (damage,) = verify(folder).damaged
    assert damage.file == "items"
    assert damage.problem == "item ids cannot be compared: IO Error: it cannot"
