"""Adding to an index and removing from it: answers as if it had always been so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import corpus_table, png
from test_index_store import make_items, make_thumbs
from test_index_writer import VERSION_1, Crash, crash_at, events, without_ledger

from headwater import Model, Recipe, build_index, compact, delete
from headwater.attribution import Curvature
from headwater.index import IndexStoreError, IndexWriter, StoredIndex, scores
from headwater.ingest import SourceError, devices, job
from headwater.ingest.spectrum import curvature_arrays

SMALL = Recipe(timesteps=1, dim=16)
COUNT = 40


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", 12)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each pass computed."""
    honest, found = devices._pass, []

    def noted(engine: Any, batch: Any, pictures: list[int]) -> Any:
        found.append(len(pictures))
        return honest(engine, batch, pictures)

    monkeypatch.setattr(devices, "_pass", noted)
    return found


def written(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


def edited(table: pa.Table, column: str, values: dict[int, Any]) -> pa.Table:
    cells = table[column].to_pylist()
    for place, value in values.items():
        cells[place] = value
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(cells, table.schema.field(column).type))


def broken_table() -> pa.Table:
    """Forty records of which three end in quarantine, each in its own way."""
    table = edited(corpus_table(COUNT), "image", {4: b"", 17: png(17)[:90]})
    return edited(table, "image_id", {30: "img-029"})


def run(source: Path, model: Model, folder: Path, **settings: Any) -> Any:
    return build_index(source, model, folder, **{"recipe": SMALL, "batch_size": 4, **settings})


def answers(folder: Path) -> dict[str, float]:
    """{item id: preconditioned score}, with the unit of damping that the rows give."""
    index = StoredIndex.open(folder)
    curvature = Curvature.from_arrays(index.curvature())
    query = np.random.default_rng(5).standard_normal(index.manifest.dim)
    solved = curvature.precondition(torch.from_numpy(query)[None], 0.3).numpy()[0]
    ids = index.items()["item_id"].take(pa.array(index.ok_positions)).to_pylist()
    found = dict(zip(ids, scores(index, solved).tolist(), strict=True))
    return found | {"scale": curvature.scale, "rows": float(curvature.rows)}


def assert_same_answers(folder: Path, other: Path) -> None:
    mine, theirs = answers(folder), answers(other)
    assert list(mine) == list(theirs)
    values = np.array(list(theirs.values()))
    largest = np.abs(values[:-2]).max()
    differences = np.abs(np.array(list(mine.values())) - values)
    assert differences[:-2].max() <= 1e-6 * largest
    assert differences[-2] <= 1e-6 * values[-2]
    assert differences[-1] == 0


def dense_rows(folder: Path) -> npt.NDArray[np.float64]:
    """The searchable rows, from the files alone."""
    index = StoredIndex.open(folder)
    units = np.concatenate([index.features(s).astype(np.float32) for s in index.manifest.shards])
    rows = units * index.items()["row_norm"].to_numpy()[:, None]
    return rows[index.ok_positions].astype(np.float64)


def assert_answers_are_those_of_the_rows(folder: Path) -> None:
    """Against (K + lambda I)^-1 q solved densely, and the unit of damping by its definition."""
    rows = dense_rows(folder)
    query = np.random.default_rng(5).standard_normal(rows.shape[1])
    product = rows.T @ rows
    scale = np.trace(product) / len(rows)
    expected = rows @ np.linalg.solve(product + 0.3 * scale * np.eye(len(product)), query)
    index = StoredIndex.open(folder)
    expected *= index.items()["row_weight"].to_numpy()[index.ok_positions]
    found = answers(folder)
    assert found.pop("rows") == len(rows)
    assert found.pop("scale") == pytest.approx(scale, rel=1e-6)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-6 * np.abs(expected).max())


# ------------------------------------------------------------------------------- adding


def test_the_same_again_changes_nothing(tmp_path: Path, model: Model, computed: list[int]) -> None:
    table = broken_table().append_column("price", pa.array([float("nan"), None, 1.5, 2.0] * 10))
    source = written(tmp_path / "c.parquet", table)
    run(source, model, tmp_path / "idx")
    before = without_ledger(tmp_path / "idx")
    computed.clear()
    summary = run(source, model, tmp_path / "idx", batch_size=7)
    assert without_ledger(tmp_path / "idx") == before
    assert computed == []
    assert (summary.unchanged, summary.rows, summary.replaced) == (COUNT, 0, ())
    assert events(tmp_path / "idx") == ["ingest", "ingest"]
    details = json.loads((tmp_path / "idx/ledger.jsonl").read_text().splitlines()[1])["details"]
    assert (details["written"], details["unchanged"]) == (0, COUNT)


def test_what_is_new_is_added_and_what_changed_is_replaced(
    tmp_path: Path, model: Model, computed: list[int]
) -> None:
    table = broken_table()
    run(written(tmp_path / "a.parquet", table.slice(0, 30)), model, tmp_path / "idx")
    table = edited(table, "image", {2: png(902), 4: png(904), 8: b"broken now"})
    table = edited(table, "caption", {11: "a blue cat"})
    table = edited(table, "licence", {20: "CC0-1.0"})
    computed.clear()
    summary = run(written(tmp_path / "b.parquet", table), model, tmp_path / "idx")
    replaced = {f"img-{place:03d}" for place in (2, 4, 11, 20)}
    assert set(summary.replaced) == replaced
    assert (summary.items, summary.unchanged) == (COUNT, 26)
    assert sum(computed) == 4 + 9  # img-008 is no picture, the tenth new one has a taken id
    table = edited(table, "image", {8: png(8)})  # what is unusable takes nothing away
    run(written(tmp_path / "b.parquet", table), model, tmp_path / "whole")
    index = StoredIndex.open(tmp_path / "idx")
    items = index.items().take(pa.array(index.live_positions)).sort_by("item_id")
    whole = StoredIndex.open(tmp_path / "whole").items().sort_by("item_id")
    same = ("item_id", "sha256", "caption", "licence", "status", "error", "group")
    assert items.select(same).to_pydict() == whole.select(same).to_pydict()
    mine, theirs = answers(tmp_path / "idx"), answers(tmp_path / "whole")
    assert set(mine) == set(theirs)
    largest = max(abs(value) for value in theirs.values())
    for name in mine:  # in other places of a pass: to the rounding of half precision
        assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3 * largest)
    details = json.loads((tmp_path / "idx/ledger.jsonl").read_text().splitlines()[1])["details"]
    assert set(details["replaced"]) == replaced
    assert details["kept"] == summary.kept
    assert list(summary.kept) == ["img-008"]
    assert "not an image" in summary.kept["img-008"]
    assert_answers_are_those_of_the_rows(tmp_path / "idx")
    previews = index.thumbnails(["img-002", "img-003", "img-004", "img-017"])
    assert set(previews) == {"img-002", "img-003", "img-004"}
    assert previews["img-002"] != StoredIndex.open(tmp_path / "whole").thumbnails(["img-003"])


def test_queries_see_the_old_state_until_the_end(tmp_path: Path, model: Model) -> None:
    class Stopped(Exception):
        pass

    def look(progress: Any) -> None:
        assert answers(tmp_path / "idx") == before
        if progress.done >= 30:
            raise Stopped

    table = corpus_table(COUNT)
    run(written(tmp_path / "a.parquet", table.slice(0, 20)), model, tmp_path / "idx")
    before = answers(tmp_path / "idx")
    source = written(tmp_path / "b.parquet", table)
    with pytest.raises(Stopped):
        run(source, model, tmp_path / "idx", progress=look)
    assert answers(tmp_path / "idx") == before
    # It refers to rows by their positions, and to what it found of them.
    with pytest.raises(IndexStoreError, match=r"an ingest into .* is unfinished.* then delete"):
        delete(tmp_path / "idx", ids=["img-003"])
    with pytest.raises(IndexStoreError, match=r"an ingest into .* is unfinished.* then compact"):
        compact(tmp_path / "idx")
    assert answers(tmp_path / "idx") == before
    run(source, model, tmp_path / "idx", batch_size=9)
    assert set(answers(tmp_path / "idx")) == {
        "scale", "rows", *(f"img-{i:03d}" for i in range(COUNT))
    }  # fmt: skip


def test_images_that_cannot_be_read_now_take_nothing_away(tmp_path: Path, model: Model) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
        (folder / f"{number}.txt").write_text("a red cat")
    lines = [{"file_name": f"{n}.png", "caption": "a red cat"} for n in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run(folder, model, tmp_path / "idx")
    before = without_ledger(tmp_path / "idx")
    (folder / "2.png").unlink()
    assert run(folder, model, tmp_path / "idx").unchanged == 4
    assert without_ledger(tmp_path / "idx") == before


def test_a_prefix_keeps_two_corpora_apart(tmp_path: Path, model: Model) -> None:
    run(written(tmp_path / "a.parquet", corpus_table(10)), model, tmp_path / "idx")
    table = edited(corpus_table(10), "image", {n: png(500 + n) for n in range(10)})
    summary = run(written(tmp_path / "b.parquet", table), model, tmp_path / "idx", id_prefix="b/")
    assert (summary.rows, summary.replaced) == (10, ())
    ids = StoredIndex.open(tmp_path / "idx").items()["item_id"].to_pylist()
    assert ids[9:11] == ["img-009", "b/img-000"]


def test_copies_of_one_content(tmp_path: Path, model: Model) -> None:
    """Without ids an image and its caption are what a record is."""
    table = corpus_table(6).drop_columns(["image_id"])
    twice = pa.concat_tables([table.slice(0, 3), table.slice(0, 2)])
    twice = edited(twice, "group", {3: "other"})
    run(written(tmp_path / "a.parquet", twice), model, tmp_path / "idx")
    ids = StoredIndex.open(tmp_path / "idx").items()["item_id"].to_pylist()
    assert ids[3:] == [f"{ids[0]}~2", f"{ids[1]}~2"]
    assert run(tmp_path / "a.parquet", model, tmp_path / "idx").unchanged == 5
    changed = edited(twice, "group", {3: "third"})
    summary = run(written(tmp_path / "b.parquet", changed), model, tmp_path / "idx")
    assert (summary.unchanged, summary.rows, summary.replaced) == (4, 1, ())
    more = pa.concat_tables([changed, edited(twice.slice(0, 1), "group", {0: "fourth"})])
    summary = run(written(tmp_path / "c.parquet", more), model, tmp_path / "idx")
    assert (summary.unchanged, summary.rows, summary.replaced) == (5, 1, ())
    index = StoredIndex.open(tmp_path / "idx")
    assert index.items()["item_id"].to_pylist()[5:] == [f"{ids[0]}~3", f"{ids[0]}~4"]
    assert index.items()["group"].to_pylist()[3:] == ["other", "odd", "third", "fourth"]
    assert len(index.live_positions) == 7


def test_an_id_that_looks_like_a_copy_is_its_own(tmp_path: Path, model: Model) -> None:
    """Where ids are given, "a~2" is no copy of "a"."""
    table = edited(corpus_table(2), "image_id", {0: "a", 1: "a~2"})
    for column in ("caption", "group", "licence", "rights_holder"):
        table = edited(table, column, {1: table[column][0].as_py()})
    run(written(tmp_path / "a.parquet", table), model, tmp_path / "idx")
    changed = edited(table, "image", {0: table["image"][1].as_py()}).slice(0, 1)
    summary = run(written(tmp_path / "b.parquet", changed), model, tmp_path / "idx")
    assert (summary.unchanged, summary.replaced) == (0, ("a",))
    index = StoredIndex.open(tmp_path / "idx")
    items = index.items().take(pa.array(index.live_positions))
    assert items["item_id"].to_pylist() == ["a~2", "a"]
    assert len(set(items["sha256"].to_pylist())) == 1


@pytest.mark.parametrize("what", ["recipe", "columns", "numbers", "case", "nothing usable"])
def test_what_cannot_be_added_leaves_the_index_whole(
    tmp_path: Path, model: Model, what: str
) -> None:
    posts = pa.array([2**60 + n for n in range(10)])
    first = corpus_table(10).append_column("post", posts)
    run(written(tmp_path / "a.parquet", first), model, tmp_path / "idx")
    before = without_ledger(tmp_path / "idx")
    table, settings = corpus_table(COUNT).slice(10), {}
    if what == "recipe":
        settings = {"recipe": Recipe(timesteps=1, dim=32)}
    elif what == "case":
        table = table.rename_columns([*table.column_names[:3], "Group", *table.column_names[4:]])
    elif what == "numbers":
        table = table.append_column("post", pa.array([0.5] * 30))
    elif what == "columns":
        table = table.set_column(3, "group", pa.array([[1]] * 30))
    else:
        table = edited(table, "image", dict.fromkeys(range(30), b""))
    message = {
        "recipe": r"another feature space; different: recipe.dim \(32 against 16\)",
        "columns": "its items do not fit",
        "case": "column 'Group' differs from 'group' of earlier shards only in case",
        "numbers": "column 'post' holds double here and int64 there",
        "nothing usable": "no usable image",
    }[what]
    with pytest.raises((IndexStoreError, SourceError), match=message):
        run(written(tmp_path / "b.parquet", table), model, tmp_path / "idx", **settings)
    assert without_ledger(tmp_path / "idx") == before


# ------------------------------------------------------------------------------- removing


@pytest.mark.parametrize("dim", [16, 38])  # more rows than dimensions, and soon fewer of them
def test_deleted_rows_leave_no_trace_in_answers(tmp_path: Path, model: Model, dim: int) -> None:
    table = broken_table()
    given: Any = {"recipe": Recipe(timesteps=1, dim=dim)}
    run(written(tmp_path / "a.parquet", table), model, tmp_path / "idx", **given)
    gone = [*range(12, 24), 1, 38]  # a whole part, and of others a row
    done = delete(tmp_path / "idx", ids=[f"img-{place:03d}" for place in gone])
    assert len(done.deleted) == 14
    assert done.remaining == COUNT - 14
    assert ("gram" in StoredIndex.open(tmp_path / "idx").curvature()) == (dim == 16)
    assert_answers_are_those_of_the_rows(tmp_path / "idx")
    before = answers(tmp_path / "idx")
    assert not before.keys() & set(done.deleted)
    compacted = compact(tmp_path / "idx")
    assert (compacted.removed, compacted.remaining) == (14, COUNT - 14)
    assert answers(tmp_path / "idx") == before
    assert events(tmp_path / "idx") == ["ingest", "delete", "compact"]


def test_answers_equal_those_of_an_index_never_given_the_rows(tmp_path: Path, model: Model) -> None:
    """Ingested with the rows and without: the last range goes, the others are the same bytes."""
    table = broken_table()
    for dim in (16, 34):
        given: Any = {"recipe": Recipe(timesteps=1, dim=dim)}
        folder, never = tmp_path / f"idx-{dim}", tmp_path / f"never-{dim}"
        run(written(tmp_path / "a.parquet", table), model, folder, **given)
        run(written(tmp_path / "b.parquet", table.slice(0, 24)), model, never, **given)
        delete(folder, where="item_id >= 'img-024'")
        assert_same_answers(folder, never)
        compact(folder)
        assert_same_answers(folder, never)
        names = {name for name in without_ledger(folder) if name.startswith("features")}
        assert names == {"features/part-00000.npy", "features/part-00001.npy"}


@pytest.mark.parametrize("scales", [(1, 1e6), (1, 6e2, 3e5)])
def test_much_heavier_rows_leave_no_rounding_behind(
    tmp_path: Path, scales: tuple[float, ...]
) -> None:
    """What is subtracted may be a million times what remains, at once or by and by."""
    rows = np.random.default_rng(0).standard_normal((30 * len(scales), 16)).astype(np.float32)
    rows *= np.repeat(scales, 30).astype(np.float32)[:, None]
    ids = [f"{n // 30}-{n:02d}" for n in range(len(rows))]
    for name, part in (("idx", slice(None)), ("never", slice(30))):
        with IndexWriter.create(tmp_path / name, feature_space_id="s", recipe={}, dim=16) as writer:
            writer.add_shard(make_items(ids[part]), rows[part], make_thumbs([]))
            stored = StoredIndex(writer.folder, writer.manifest)
            writer.write_curvature(curvature_arrays(stored))
            writer.finish()
    for number in reversed(range(1, len(scales))):
        delete(tmp_path / "idx", where=f"item_id like '{number}-%'")
    mine = StoredIndex.open(tmp_path / "idx").curvature()["gram"]
    never = StoredIndex.open(tmp_path / "never").curvature()["gram"]
    np.testing.assert_allclose(mine, never, atol=1e-8 * np.abs(never).max())
    assert_same_answers(tmp_path / "idx", tmp_path / "never")


def test_everything_can_be_deleted_and_something_added_again(tmp_path: Path, model: Model) -> None:
    source = written(tmp_path / "a.parquet", corpus_table(24))
    run(source, model, tmp_path / "idx")
    before = answers(tmp_path / "idx")
    assert delete(tmp_path / "idx", where="true").remaining == 0
    assert delete(tmp_path / "idx", where="true").deleted == ()
    assert len(StoredIndex.open(tmp_path / "idx").ok_positions) == 0
    compact(tmp_path / "idx")
    left = set(without_ledger(tmp_path / "idx"))
    assert left == {"lock", "manifest.json", "duplicates/00002.parquet"}
    run(source, model, tmp_path / "idx")
    assert answers(tmp_path / "idx") == before
    assert StoredIndex.open(tmp_path / "idx").manifest.shards[0].name == "part-00002"


@pytest.mark.parametrize("kind", ["features", "items", "thumbs"])
def test_compact_hides_no_damage(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "licence=MIT"
    shutil.copytree(VERSION_1, folder)
    ids = StoredIndex.open(folder).items()["item_id"].to_pylist()
    delete(folder, ids=ids[:1])
    whole = shutil.copytree(folder, tmp_path / "a=b")
    (path,) = (folder / kind).glob("part-00000.*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(IndexStoreError, match=f"{kind}/part-00000.* is not what was written"):
        compact(folder)
    assert path.read_bytes() == content
    assert StoredIndex.open(folder).manifest.deleted == 1
    compact(whole)
    columns = StoredIndex.open(VERSION_1).items().column_names
    assert StoredIndex.open(whole).items().column_names == columns


def test_ids_that_are_not_there_delete_nothing(tmp_path: Path, model: Model) -> None:
    run(written(tmp_path / "a.parquet", corpus_table(10)), model, tmp_path / "idx")
    before = without_ledger(tmp_path / "idx")
    with pytest.raises(IndexStoreError, match=r"1 of the 2 ids: 'nobody'; nothing was deleted"):
        delete(tmp_path / "idx", ids=["img-001", "nobody"])
    with pytest.raises(IndexStoreError, match="one of them"):
        delete(tmp_path / "idx")
    with pytest.raises(IndexStoreError, match="columns: item_id"):
        delete(tmp_path / "idx", where="colour = 'red'")
    assert without_ledger(tmp_path / "idx") == before
    assert compact(tmp_path / "idx").parts == 0
    assert without_ledger(tmp_path / "idx") == before


def test_rows_of_a_version_1_index_are_deleted(tmp_path: Path) -> None:
    shutil.copytree(VERSION_1, tmp_path / "idx")
    assert delete(tmp_path / "idx", ids=["id2"]).remaining == 7
    compact(tmp_path / "idx")
    index = StoredIndex.open(tmp_path / "idx")
    assert int(index.curvature()["rows"]) == 5
    assert_answers_are_those_of_the_rows(tmp_path / "idx")
    names = sorted(without_ledger(tmp_path / "idx"))
    assert [n for n in names if n.startswith(("curv", "tomb"))] == [
        "curvature/00001/eigenvalues.npy",
        "curvature/00001/eigenvectors.npy",
        "curvature/00001/rows.npy",
    ]


# ------------------------------------------------------------------------------- crashes


def test_a_crash_in_any_change_leaves_the_old_state_or_the_new_one(
    tmp_path: Path, model: Model
) -> None:
    table = corpus_table(20)
    run(written(tmp_path / "a.parquet", table.slice(0, 17)), model, tmp_path / "idx")
    source = written(tmp_path / "b.parquet", edited(table, "image", {2: png(902)}))
    changes: dict[str, Callable[[Path], Any]] = {
        "append": lambda folder: run(source, model, folder, batch_size=12),
        "delete": lambda folder: delete(folder, where="\"group\" = 'odd'"),
        "compact": compact,
    }
    current = tmp_path / "idx"
    for name, change in changes.items():
        shutil.copytree(current, tmp_path / name)
        change(tmp_path / name)
        old, new = answers(current), answers(tmp_path / name)
        bytes_after = without_ledger(tmp_path / name)
        committed = []
        for step in range(1, 200):
            folder = tmp_path / f"{name}-{step}"
            shutil.copytree(current, folder)
            with pytest.MonkeyPatch.context() as patch:
                crash_at(patch, step)
                try:
                    change(folder)
                    break
                except Crash:
                    pass
            generation = StoredIndex.open(folder).manifest.generation
            committed.append(generation > StoredIndex.open(current).manifest.generation)
            assert answers(folder) == (new if committed[-1] else old)
            change(folder)
            assert without_ledger(folder) == bytes_after
            # Each change once; what is asked for again when it is done changes nothing.
            again = ["ingest"] if name == "append" and committed[-1] else []
            assert events(folder) == events(tmp_path / name) + again
            shutil.rmtree(folder)
        assert committed == sorted(committed)
        assert sum(committed) == 1
        assert len(committed) >= 8
        current = tmp_path / name
