"""The store: what is written comes back, what is unfinished or damaged is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pytest

from headwater.index import (
    IndexStoreError,
    IndexWriter,
    StoredIndex,
    ledger,
    merged_schema,
    read_manifest,
    stored_size,
)
from headwater.index.files import write_atomically
from headwater.index.lock import WriteLock

DIM = 24
RECIPE = {"method": "dtrak", "timesteps": (1, 2)}


def make_items(ids: list[str], bad: tuple[int, ...] = (), **columns: Any) -> pa.Table:
    return pa.table(
        {
            "item_id": ids,
            "caption": [f"caption of {item_id}" for item_id in ids],
            "status": ["quarantined" if i in bad else "ok" for i in range(len(ids))],
            "error": pa.array(["empty file" if i in bad else None for i in range(len(ids))]),
            **columns,
        }
    )


def make_thumbs(ids: list[str]) -> pa.Table:
    return pa.table({"item_id": ids, "image": [b"webp " + item_id.encode() for item_id in ids]})


def make_rows(n: int, seed: int = 0, scale: float = 1e-6) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    lengths = scale * rng.lognormal(0, 2, (n, 1))
    return (rng.standard_normal((n, DIM)) * lengths).astype(np.float32)


def new_writer(folder: Path) -> IndexWriter:
    return IndexWriter.create(folder, feature_space_id="space", recipe=RECIPE, dim=DIM)


def write_index(folder: Path) -> tuple[StoredIndex, npt.NDArray[np.float32]]:
    """Two shards of 5 and 3 rows; rows 1 and 6 are quarantined; weights differ from 1."""
    writer = new_writer(folder)
    weights = np.linspace(0.5, 2, 8).astype(np.float32)
    pieces = []
    for first, last, bad in ((0, 5, (1,)), (5, 8, (1,))):
        ids = [f"id{i}" for i in range(first, last)]
        items = make_items(ids, bad, row_weight=pa.array(weights[first:last]))
        pieces.append(
            writer.add_shard(items, make_rows(last - first, seed=first), make_thumbs(ids[2:]))
        )
    writer.write_curvature({"gram": np.eye(DIM), "trace": np.array(3.5)})
    writer.finish()
    return StoredIndex.open(folder), np.concatenate(pieces)


def tree_bytes(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_rows_come_back_as_the_writer_returned_them(tmp_path: Path) -> None:
    index, returned = write_index(tmp_path / "idx")
    blocks = list(index.blocks(2, weighted=False))
    assert all(len(rows) <= 2 for _, rows in blocks)
    positions = np.concatenate([block for block, _ in blocks])
    assert positions.tolist() == [0, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in blocks]), returned[positions])
    assert not returned[[1, 6]].any()


def test_tiny_gradients_keep_their_direction_and_length(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "idx")
    rows = make_rows(50, scale=1e-12)
    ids = [str(i) for i in range(50)]
    back = writer.add_shard(make_items(ids), rows, make_thumbs([]))
    error = np.linalg.norm(back - rows, axis=1) / np.linalg.norm(rows, axis=1)
    assert error.max() < 1e-3
    writer.finish()
    norms = StoredIndex.open(tmp_path / "idx").items()["row_norm"].to_numpy()
    np.testing.assert_allclose(norms, np.linalg.norm(rows.astype(np.float64), axis=1), rtol=1e-6)


def test_weighted_rows_are_scaled_by_row_weight(tmp_path: Path) -> None:
    index, returned = write_index(tmp_path / "idx")
    weights = index.items()["row_weight"].to_numpy()
    for positions, rows in index.blocks(3, [7, 2, 2, 1]):
        np.testing.assert_allclose(
            rows, returned[positions] * weights[positions][:, None], rtol=1e-6
        )
    wanted = [p.tolist() for p, _ in index.blocks(3, [7, 2, 2, 1])]
    assert wanted == [[2], [7]]  # each once, ascending, without the quarantined row 1


def test_layout_and_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    index, _ = write_index(folder)
    files = tree_bytes(folder)
    assert sorted(files) == [
        "curvature/00001/gram.npy",
        "curvature/00001/trace.npy",
        "features/part-00000.npy",
        "features/part-00001.npy",
        "items/part-00000.parquet",
        "items/part-00001.parquet",
        "ledger.jsonl",
        "lock",
        "manifest.json",
        "thumbs/part-00000.parquet",
        "thumbs/part-00001.parquet",
    ]
    manifest = index.manifest
    assert (manifest.rows, manifest.quarantined, manifest.dim) == (8, 2, DIM)
    assert (manifest.generation, manifest.next_part, manifest.deleted) == (1, 2, 0)
    assert manifest.recipe == {"method": "dtrak", "timesteps": [1, 2]}
    listed = manifest.all_files()
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert listed == {
        k: v for k, v in digests.items() if k not in ("ledger.jsonl", "lock", "manifest.json")
    }
    assert read_manifest(folder) == manifest
    stored = index.features(manifest.shards[0])
    assert isinstance(stored.base, np.memmap)  # a plain view of the mapped file
    assert stored.dtype == np.float16
    assert not stored[1].any()


def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_index(tmp_path / "a")
    plain = make_items

    def as_from_pandas(*arguments: Any, **columns: Any) -> pa.Table:
        return plain(*arguments, **columns).replace_schema_metadata({"pandas": "{}"})

    monkeypatch.setitem(globals(), "make_items", as_from_pandas)
    write_index(tmp_path / "b")
    a, b = tree_bytes(tmp_path / "a"), tree_bytes(tmp_path / "b")
    del a["ledger.jsonl"], b["ledger.jsonl"]
    assert a == b


def test_curvature_and_thumbnails(tmp_path: Path) -> None:
    index, _ = write_index(tmp_path / "idx")
    curvature = index.curvature()
    np.testing.assert_array_equal(curvature["gram"], np.eye(DIM))
    assert float(curvature["trace"]) == 3.5
    assert index.thumbnails(["id7", "id2", "id0", "unknown"]) == {
        "id2": b"webp id2",
        "id7": b"webp id7",
    }


def test_shards_with_a_column_of_only_nulls_lie_end_to_end(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "idx")
    empty = make_items(["a"], licence=pa.array([None]))
    filled = make_items(["b"], licence=pa.array(["CC0-1.0"]))
    writer.add_shard(empty, make_rows(1), make_thumbs([]))
    writer.add_shard(filled, make_rows(1), make_thumbs([]))
    wrong = make_items(["c"], licence=pa.array([7]))
    with pytest.raises(IndexStoreError, match="part-00002: its items do not fit"):
        writer.add_shard(wrong, make_rows(1), make_thumbs([]))
    writer.finish()
    items = StoredIndex.open(tmp_path / "idx").items()
    assert items["licence"].to_pylist() == [None, "CC0-1.0"]


def types_in_turn() -> list[pa.DataType]:
    struct, texts = pa.struct([("a", pa.int64())]), pa.list_(pa.string())
    return [
        *(pa.null(), pa.bool_(), pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.uint64()),
        *(pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.binary(), pa.date32()),
        *(pa.timestamp("ms"), pa.timestamp("ns"), pa.decimal128(10, 2), pa.decimal128(22, 2)),
        *(pa.list_(pa.int32()), pa.list_(pa.int64()), pa.list_(pa.null()), texts, struct),
        *(pa.struct([("a", pa.int32()), ("b", texts)]), pa.struct([("a", pa.float64())])),
    ]


def extremes(kind: pa.DataType) -> pa.Array:
    """Values of a type that other types may not hold."""
    if pa.types.is_integer(kind):
        limits = np.iinfo(kind.to_pandas_dtype())
        return pa.array([limits.min, limits.max], kind)
    if pa.types.is_timestamp(kind):
        year = {"ms": 9000, "ns": 2000}[kind.unit]
        return pa.array([np.datetime64(f"{year}-01-01T00:00:00.001", kind.unit)] * 2, kind)
    if pa.types.is_decimal(kind):
        return pa.array([Decimal(10) ** (kind.precision - kind.scale - 1), None], kind)
    if pa.types.is_list(kind):
        return pa.array([extremes(kind.value_type).to_pylist(), []], kind)
    if pa.types.is_struct(kind):
        children = [extremes(field.type) for field in kind]
        return pa.StructArray.from_arrays(children, fields=list(kind))
    by_name: dict[str, list[Any]] = {
        "null": [None, None], "bool": [True, False], "float": [0.5, -1e38],
        "double": [0.1, 1e300], "date32[day]": [0, 20_000], "binary": [b"\xff", b""],
    }  # fmt: skip
    return pa.array(by_name.get(str(kind), ["x", "y"]), kind)


def test_columns_of_two_types_come_back_as_they_were_or_are_refused() -> None:
    taken = set()
    for kind, other in itertools.permutations(types_in_turn(), 2):
        first, second = (pa.table({"x": extremes(one)}) for one in (kind, other))
        try:
            merged_schema("new", first.schema, second.schema)
        except IndexStoreError as error:
            assert f"column 'x' holds {other} here and {kind} there" in str(error)  # noqa: PT017
            continue
        taken.add((str(kind), str(other)))
        # What a reader does.
        found = pa.concat_tables([first, second], promote_options="permissive")["x"].to_pylist()
        wanted = first["x"].to_pylist() + second["x"].to_pylist()
        for value, given in zip(found, wanted, strict=True):
            same = {k: value[k] for k in given} if isinstance(given, dict) else value
            assert same == given
    for pair in itertools.permutations(["int8", "int32", "int64"], 2):
        assert pair in taken
    for pair in (("uint8", "uint64"), ("float", "double"), ("string", "large_string")):
        assert {pair, pair[::-1]} <= taken
    assert ("null", "list<item: int64>") in taken
    assert ("list<item: int32>", "list<item: int64>") in taken
    assert {pair for pair in taken if "bool" in pair} == {("null", "bool"), ("bool", "null")}


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "all zero")],
)
def test_a_useless_row_that_is_not_quarantined_is_refused(
    tmp_path: Path, value: float, message: str
) -> None:
    writer = new_writer(tmp_path / "idx")
    rows = make_rows(2)
    rows[1] = value
    before = tree_bytes(tmp_path / "idx")
    with pytest.raises(IndexStoreError, match=f"'b' is {message}"):
        writer.add_shard(make_items(["a", "b"]), rows, make_thumbs([]))
    assert tree_bytes(tmp_path / "idx") == before
    items = make_items(["a", "b"], bad=(1,), row_weight=pa.array([2.0, np.nan]))
    returned = writer.add_shard(items, rows, make_thumbs([]))
    assert returned[0].any()
    assert not returned[1].any()
    writer.finish()
    stored = StoredIndex.open(tmp_path / "idx").items()
    assert stored["row_weight"].to_pylist() == [2.0, 1.0]
    assert stored["row_norm"][1].as_py() == 0


def test_lengths_beyond_single_precision_are_refused(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "idx")
    rows = np.full((1, DIM), 3e38, np.float32)
    with pytest.raises(IndexStoreError, match="too long"):
        writer.add_shard(make_items(["a"]), rows, make_thumbs([]))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (make_items(["a", "a"]), "'a' occurs twice"),
        (make_items(["a", "old"]), "'old' occurs twice"),
        (make_items(["a", "b"]).set_column(0, "item_id", pa.array(["a", None])), "is missing"),
        (make_items(["a", "b"]).set_column(0, "item_id", pa.array([1, 2])), "no text"),
        (make_items(["a"]), r"rows have shape \(2, 24\)"),
        (make_items(["a", "b"]).drop_columns(["error"]), "no column error"),
        (make_items(["a", "b"], row_weight=pa.array([1.0, np.nan])), "row_weight"),
        (make_items(["a", "b"]).set_column(2, "status", pa.array(["ok", "bad"])), "'bad'"),
        (make_items(["a", "b"]).set_column(3, "error", pa.array(["x", None])), "states its"),
        (make_items([]), "at least one"),
    ],
)
def test_wrong_items_are_refused(tmp_path: Path, items: pa.Table, message: str) -> None:
    writer = new_writer(tmp_path / "idx")
    writer.add_shard(make_items(["old"]), make_rows(1), make_thumbs([]))
    with pytest.raises(IndexStoreError, match=message):
        writer.add_shard(items, make_rows(2), make_thumbs([]))


def test_create_refuses_folders_in_use(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    new_writer(empty).finish()
    with pytest.raises(IndexStoreError, match="already holds an index"):
        new_writer(empty)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(IndexStoreError, match="is no index"):
        new_writer(other)
    assert tree_bytes(other) == {"thesis.txt": b"precious"}
    with pytest.raises(IndexStoreError, match="is a file"):
        new_writer(other / "thesis.txt")


def test_nothing_counts_before_the_commit(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "idx")
    writer.add_shard(make_items(["a"]), make_rows(1), make_thumbs([]))
    with pytest.raises(IndexStoreError, match="is no index"):
        StoredIndex.open(tmp_path / "idx")
    (tmp_path / "idx/job").mkdir()
    (tmp_path / "idx/job/job.json").write_text('{"first_part": 0}')
    with pytest.raises(IndexStoreError, match="is not finished; run it again"):
        StoredIndex.open(tmp_path / "idx")
    writer.finish()
    assert StoredIndex.open(tmp_path / "idx").manifest.rows == 1


def test_open_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(IndexStoreError, match="is not a folder"):
        StoredIndex.open(tmp_path / "absent")
    with pytest.raises(IndexStoreError, match=r"holds no manifest\.json"):
        StoredIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "version 99.*install a newer"),
        ({"rows": 7}, "rows = 7, its shards add up to 8"),
        ({"surprise": 1}, "no Headwater manifest"),
        ({"shards": [{"name": "../../x", "items": 8, "quarantined": 2, "files": {}}]}, "named"),
        (
            {"shards": [{"name": "part-00000", "items": 8, "quarantined": 2, "files": {"x": ""}}]},
            "other files than its own",
        ),
        ({"next_part": 1}, "part-00001 twice or beyond next_part"),
        ({"files": {"curvature/../../x.npy": ""}}, "no file of curvature/"),
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write_index(tmp_path / "idx")
    path = tmp_path / "idx" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(IndexStoreError, match=message):
        StoredIndex.open(tmp_path / "idx")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    index, _ = write_index(tmp_path / "idx")
    features = tmp_path / "idx/features/part-00001.npy"
    features.write_bytes(features.read_bytes()[:-10])
    with pytest.raises(IndexStoreError, match=r"features/part-00001\.npy cannot be read"):
        list(index.blocks(4))
    np.save(features, np.zeros((3, DIM + 1), np.float16))
    with pytest.raises(IndexStoreError, match="the manifest says float16"):
        list(index.blocks(4))
    (tmp_path / "idx/items/part-00000.parquet").unlink()
    with pytest.raises(IndexStoreError, match=r"items/part-00000\.parquet cannot be read"):
        StoredIndex.open(tmp_path / "idx").items()


def test_positions_outside_the_index_are_refused(tmp_path: Path) -> None:
    index, _ = write_index(tmp_path / "idx")
    for wrong in ([8], [-1, 3]):
        with pytest.raises(IndexStoreError, match="rows 0 to 7"):
            list(index.blocks(4, wrong))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "idx")
    with pytest.raises(ValueError, match="Object arrays"):
        writer.write_curvature({"gram": np.array([object()])})
    assert sorted(tree_bytes(tmp_path / "idx")) == ["lock"]
    with pytest.raises(IndexStoreError, match="letters"):
        writer.write_curvature({"../gram": np.eye(2)})


def test_each_ledger_line_hashes_the_one_before(tmp_path: Path) -> None:
    index, _ = write_index(tmp_path / "idx")
    index.append_ledger("query", {"prompt": "un café", "top": 3})
    path = tmp_path / "idx" / "ledger.jsonl"
    path.write_bytes(path.read_bytes() + b'{"cut sh')
    index.append_ledger("query", {"prompt": "b"})
    lines = path.read_bytes().splitlines()
    entries = [json.loads(line) for line in (lines[0], lines[1], lines[3])]
    assert [entry["event"] for entry in entries] == ["ingest", "query", "query"]
    assert entries[0]["previous"] == "0" * 64
    assert entries[1]["previous"] == hashlib.sha256(lines[0]).hexdigest()
    assert entries[2]["previous"] == hashlib.sha256(lines[2]).hexdigest()
    assert entries[1]["details"] == {"prompt": "un café", "top": 3}
    for entry in entries:
        stated = entry.pop("hash")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == stated


def test_how_an_ingest_was_run_stands_in_the_ledger_alone(tmp_path: Path) -> None:
    for name, details in (("a", {"devices": ["cuda:0"]}), ("b", None)):
        writer = new_writer(tmp_path / name)
        writer.add_shard(make_items(["x"]), make_rows(1), make_thumbs([]))
        writer.finish(details)
    entry = json.loads((tmp_path / "a" / "ledger.jsonl").read_text())
    assert entry["details"] == {
        "devices": ["cuda:0"], "feature_space_id": "space", "generation": 1, "rows": 1,
        "quarantined": 0,
        "manifest_sha256": hashlib.sha256((tmp_path / "a/manifest.json").read_bytes()).hexdigest(),
    }  # fmt: skip
    a, b = tree_bytes(tmp_path / "a"), tree_bytes(tmp_path / "b")
    assert a.pop("ledger.jsonl") != b.pop("ledger.jsonl")
    assert a == b


def test_stored_size_is_that_of_the_file(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "idx")
    thumbs = make_thumbs([f"id{i}" for i in range(50)])
    writer.add_shard(make_items(["x"]), make_rows(1), thumbs)
    assert stored_size(thumbs) == (tmp_path / "idx/thumbs/part-00000.parquet").stat().st_size


def test_a_ledger_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index, _ = write_index(tmp_path / "idx")
    (tmp_path / "idx" / "ledger.jsonl").unlink()
    (tmp_path / "idx" / "ledger.jsonl").mkdir()  # fails for every user, root included
    with caplog.at_level(logging.WARNING):
        index.append_ledger("query", {})
    assert "not noted in the ledger" in caplog.text


def test_nothing_is_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda length: "0" * 2 * length)
    temporary = f"table.{os.getpid()}-00000000.writing"
    outside = tmp_path / "outside"
    outside.write_text("of the user")
    folder = tmp_path / "idx"
    folder.mkdir()
    for name in ("ledger.jsonl", "lock", temporary):
        (folder / name).symlink_to(outside)
    with pytest.raises(OSError, match=r"ledger\.jsonl"):
        ledger.append(folder, "query", {})
    with pytest.raises(IndexStoreError, match="cannot be written to"):
        WriteLock(folder)
    with pytest.raises(FileExistsError):
        write_atomically(folder / "table", lambda file: file.write(b"new"))
    assert outside.read_text() == "of the user"
