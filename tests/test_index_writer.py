"""One writer at a time, and a crash at any of its steps leaves the state before or after."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_index_store import (
    DIM,
    make_items,
    make_rows,
    make_thumbs,
    new_writer,
    tree_bytes,
    write_index,
)

from headwater.index import (
    IndexStoreError,
    IndexWriter,
    StoredIndex,
    encode_items,
    files,
    ledger,
    scores,
    search,
    verify,
    write_part,
)

VERSION_1 = Path(__file__).parent / "data" / "index-v1"


class Crash(BaseException):
    """The process ends here; no `except Exception` of ours sees it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End at the step-th boundary: a file whole under its temporary name, and under its own."""
    honest, taken = os.replace, 0

    def boundary() -> None:
        nonlocal taken
        taken += 1
        if taken == step:
            for name in ("unlink", "rmdir"):  # a killed process does not clean up
                monkeypatch.setattr(Path, name, lambda *_, **__: None)
            raise Crash

    def replace(source: Any, target: Any) -> None:
        boundary()
        honest(source, target)
        boundary()

    monkeypatch.setattr(files.os, "replace", replace)


def without_ledger(folder: Path) -> dict[str, bytes]:
    return {k: v for k, v in tree_bytes(folder).items() if k != "ledger.jsonl"}


def events(folder: Path) -> list[str]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [json.loads(line)["event"] for line in lines]


def test_deleted_rows_are_in_no_answer(tmp_path: Path) -> None:
    index, _ = write_index(tmp_path / "idx")
    query = make_rows(1, seed=7, scale=1.0)
    before = dict(zip(index.ok_positions.tolist(), scores(index, query[0]).tolist(), strict=True))
    with IndexWriter.open(tmp_path / "idx") as writer:
        writer.write_tombstones(np.array([1, 3, 4]))
        writer.finish(event="delete")
    index = StoredIndex.open(tmp_path / "idx")
    assert (index.manifest.rows, index.manifest.deleted) == (8, 3)
    assert index.deleted_positions.tolist() == [1, 3, 4]
    assert index.live_positions.tolist() == [0, 2, 5, 6, 7]
    assert index.ok_positions.tolist() == [0, 2, 5, 7]
    assert index.searchable([3, 5, 6]).tolist() == [5]
    after = dict(zip(index.ok_positions.tolist(), scores(index, query[0]).tolist(), strict=True))
    assert after == {p: before[p] for p in (0, 2, 5, 7)}
    assert set(search(index, query, 4)[1][0].tolist()) == {0, 2, 5, 7}
    assert [p.tolist() for p, _ in index.blocks(8)] == [[0, 2], [5, 7]]
    assert index.thumbnails(["id2", "id3", "id4"]) == {"id2": b"webp id2"}
    assert events(tmp_path / "idx") == ["ingest", "delete"]


def test_a_preview_is_that_of_the_living_row(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    write_index(folder)
    thumbs = make_thumbs(["id2"]).set_column(1, "image", [[b"newer"]])
    with IndexWriter.open(folder) as writer:
        encoded = encode_items("new", make_items(["id2"]), make_rows(1, seed=3), DIM)
        writer.add_parts([write_part(folder, "part-00002", encoded, thumbs)], 3)
        writer.write_tombstones(np.array([2]))
        writer.finish()
    found = StoredIndex.open(folder).thumbnails(["id2", "id3"])
    assert found == {"id2": b"newer", "id3": b"webp id3"}


@pytest.mark.parametrize("wrong", [[3, 1], [1, 1], [1, 8], [1]])
def test_wrong_tombstones_are_found(tmp_path: Path, wrong: list[int]) -> None:
    write_index(tmp_path / "idx")
    with IndexWriter.open(tmp_path / "idx") as writer:
        writer.write_tombstones(np.array([1, 3]))
        writer.finish()
    np.save(tmp_path / "idx/tombstones/00002.npy", np.array(wrong))
    with pytest.raises(IndexStoreError, match="does not hold 2 ascending positions"):
        _ = StoredIndex.open(tmp_path / "idx").ok_positions


def test_generations_replace_each_other(tmp_path: Path) -> None:
    write_index(tmp_path / "idx")
    with IndexWriter.open(tmp_path / "idx") as writer:
        writer.write_tombstones(np.array([1]))
        writer.write_curvature({"gram": np.eye(2)})
        writer.finish()
    with IndexWriter.open(tmp_path / "idx") as writer:
        writer.write_tombstones(np.array([1, 2]))
        writer.finish()
    names = [n for n in tree_bytes(tmp_path / "idx") if n.startswith(("curv", "tomb"))]
    assert names == ["curvature/00002/gram.npy", "tombstones/00003.npy"]
    assert list(StoredIndex.open(tmp_path / "idx").curvature()) == ["gram"]


def test_parts_are_appended_and_replaced_in_place(tmp_path: Path) -> None:
    index, rows = write_index(tmp_path / "idx")
    with IndexWriter.open(tmp_path / "idx") as writer:
        with pytest.raises(IndexStoreError, match="'id3' occurs twice"):
            writer.add_shard(make_items(["id3"]), make_rows(1), make_thumbs([]))
        writer.add_shard(make_items(["new"]), make_rows(1, seed=9), make_thumbs(["new"]))
        writer.finish()
    old = index.manifest.shards
    with IndexWriter.open(tmp_path / "idx") as writer:
        appended = writer.manifest.shards[2]
        assert (appended.name, writer.manifest.next_part) == ("part-00002", 3)
        writer.replace_parts({old[1].name: None}, 5)
        writer.finish(event="compact")
    index = StoredIndex.open(tmp_path / "idx")
    assert index.manifest.shards == (old[0], appended)
    assert (index.manifest.rows, index.manifest.next_part) == (6, 5)
    (first, found), (last, _) = index.blocks(8, weighted=False)
    assert (first.tolist(), last.tolist()) == ([0, 2, 3, 4], [5])
    np.testing.assert_array_equal(found, rows[[0, 2, 3, 4]])
    assert not (tmp_path / "idx/features/part-00001.npy").exists()


def test_a_path_that_is_no_utf8_is_noted_spelled_out(tmp_path: Path) -> None:
    source = os.fsdecode(b"corpus\xff/caf\xc3\xa9")
    with new_writer(tmp_path / "idx") as writer:
        writer.add_shard(make_items(["a"]), make_rows(1), make_thumbs(["a"]))
        writer.finish({"source": source, source: [1.5, None]})
    StoredIndex.open(tmp_path / "idx").append_ledger("query", {"prompt": source})
    spelled = "corpus\\udcff/café"
    first, second = (line["details"] for line in ledger.entries(tmp_path / "idx"))
    assert (first["source"], first[spelled], second["prompt"]) == (spelled, [1.5, None], spelled)
    assert not verify(tmp_path / "idx").damaged
    assert not (tmp_path / "idx" / "commit.json").exists()


def test_a_version_1_index_opens_and_is_rewritten_by_its_first_writer(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    shutil.copytree(VERSION_1, folder)
    before = tree_bytes(folder)
    index = StoredIndex.open(folder)
    assert index.manifest.rows == 8
    assert index.ok_positions.tolist() == [0, 2, 3, 4, 5, 7]
    assert set(index.curvature()) == {"eigenvalues", "eigenvectors", "rows"}
    assert len(list(index.blocks(8))) == 2
    assert tree_bytes(folder) == before
    with IndexWriter.open(folder) as writer:
        writer.add_shard(make_items(["new"]), make_rows(1), make_thumbs([]))
        writer.finish()
    stored = json.loads((folder / "manifest.json").read_text())
    assert stored["schema_version"] == 2
    assert "complete" not in stored
    changed = StoredIndex.open(folder)
    assert changed.manifest.rows == 9
    assert changed.curvature()["eigenvectors"].shape[0] == DIM
    content = json.loads((VERSION_1 / "manifest.json").read_text()) | {"complete": False}
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(IndexStoreError, match="did not finish; delete the folder"):
        StoredIndex.open(folder)


def test_a_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    write_index(folder)
    program = (
        "import sys; from headwater.index import IndexWriter\n"
        f"writer = IndexWriter.open({str(folder)!r}); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(IndexStoreError, match=rf"being written by process {other.pid} on .*; wait"):
        IndexWriter.open(folder)
    assert StoredIndex.open(folder).manifest.rows == 8  # readers need no lock
    other.kill()
    other.communicate(timeout=60)
    with (
        IndexWriter.open(folder),  # the dead hold nothing
        pytest.raises(IndexStoreError, match=f"process {os.getpid()} "),
    ):
        IndexWriter.open(folder)
    assert (folder / "lock").read_bytes() == b""


def test_a_new_index_that_was_not_begun_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("idx", "mine"):
        with new_writer(tmp_path / name), pytest.raises(IndexStoreError, match="being written"):
            new_writer(tmp_path / name)
    assert not (tmp_path / "idx").exists()
    assert list((tmp_path / "mine").iterdir()) == []


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    """Whatever its folders are called."""
    for name in ("job/notes.txt", "job/job.json", "features/part-00000.npy", "curvature/x.npy"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text('{"precious": 1}')
        with pytest.raises(IndexStoreError, match="is no index"):
            new_writer(folder)
        assert tree_bytes(folder) == {name: b'{"precious": 1}'}


def test_a_discarded_job_is_over_at_once(tmp_path: Path) -> None:
    """And a crash while it is removed leaves that to the next writer."""
    for step in range(1, 4):
        folder = tmp_path / f"idx-{step}"
        (folder / "job/part-00000").mkdir(parents=True)
        (folder / "features").mkdir()
        for name in ("job/part-00000/0-4.arrow", "job/part-00001.json", "features/part-00000.npy"):
            (folder / name).write_text("x")
        (folder / "job/job.json").write_text('{"first_part": 0}')
        with pytest.MonkeyPatch.context() as patch, suppress(Crash):
            writer = new_writer(folder)
            assert (folder / "features/part-00000.npy").exists()
            crash_at(patch, step)
            writer.discard_job()
        writer.close()
        writer = new_writer(folder)
        assert (folder / "job").exists() == (step == 1)  # not yet said
        writer.discard_job()
        assert set(tree_bytes(folder)) == {"lock"}
        writer.close()


def test_parts_of_an_unfinished_job_are_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    write_index(folder)
    files.write_atomically(folder / "job/job.json", lambda file: file.write(b'{"first_part": 2}'))
    waiting = folder / "items" / "part-00002.parquet"
    waiting.write_bytes(b"computed")
    given = (make_items(["z"]), make_rows(1), make_thumbs(["z"]))
    with IndexWriter.open(folder) as writer:
        with pytest.raises(IndexStoreError, match="is unfinished, and its parts would be"):
            writer.add_shard(*given)
        assert waiting.read_bytes() == b"computed"
        writer.discard_job()
        writer.add_shard(*given)
        writer.finish()
    assert not verify(folder).damaged


def test_the_name_of_a_new_folder_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    files.write_atomically(tmp_path / "a" / "b" / "c.bin", lambda file: file.write(b"1"))
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]


def test_a_reader_of_removed_files_is_told_why(tmp_path: Path) -> None:
    index, _ = write_index(tmp_path / "idx")
    with IndexWriter.open(tmp_path / "idx") as writer:
        writer.replace_parts({"part-00001": None}, 2)
        writer.finish()
    with pytest.raises(IndexStoreError, match="was changed meanwhile; ask again"):
        list(index.blocks(8))


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(tmp_path / "idx")
    honest = os.open

    def refuse(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(30, "Read-only file system", str(path))
        return honest(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(IndexStoreError, match=r"idx cannot be written to \(Read-only file system"):
        IndexWriter.open(tmp_path / "idx")


def change(folder: Path) -> None:
    """Everything a commit can hold at once."""
    with IndexWriter.open(folder) as writer:
        writer.add_shard(make_items(["new"]), make_rows(1, seed=5), make_thumbs(["new"]))
        writer.write_tombstones(np.array([0, 2]))
        writer.write_curvature({"gram": np.full((2, 2), 7.0)})
        writer.write_duplicates()
        writer.finish({"why": "a test"}, event="change")


def test_a_crash_at_any_step_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    write_index(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    change(tmp_path / "new")
    old, new = without_ledger(tmp_path / "old"), without_ledger(tmp_path / "new")
    outcomes = []
    for step in range(1, 100):
        folder = tmp_path / f"step-{step}"
        shutil.copytree(tmp_path / "old", folder)
        with pytest.MonkeyPatch.context() as patch:
            crash_at(patch, step)
            try:
                change(folder)
                break
            except Crash:
                pass
        manifest = (folder / "manifest.json").read_bytes()
        assert manifest in (old["manifest.json"], new["manifest.json"])
        committed = manifest == new["manifest.json"]
        outcomes.append(committed)
        index = StoredIndex.open(folder)
        assert list(index.blocks(8))  # whole, whatever lies beside
        assert index.ok_positions.tolist() == ([3, 4, 5, 7, 8] if committed else [0, 2, 3, 4, 5, 7])
        IndexWriter.open(folder).close()
        assert without_ledger(folder) == (new if committed else old)
        assert events(folder) == ["ingest", "change"][: 1 + committed]
        if not committed:
            change(folder)
            assert without_ledger(folder) == new
            assert events(folder) == ["ingest", "change"]
        shutil.rmtree(folder)
    assert outcomes == sorted(outcomes)
    assert len(outcomes) == 14  # 7 files, each before and after it has its name
    assert sum(outcomes) == 1  # the manifest is the last of them
    assert step == 15
