"""Signatures: whatever would give other rows is named; what would not is no difference."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png

from headwater.ingest import ColumnNames, Signature, difference, open_source, signature


def image_folder(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a", "b", "sub/c")):
        (folder / f"{name}.png").write_bytes(png(number))
        (folder / f"{name}.txt").write_text(f"picture {number}")
    return folder


def parquet_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for part in range(2):
        table = {
            "image": [png(10 * part + i) for i in range(4)],
            "caption": [f"picture {i}" for i in range(4)],
            "alt": ["x", "y", None, "z"],
            "n": [None, 1.5, 2.0, float(part)],
        }
        pq.write_table(pa.table(table), folder / f"{part}.parquet")
    return folder


def paths_in_parquet(folder: Path) -> Path:
    for part in ("x", "y"):
        (folder / part).mkdir(parents=True)
        (folder / part / "1.png").write_bytes(png(ord(part)))
        table = {"path": ["1.png", "gone.png", None], "caption": ["a", "b", "c"]}
        pq.write_table(pa.table(table), folder / part / "t.parquet")
    return folder


def signed(path: Path, known: Signature | None = None, **options: Any) -> Signature:
    found = open_source(path, **options).signature(known)
    text = json.dumps(found)
    assert str(path) not in text
    loaded: Signature = json.loads(text)
    return loaded


def edit(path: Path, *, keep_time: bool = False) -> None:
    """Change one byte in the middle of a file."""
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    moved = 0 if keep_time else 10**9
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + moved))


@pytest.mark.parametrize("corpus", [image_folder, parquet_folder, paths_in_parquet])
def test_the_same_corpus_elsewhere_and_later_is_the_same(
    tmp_path: Path, corpus: Callable[[Path], Path]
) -> None:
    here = signed(corpus(tmp_path / "here"))
    assert difference(here, signed(tmp_path / "here", here)) is None
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)
    for path in (tmp_path / "there").rglob("*.*"):
        os.utime(path, ns=(0, 12345))
    there = signed(tmp_path / "there", here)
    assert there != here  # the times
    assert difference(here, there) is None


@pytest.mark.parametrize(
    ("corpus", "changed", "said"),
    [
        (image_folder, "sub/c.png", "sub/c.png has other content of the same size"),
        (image_folder, "sub/c.txt", "captions or other columns of the selected records"),
        (parquet_folder, "1.parquet", "1.parquet has other content of the same size"),
        (paths_in_parquet, "y/1.png", "y/1.png has other content of the same size"),
    ],
)
def test_an_edit_of_the_same_size_is_found(
    tmp_path: Path, corpus: Callable[[Path], Path], changed: str, said: str
) -> None:
    before = signed(corpus(tmp_path / "c"))
    path = tmp_path / "c" / changed
    if path.suffix == ".parquet":  # within the images: what the footer says stays as it was
        place = path.read_bytes().index(b"IDAT") + 20
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
    else:
        edit(path)
    found = difference(before, signed(tmp_path / "c", before))
    assert found is not None
    assert said in found
    assert "\n" not in found


def test_files_of_the_same_time_and_size_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signed(image_folder(tmp_path / "c"))
    edit(tmp_path / "c" / "a.png")
    read: list[str] = []
    honest = Path.open

    def watched(path: Path, *args: Any, **options: Any) -> Any:
        if path.suffix == ".png":
            read.append(path.name)
        return honest(path, *args, **options)

    monkeypatch.setattr(Path, "open", watched)
    found = difference(before, signed(tmp_path / "c", before))
    assert found == "a.png has other content of the same size"
    assert read == ["a.png"]


def test_only_files_of_selected_records_count(tmp_path: Path) -> None:
    before = signed(parquet_folder(tmp_path / "c"), limit=3)
    assert list(before["files"]) == ["0.parquet"]
    edit(tmp_path / "c" / "0.parquet", keep_time=True)
    again = signed(tmp_path / "c", limit=3)  # without the earlier one every file is read
    assert difference(before, again) == "0.parquet has other content of the same size"


def test_every_other_change_has_its_words(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "c")
    before = signed(folder)

    def said(**options: Any) -> str:
        found = difference(before, signed(folder, before, **options))
        assert found is not None
        return found

    assert said(limit=2) == "sub/c.png no longer used by the selection"
    assert said(columns=ColumnNames(caption="file_name")) == (
        "other columns are used: 'file_name' as caption, not 'caption'"
    )
    (folder / "b.png").write_bytes(png(1) + b"more")
    assert "b.png has " in said()
    (folder / "b.png").write_bytes(png(1))
    (folder / "d.png").write_bytes(png(7))
    assert said() == "d.png not used before"
    (folder / "e.png").write_bytes(png(7))
    assert said() == "2 files (d.png, ...) not used before"

    table = parquet_folder(tmp_path / "p")
    before = signed(table, where="n > 1")
    folder = table
    assert said(where="n = 1.5 OR n = 1 OR n = 2") == "5 records are selected, not 4"
    before = signed(table, where="n = 1.5")
    assert said(where="n = 2") == "other records are selected, 2 as before"
    pq.write_table(
        pq.read_table(table / "0.parquet").append_column("z", pa.array([1] * 4)),
        table / "0.parquet",
    )
    assert "0.parquet has " in said(where="n = 1.5")


def test_a_missing_image_that_comes_back_is_a_difference(tmp_path: Path) -> None:
    folder = paths_in_parquet(tmp_path / "c")
    before = signed(folder)
    assert before["files"]["x/gone.png"] is None
    (folder / "x" / "gone.png").write_bytes(png(3))
    after = signed(folder, before)
    assert difference(before, after) == "x/gone.png was missing and is there now"
    assert difference(after, before) == "x/gone.png is missing"


def test_the_hash_of_records_does_not_depend_on_their_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row groups and chunks differ between writers; values beneath a null are anything."""
    table = pa.table({"image": ["a"] * 10, "caption": ["b", None] * 5, "n": [1, None] * 5})
    found = []
    for group in (1, 3, 10):
        pq.write_table(table, tmp_path / "c.parquet", row_group_size=group)
        found.append(signed(tmp_path / "c.parquet")["records"])
    assert len(set(found)) == 1
    monkeypatch.setattr(signature, "_ROWS_AT_ONCE", 10)
    pq.write_table(table.set_column(1, "caption", pa.array(["b"] * 10)), tmp_path / "c.parquet")
    assert signed(tmp_path / "c.parquet")["records"] != found[0]
