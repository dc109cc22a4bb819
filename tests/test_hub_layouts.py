"""Folders as Hugging Face's `datasets` and its hub have them, read without `datasets`.

The files are written here as save_to_disk and the cache write them: Arrow streams of small record
batches, and the JSON beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png

from headwater.ingest import SourceError, hub_layout, open_source


def table(first: int, count: int) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table(
        {
            "image": [{"bytes": png(n), "path": f"{n}.png"} for n in numbers],
            "text": [f"picture {n}" for n in numbers],
            "n": pa.array(numbers, pa.int64()),
        }
    )


def write_stream(path: Path, content: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(path, content.schema) as writer:
        writer.write_table(content, max_chunksize=3)
    return path


def save_to_disk(folder: Path, parts: list[pa.Table], **state: Any) -> None:
    names = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_stream(folder / name, part)
    folder.mkdir(exist_ok=True)
    said = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "5b2c",
            "_format_columns": None, "_format_type": None, "_split": "train"} | state  # fmt: skip
    (folder / "state.json").write_text(json.dumps(said))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_a_saved_data_set(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "d", [table(0, 8), table(8, 3)])
    write_stream(tmp_path / "d" / "cache-1234.arrow", table(0, 1))
    source = open_source(tmp_path / "d")
    items = list(source)
    assert [item.data for item in items] == [png(n) for n in range(11)]
    assert [item.caption for item in items] == [f"picture {n}" for n in range(11)]
    assert items[9].uri == "data-00001-of-00002.arrow#1"
    assert items[9].extra == {"n": 9}
    assert list(open_source(tmp_path / "d").part(6, 10)) == items[6:10]
    assert [i.data for i in open_source(tmp_path / "d", where="n IN (2, 10)")] == [png(2), png(10)]
    assert list(source.signature()["files"]) == [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]


def test_a_saved_dictionary_of_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_to_disk(tmp_path / "held_out", [table(5, 2)])
    save_to_disk(tmp_path / "train", [table(0, 5)])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "held_out"]}))
    found = list(open_source(tmp_path))
    assert [item.extra["split"] for item in found] == ["train"] * 5 + ["held_out"] * 2
    assert "splits train, held_out" in caplog.text
    caplog.clear()
    assert [i.data for i in open_source(tmp_path, where="split = 'held_out'")] == [png(5), png(6)]
    assert not caplog.text
    assert [i.data for i in open_source(tmp_path / "train")] == [png(n) for n in range(5)]


def test_the_cache_and_single_files(tmp_path: Path) -> None:
    write_stream(tmp_path / "beans-train-00000-of-00002.arrow", table(0, 2))
    write_stream(tmp_path / "beans-train-00001-of-00002.arrow", table(2, 2))
    write_stream(tmp_path / "beans-test.arrow", table(4, 1))
    write_stream(tmp_path / "cache-77.arrow", table(0, 4))
    (tmp_path / "dataset_info.json").write_text("{}")
    items = list(open_source(tmp_path))
    assert {i.caption: i.extra["split"] for i in items} == {
        "picture 0": "train", "picture 1": "train", "picture 2": "train", "picture 3": "train",
        "picture 4": "test",
    }  # fmt: skip
    assert [i.data for i in open_source(tmp_path / "beans-test.arrow")] == [png(4)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00001.parquet", "train"),
        ("data/held_out-00000-of-00001-0c5b1b2c3d.parquet", "held_out"),
        ("default/validation/0000.parquet", "validation"),
        ("test/x/data-00000-of-00003.arrow", "x"),
        ("beans-test.arrow", "test"),
        ("train.parquet", "train"),
        ("data/cats.parquet", None),
        ("00000.parquet", None),
        ("data-00000-of-00001.arrow", None),
        ("data/data-00000-of-00009.parquet", None),
    ],
)
def test_splits_from_names(name: str, split: str | None) -> None:
    assert hub_layout.split_of(name) == split


def test_parquet_of_a_repository(tmp_path: Path) -> None:
    for name, first in (("train-00000-of-00002", 0), ("train-00001-of-00002", 2),
                        ("test-00000-of-00001", 4)):  # fmt: skip
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table(first, 2), tmp_path / "data" / f"{name}.parquet")
    found = [(i.caption, i.data) for i in open_source(tmp_path, where="split = 'train'")]
    assert found == [(f"picture {n}", png(n)) for n in range(4)]
    plain = table(9, 1).append_column("split", pa.array(["mine"]))
    pq.write_table(plain, tmp_path / "data" / "test-00000-of-00001.parquet")
    splits = [item.extra["split"] for item in open_source(tmp_path)]
    assert splits == ["mine", None, None, None, None]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "chosen", [table(0, 3)], _indices_data_files=[{"filename": "i.arrow"}])
    save_to_disk(tmp_path / "cut", [table(0, 9)])
    path = tmp_path / "cut" / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes()[:900])
    save_to_disk(tmp_path / "gone", [table(0, 1)])
    (tmp_path / "gone" / "data-00000-of-00001.arrow").unlink()
    save_to_disk(tmp_path / "none", [])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text("{")
    for name, message in (
        ("chosen", r"flatten_indices\(\)"),
        ("cut", r"data-00000-of-00001\.arrow cannot be read as an Arrow stream"),
        ("gone", r"data-00000-of-00001\.arrow cannot be read as an Arrow stream"),
        ("none", "names no Arrow file"),
        ("broken", r"state\.json cannot be read as JSON"),
    ):
        with pytest.raises(SourceError, match=message) as caught:
            open_source(tmp_path / name)
        assert "\n" not in str(caught.value)
