"""`headwater verify`: whatever is damaged is found and named; what is whole is called whole."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from forged_index import files, items, named, thumbs, write_index

import headwater as hw
from headwater.index import IndexStoreError, IndexWriter, StoredIndex, ledger, verify
from headwater.index.manifest import NewerSchemaError

DATA = Path(__file__).parent / "data"
LINES = 4  # of the ledger


@pytest.fixture
def index(committed: Path, tmp_path: Path) -> Path:
    """A copy that can be damaged."""
    return Path(shutil.copytree(committed, tmp_path / "idx"))


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
