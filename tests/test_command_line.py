"""The command line end to end on a tiny model: ingest, inspect, what is interrupted or deleted."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from conftest import Command, ask, corpus_table, one_line

from headwater import Asking, Concept, Index, Model, QueryError, Recipe, build_index
from headwater.index import StoredIndex
from headwater.ingest.journal import Journal
from headwater.printing import printable

SMALL = ("--timesteps", 2, "--dim", 256, "--quiet")


def test_ingest_counts_and_layout(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    code, out, err = headwater(
        "ingest", corpus, "--model", model_folder, "--out", tmp_path / "idx", *SMALL,
        "--where", "\"group\" = 'even'", "--limit", 5, "--projection", "mask",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "5 rows" in out
    assert "0 items quarantined" in out
    stored = StoredIndex.open(tmp_path / "idx")
    assert stored.items()["item_id"].to_pylist() == [f"img-{i:03d}" for i in (0, 2, 4, 6, 8)]
    assert set(stored.items()["group"].to_pylist()) == {"even"}
    assert stored.manifest.recipe["recipe"]["projection"] == "mask"
    for name in ("manifest.json", "ledger.jsonl", "items/part-00000.parquet",
                 "features/part-00000.npy", "thumbs/part-00000.parquet",
                 "curvature/00001/eigenvalues.npy"):  # fmt: skip
        assert (tmp_path / "idx" / name).is_file()


def test_same_seed_and_any_batch_size_give_the_same_index(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    rows = {}
    for name, batch, seed in (("a", 4, 0), ("b", 4, 0), ("c", 5, 0), ("d", 4, 1)):
        code, _, _ = headwater(
            "ingest", corpus, "--model", model_folder, "--out", tmp_path / name, *SMALL,
            "--batch-size", batch, "--seed", seed,
        )  # fmt: skip
        assert code == 0
        stored = StoredIndex.open(tmp_path / name)
        rows[name] = np.concatenate([block for _, block in stored.blocks()])

    def content(name: str) -> dict[str, bytes]:
        files = (p for p in (tmp_path / name).rglob("*") if p.is_file() and p.suffix != ".jsonl")
        return {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in files}

    assert content("a") == content("b")
    assert np.abs(rows["a"] - rows["c"]).max() <= 1e-3 * np.abs(rows["a"]).max()  # fp16 storage
    assert np.abs(rows["a"] - rows["d"]).max() > 0.1 * np.abs(rows["a"]).max()


def test_inspect_shows_counts_recipe_and_quarantine(headwater: Command, index: Path) -> None:
    code, out, err = headwater("inspect", index)
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    for words in ("items 12", "searchable 10", "quarantined 2", "1 x empty file",
                  "1 x truncated file", "method dtrak", "parameters attn2", "rights_holder string",
                  StoredIndex.open(index).manifest.feature_space_id):  # fmt: skip
        assert words in flat


def test_inspect_shows_an_index_of_an_older_version(headwater: Command) -> None:
    code, out, err = headwater("inspect", Path(__file__).parent / "data" / "index-v1")
    assert (code, err) == (0, "")
    assert "duplicates not looked for" in " ".join(out.split())


def test_escape_sequences_of_captions_do_not_reach_the_terminal() -> None:
    assert printable("a \x1b]0;owned\x07[b]cat[/b]\x9b2J\n") == (
        "a \\x1b]0;owned\\x07\\[b]cat\\[/b]\\x9b2J\n"
    )


def test_pixel_model_ingests_and_answers(tmp_path: Path, corpus: Path) -> None:
    model = Model.from_pretrained(tiny.saved(tiny.pixel_diffusion(), tmp_path / "m"), device="cpu")
    build_index(
        corpus, model, tmp_path / "i", recipe=Recipe(parameters="conv", timesteps=2, dim=64)
    )
    result = Index(tmp_path / "i").query(
        Concept(), model, asking=Asking(method="image", seeds=2), top=3
    )
    assert len(result.hits) == 3
    with pytest.raises(QueryError, match="takes no text"):
        Index(tmp_path / "i").query(Concept("a cat"), model)


def test_user_columns_keep_their_names_types_and_values(
    headwater: Command, tmp_path: Path, model_folder: Path
) -> None:
    table = corpus_table(3)
    for name, values in (
        ("rank", pa.array([7, 8, 9], pa.int8())),
        ("aesthetic", pa.array([0.5, float("nan"), float("inf")], pa.float32())),
        ("hash", pa.array([2**64 - 1, 0, 1], pa.uint64())),
        ("tags", pa.array([[("a", 1)], [], None], pa.map_(pa.string(), pa.int32()))),
        ("seen", pa.array([1, None, 3], pa.date32())),
        ("nothing", pa.nulls(3)),
        ("[bold]", pa.array(["[red]x[/red]", "[/]", ""])),
    ):
        table = table.append_column(name, values)
    pq.write_table(table, tmp_path / "c.parquet")
    words = ("ingest", tmp_path / "c.parquet", "--model", model_folder, "--out", tmp_path / "i[/b]")
    assert headwater(*words, *SMALL)[0] == 0
    stored = StoredIndex.open(tmp_path / "i[/b]").items()
    for name in ("aesthetic", "hash", "tags", "seen", "nothing", "[bold]"):
        assert stored.schema.field(name).type == table.schema.field(name).type
    code, _, err = ask(
        headwater, tmp_path / "i[/b]", model_folder, "--prompt", "a red cat", "--top", 3,
        "--json", tmp_path / "r.json", "--html", tmp_path / "r.html",
    )  # fmt: skip
    assert (code, err) == (0, "")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    result = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    hits = {hit["item_id"]: hit for hit in result["hits"]}
    assert hits["img-000"]["original_rank"] == 7
    assert hits["img-000"]["hash"] == 2**64 - 1
    assert hits["img-001"]["aesthetic"] is None
    assert headwater("inspect", tmp_path / "i[/b]")[0] == 0


def test_interrupted_ingest_goes_on(
    headwater: Command,
    tmp_path: Path,
    corpus: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i", *SMALL)
    honest = Journal.commit

    for end, code in ((KeyboardInterrupt(), 130), (signal.SIGTERM, 143), (OSError(28, "full"), 2)):

        def cut_short(self: Journal, *batch: Any, end: Any = end) -> None:
            honest(self, *batch)
            if isinstance(end, signal.Signals):
                os.kill(os.getpid(), end)
            else:
                raise end

        monkeypatch.setattr(Journal, "commit", cut_short)
        found, _, err = headwater(*words, "--batch-size", 3)
        assert found == code
        assert "unfinished: what was computed is kept" in err
        assert "the same command goes on with it" in " ".join(err.split())
        assert "Traceback" not in err
    assert "is not finished; run it again" in one_line(*headwater("inspect", tmp_path / "i"))
    monkeypatch.setattr(Journal, "commit", honest)
    assert "--restart" in one_line(*headwater(*words, "--limit", 5))
    code, out, err = headwater(*words)
    assert (code, err) == (0, "")
    assert "12 rows in" in out
    details = json.loads((tmp_path / "i/ledger.jsonl").read_text())["details"]
    assert (details["resumed"], details["batch_size"]) == (9, 3)
    code, out, _ = headwater(*words)
    assert (code, "12 items unchanged, 0 replaced" in out) == (0, True)


def test_delete_and_compact(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    words = ("ingest", corpus, "--model", model_folder, "--out", tmp_path / "i", *SMALL)
    assert headwater(*words)[0] == 0
    (tmp_path / "ids.txt").write_text("img-003\n\nimg-004\r\n")
    assert "one of them" in one_line(*headwater("delete", tmp_path / "i"))
    assert "'x'" in one_line(*headwater("delete", tmp_path / "i", "--where", "grup = 'x'"))
    code, out, err = headwater("delete", tmp_path / "i", "--ids", tmp_path / "ids.txt")
    assert (code, err) == (0, "")
    assert "2 items deleted" in out
    assert "10 remain" in out
    assert "2, on the disk until" in headwater("inspect", tmp_path / "i")[1]
    assert (
        "5 items deleted" in headwater("delete", tmp_path / "i", "--where", "\"group\" = 'odd'")[1]
    )
    code, out, err = headwater("compact", tmp_path / "i")
    assert (code, err) == (0, "")
    assert "7 deleted items taken from the disk (1 parts), 5 remain" in out
    flags = ("--prompt", "a red cat", "--top", 6)
    assert "5 items can be ranked" in one_line(
        *ask(headwater, tmp_path / "i", model_folder, *flags)
    )
    (tmp_path / "ids.txt").write_text("img-003\nimg-000")
    message = one_line(*headwater("delete", tmp_path / "i", "--ids", tmp_path / "ids.txt"))
    assert "does not hold 1 of the 2 ids: 'img-003'; nothing was deleted" in message
