"""Sources: every layout people have, one item per record, nothing vanishing in silence."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest
from PIL import Image

from headwater.attribution import Model, Recipe, decode
from headwater.index import StoredIndex
from headwater.ingest import (
    ColumnNames,
    SourceError,
    SourceItem,
    build_index,
    open_source,
)
from headwater.ingest.sources import _Ids

ROOT = Path(__file__).parents[1]


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, rows: int = 5, first: int = 0, **columns: Any) -> Path:
    table: dict[str, Any] = {
        "image": [png(first + i) for i in range(rows)],
        "text": [f"picture {first + i}" for i in range(rows)],
        **columns,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: v for k, v in table.items() if v is not None}), path)
    return path


def ids(source: Iterable[SourceItem]) -> list[str]:
    return [item.item_id for item in source]


# Parquet ------------------------------------------------------------------------------------------


def test_parquet_with_everything(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "c.parquet",
        2,
        Key=[7, 8],
        license=["MIT", None],
        artist=["Ann", "Bo"],
        URL=["http://a", "http://b"],
        style=["flat", "round"],
        width=[640, 480],
    )
    source = open_source(path)
    assert source.label == str(path)
    assert source.columns == ("image", "text", "Key", "license", "artist", "URL", "style", "width")
    assert len(source) == 2
    first, second = source
    assert (first.item_id, first.uri, first.caption) == ("7", "c.parquet#0", "picture 0")
    assert (first.data, first.error) == (png(0), None)
    assert (first.licence, first.rights_holder, first.source) == ("MIT", "Ann", "http://a")
    assert first.extra == {"style": "flat", "original_width": 640}
    assert second.licence is None
    schema = source.extra_schema
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "style": pa.string(),
        "original_width": pa.int64(),
    }
    assert list(source) == [first, second]  # a source can be read again


def test_ids_without_a_column_are_those_of_the_content(tmp_path: Path) -> None:
    table: dict[str, list[Any]] = {
        "image": [png(1), png(2), png(1), png(1)],
        "caption": ["a", "a", "a", "b"],
    }
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    key = hashlib.sha256(png(1) + b"a").hexdigest()[:16]
    found = ids(open_source(tmp_path / "c.parquet"))
    assert found[0] == key
    assert found[2] == f"{key}~2"
    assert len(set(found)) == 4
    reordered = {name: values[1:] + values[:1] for name, values in table.items()}
    pq.write_table(pa.table(reordered), tmp_path / "c.parquet")
    assert set(ids(open_source(tmp_path / "c.parquet"))) == set(found)


def test_repeated_ids_land_in_quarantine_and_stay_distinct(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", 6, id=["a", "a", "a~2", "a", None, ""])
    items = list(open_source(tmp_path / "c.parquet"))
    assert [item.item_id for item in items[:4]] == ["a", "a~3", "a~2", "a~4"]
    assert len({item.item_id for item in items}) == 6
    assert [item.error for item in items] == [
        None,
        "duplicate item id 'a'",
        None,
        "duplicate item id 'a'",
        "no item id in column 'id'",
        "no item id in column 'id'",
    ]
    assert items[1].data is None


def test_image_cells_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.png").write_bytes(png(1))
    (tmp_path / "up.png").write_bytes(png(9))
    paths = ["1.png", "../up.png", str(tmp_path / "up.png"), "absent.png", "", None, "../d", "a\0"]
    paths.append("x" * 5000)
    captions = [f"{i}" for i in range(len(paths))]
    pq.write_table(pa.table({"path": paths, "caption": captions}), tmp_path / "d" / "c.parquet")
    items = list(open_source(tmp_path / "d" / "c.parquet"))
    assert [item.data for item in items[:3]] == [png(1), png(9), png(9)]
    assert items[0].uri == "1.png"
    assert items[3].error == "no such image file: absent.png"
    assert [item.error for item in items[4:6]] == ["no image in this record"] * 2
    assert all(item.error and item.data is None for item in items[3:])

    structs = [{"bytes": png(3), "path": "3.png"}, {"bytes": None, "path": "1.png"}, None]
    pq.write_table(
        pa.table({"image": structs, "caption": ["a", "b", "c"]}), tmp_path / "d" / "h.parquet"
    )
    items = list(open_source(tmp_path / "d" / "h.parquet"))
    assert [item.data for item in items] == [png(3), png(1), None]
    assert items[2].error == "no image in this record"


def test_any_part_holds_what_the_whole_does(tmp_path: Path) -> None:
    """A worker that reads one range gives its items the ids and keys that everybody gives them."""
    table = {
        "image": [png(i % 5) for i in range(40)],
        "caption": [f"{i % 3}" for i in range(40)],
        "id": [None if i % 7 == 3 else f"a{i % 30}" for i in range(40)],
        "n": range(40),
    }
    pq.write_table(pa.table(table), tmp_path / "given.parquet", row_group_size=6)
    del table["id"]
    pq.write_table(pa.table(table), tmp_path / "content.parquet", row_group_size=6)
    for name in ("given.parquet", "content.parquet"):
        source = open_source(tmp_path / name, where="n <> 11")
        whole = list(source.part(0, len(source)))
        for start, stop in ((0, 1), (5, 19), (17, 39), (38, 100), (20, 20)):
            assert (
                list(open_source(tmp_path / name, where="n <> 11").part(start, stop))
                == (whole[start:stop])
            )
        streamed = list(source)
        assert ids(streamed) == told_apart(ids(whole))
        assert [replace(item, item_id="") for item in streamed] == [
            replace(item, item_id="") for item in whole
        ]
    assert len(set(ids(whole))) == 15 < len(set(ids(streamed))) == 39
    assert all(item.key == item.item_id.split("~")[0] for item in streamed)


def test_a_part_reads_nothing_before_it(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", 0)
    table = pa.table({"image": [png(i) for i in range(60)], "text": ["x"] * 60})
    pq.write_table(table, path, row_group_size=20)
    group = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = bytearray(path.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 30] = b"\xff" * 30
    path.write_bytes(content)
    assert [item.data for item in open_source(path).part(20, 60)] == [png(i) for i in range(20, 60)]
    with pytest.raises(SourceError, match=r"c\.parquet cannot be read as Parquet"):
        list(open_source(path).part(19, 60))


def told_apart(names: list[str]) -> list[str]:
    """Repeated ids get "~2", "~3", ..., the first that no item has, before or after."""
    taken: list[str] = []
    for wanted in names:
        name, number = wanted, 2
        while name in taken or (name != wanted and name in names):
            name, number = f"{wanted}~{number}", number + 1
        taken.append(name)
    return taken


def test_repeated_ids_against_a_plain_loop() -> None:
    names = ["a", "a", "a~2", "a", "b", "a~2", "a~3", "b", "c"]
    claims = _Ids(frozenset(names))
    assert [claims.claim(wanted)[0] for wanted in names] == told_apart(names)
    assert len(set(told_apart(names))) == len(names)


def test_items_of_one_content_get_one_row(tmp_path: Path, model_folder: Path) -> None:
    """Noise is drawn by what a record is, not by the id that tells it from its copies."""
    images = [png(n) for n in (1, 2, 1, 1)]
    pq.write_table(pa.table({"image": images, "caption": ["a cat"] * 4}), tmp_path / "c.parquet")
    model = Model.from_pretrained(model_folder, device="cpu")
    build_index(tmp_path / "c.parquet", model, tmp_path / "i", recipe=Recipe(timesteps=2, dim=64))
    stored = StoredIndex.open(tmp_path / "i")
    key = hashlib.sha256(png(1) + b"a cat").hexdigest()[:16]
    found = stored.items()["item_id"].to_pylist()
    assert [found[0], *found[2:]] == [key, f"{key}~2", f"{key}~3"]
    (shard,) = stored.manifest.shards
    rows = np.asarray(stored.features(shard))
    assert (rows[[2, 3]] == rows[0]).all()
    assert (rows[1] != rows[0]).any()


def test_empty_captions_are_captions(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", 3, text=["", None, "a cat"])
    found = [(i.caption, i.error) for i in open_source(tmp_path / "c.parquet")]
    assert found == [("", None), ("", None), ("a cat", None)]


def test_reserved_and_binary_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_parquet(
        tmp_path / "c.parquet",
        1,
        SHA256=["x"],
        original_status=["kept"],
        status=["mine"],
        mask=[b"123"],
        views=pa.array([[{"bytes": b"1"}]]),
        source=["here"],
        url=["there"],
        tags=[["a", "b"]],
    )
    with caplog.at_level(logging.WARNING):
        (item,) = open_source(tmp_path / "c.parquet")
    assert "not kept: mask, views" in caplog.text
    assert item.source == "here"
    assert item.extra == {
        "original_SHA256": "x",
        "original_status": "kept",
        "original_original_status": "mine",
        "url": "there",
        "tags": ["a", "b"],
    }


def test_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "c.parquet", 1, Group=["a"], group=["b"])
    with pytest.raises(SourceError, match=r"'Group' and 'group' of .* differ only in case"):
        open_source(tmp_path / "c.parquet")


def test_column_flags_overrule_conventions(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "alt": ["x", "y"],
        "thumb": [png(50), png(51)],
        "nr": [1, 2],
        "owner": ["A", "B"],
    }
    path = write_parquet(tmp_path / "c.parquet", 2, **columns)
    names = ColumnNames(image="thumb", caption="alt", id="nr", rights_holder="owner")
    first, _ = open_source(path, columns=names)
    assert (first.data, first.caption, first.item_id) == (png(50), "x", "1")
    assert first.rights_holder == "A"
    assert first.extra == {"text": "picture 0"}


def test_where_and_limit_use_the_users_names(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", 250, nr=range(250), id=range(250))
    assert ids(open_source(path, where="nr % 100 = 7 AND text LIKE 'picture%'")) == [
        "7",
        "107",
        "207",
    ]
    chosen = open_source(path, where="nr BETWEEN 40 AND 60", limit=3)
    assert len(chosen) == 3
    assert [(i.item_id, i.data) for i in chosen] == [(str(n), png(n)) for n in (40, 41, 42)]
    with pytest.raises(SourceError, match=r"no record .* satisfies"):
        open_source(path, where="nr > 1000")
    with pytest.raises(SourceError, match=r'Referenced column "caption" .*columns: text, nr, id'):
        open_source(path, where="caption = 'x'")


@pytest.mark.parametrize("group", [1, 7, 1000])
def test_selected_rows_get_their_own_images(tmp_path: Path, group: int) -> None:
    """Streaming by row groups and batches must not shift images against captions."""
    n = 200
    table = pa.table(
        {"image": [png(i) for i in range(n)], "text": [str(i) for i in range(n)], "nr": range(n)}
    )
    pq.write_table(table, tmp_path / "c.parquet", row_group_size=group)
    for where in (None, "nr % 3 = 1", "nr IN (0, 31, 32, 63, 64, 199)", "nr > 150"):
        for item in open_source(tmp_path / "c.parquet", where=where):
            assert item.data == png(int(item.caption))
            assert item.uri == f"c.parquet#{item.caption}"


def test_folder_of_parquet_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "b.parquet", 3, first=10, style=["x"] * 3)
    write_parquet(tmp_path / "data" / "a.parquet", 2)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "junk.parquet").write_bytes(b"junk")
    source = open_source(tmp_path)
    items = list(source)
    assert [item.caption for item in items] == [f"picture {i}" for i in (0, 1, 10, 11, 12)]
    assert [item.data for item in items] == [png(i) for i in (0, 1, 10, 11, 12)]
    assert [item.uri for item in items[1:4]] == [
        "data/a.parquet#1",
        "data/b.parquet#0",
        "data/b.parquet#1",
    ]
    assert [item.extra["style"] for item in items] == [None, None, "x", "x", "x"]
    assert [i.caption for i in open_source(tmp_path, where="style = 'x'", limit=1)] == [
        "picture 10"
    ]


def test_images_alone_for_a_model_without_captions(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", 2, text=None)
    items = list(open_source(path, captions_required=False))
    assert [(i.caption, i.data, i.extra) for i in items] == [("", png(0), {}), ("", png(1), {})]


# Folders ------------------------------------------------------------------------------------------


def test_image_folder_with_text_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.PNG").write_bytes(png(2))
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.png").write_bytes(png(4))
    (tmp_path / "._a.png").write_bytes(b"junk")
    (tmp_path / "a.txt").write_text(" a grey square\n")
    (tmp_path / "sub" / "b.txt").write_bytes("\ufeffcafé".encode())
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    items = {item.item_id: item for item in open_source(tmp_path)}
    assert list(items) == ["a.png", "c.png", "d.png", "sub/b.PNG"]
    assert (items["a.png"].caption, items["a.png"].data) == ("a grey square", png(1))
    assert (items["c.png"].caption, items["c.png"].data) == ("", b"")
    assert items["d.png"].error == "caption file d.txt is not UTF-8"
    assert (items["sub/b.PNG"].caption, items["sub/b.PNG"].uri) == ("café", "sub/b.PNG")
    assert ids(open_source(tmp_path, where="caption = 'café'")) == ["sub/b.PNG"]
    assert ids(open_source(tmp_path, where="file_name LIKE '%.png'", limit=2)) == ["a.png", "c.png"]


def test_metadata_jsonl(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for i in range(3):
        (tmp_path / "x" / f"{i}.png").write_bytes(png(i))
    records = [
        {"file_name": "x/1.png", "text": "line\u2028break", "licence": "MIT", "n": 1},
        {"file_name": "x/0.png", "text": None, "n": 2.5},
        {"file_name": "x/9.png", "text": "gone"},
        {"file_name": "x/1.png", "text": "again"},
    ]
    lines = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "metadata.jsonl").write_text(lines + "\n", encoding="utf-8")
    items = list(open_source(tmp_path))
    assert [item.item_id for item in items] == ["x/1.png", "x/0.png", "x/9.png", "x/1.png~2"]
    assert [item.caption for item in items] == ["line\u2028break", "", "gone", "again"]
    assert [item.data for item in items] == [png(1), png(0), None, png(1)]
    assert items[2].error == "no such image file: x/9.png"
    assert (items[0].licence, items[0].extra) == ("MIT", {"n": 1.0})


def test_metadata_csv_keeps_ids_as_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train").mkdir()
    for i in range(3):
        (tmp_path / "train" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "train" / "metadata.csv").write_text(
        'file_name,id,text,score\n0.png,007,"two\nlines, quoted",0.5\n1.png,008,123,2\n'
    )
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path, where="score > 0.1")
    assert "1 images" in caplog.text
    first, second = source
    assert (first.item_id, first.caption, first.extra) == (
        "007",
        "two\nlines, quoted",
        {"original_score": 0.5},
    )
    assert (first.uri, first.data) == ("train/0.png", png(0))
    assert second.caption == "123"


def test_real_corpus() -> None:
    shared = Path(os.environ.get("HEADWATER_SHARED", ROOT.parent / "shared"))
    path = shared / "corpora" / "emoji" / "train.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here; set HEADWATER_SHARED to the folder of shared data")
    items = list(open_source(path, limit=300))
    assert len({item.item_id for item in items}) == 300
    for item in items:
        assert item.data is not None
        assert decode(item.data).size == (64, 64)
        assert item.caption
        assert item.licence
        assert item.rights_holder
        assert "original_sha256" in item.extra
