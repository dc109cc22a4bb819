"""Gradient norms: kept beside the rows, and the unusual ones reported."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import Command, corpus_table

from headwater import Model, Recipe, build_index
from headwater.attribution import Engine, Rows, decode, fit
from headwater.index import IndexWriter, StoredIndex, norm_outliers
from headwater.index.outliers import FEWEST_ROWS, THRESHOLD
from headwater.ingest import open_source


def items(norms: list[float | None], status: list[str] | None = None) -> pa.Table:
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(len(norms))],
            "status": status or ["ok"] * len(norms),
            "gradient_norm": pa.array(norms, pa.float32()),
        }
    )


def usual(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).lognormal(-3, 0.2, count).tolist()


def test_z_is_that_of_the_textbook() -> None:
    norms = [*usual(40), 0.6, 0.004]
    found = {outlier.item_id: outlier for outlier in norm_outliers(items(norms))}
    logs = [float(np.log(np.float64(np.float32(norm)))) for norm in norms]
    middle = statistics.median(logs)
    mad = statistics.median(abs(value - middle) for value in logs)
    z = {f"i{n}": 0.6745 * (value - middle) / mad for n, value in enumerate(logs)}
    assert set(found) == {name for name, value in z.items() if abs(value) > THRESHOLD}
    assert {"i40", "i41"} <= set(found)
    for name, outlier in found.items():
        assert outlier.z == pytest.approx(z[name], rel=1e-9)
        assert outlier.gradient_norm == pytest.approx(norms[int(name[1:])], rel=1e-6)
    distances = [abs(outlier.z) for outlier in norm_outliers(items(norms))]
    assert distances == sorted(distances, reverse=True)


def test_a_normal_corpus_reports_none_and_many_broken_rows_do_not_hide_one_another() -> None:
    assert norm_outliers(items(usual(20_000))) == []
    assert len(norm_outliers(items([*usual(100), *[50.0] * 30]))) == 30


def test_what_has_no_norm_does_not_count() -> None:
    norms: list[float | None] = [*usual(30), 1e9, None]
    status = ["ok"] * 30 + ["quarantined"] * 2
    assert norm_outliers(items(norms, status)) == []
    assert [o.item_id for o in norm_outliers(items(norms[:31]))] == ["i30"]
    assert norm_outliers(items(norms).drop_columns(["gradient_norm"])) == []


def test_too_few_or_equal_norms_say_nothing() -> None:
    few = [*usual(FEWEST_ROWS - 2), 1e6]
    assert norm_outliers(items(few)) == []
    assert len(norm_outliers(items([*few, 0.05]))) == 1
    assert norm_outliers(items([1.0] * 30 + [1e6])) == []


def test_norms_of_the_engine_are_an_item_column(tmp_path: Path, corpus: Path) -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    recipe = Recipe(timesteps=2, dim=64)
    build_index(corpus, model, tmp_path / "i", recipe=recipe, batch_size=5)
    stored = StoredIndex.open(tmp_path / "i").items()
    engine = Engine(model, recipe)
    for item, row in zip(open_source(corpus), stored.to_pylist(), strict=True):
        assert item.data is not None
        x_0 = model.encode_pictures(fit(decode(item.data), model.image_size)[None])
        norm = float(engine.rows(x_0, [item.caption], [item.item_id]).norms)
        assert row["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert stored.schema.field("gradient_norm").type == pa.float32()


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("features", float("nan"), "not finite"),
        ("features", float("inf"), "not finite"),
        ("features", 0.0, "zero"),
        ("weights", float("nan"), "not finite"),
        ("norms", float("inf"), "not finite"),
    ],
)
def test_a_useless_row_is_quarantined_with_its_reason(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, part: str, value: float,
    reason: str,
) -> None:  # fmt: skip
    honest = Engine.rows

    def broken(self: Engine, x_0: Any, captions: Any, keys: list[str]) -> Rows:
        rows = honest(self, x_0, captions, keys)
        if "img-004" in keys:
            getattr(rows, part)[keys.index("img-004")] = value
        return rows

    monkeypatch.setattr(Engine, "rows", broken)
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    summary = build_index(corpus, model, tmp_path / "i", recipe=Recipe(timesteps=1, dim=64))
    assert summary.rows == 11
    ((stated, count),) = summary.quarantined.items()
    assert reason in stated
    assert count == 1
    row = StoredIndex.open(tmp_path / "i").items().to_pylist()[4]
    assert (row["status"], row["gradient_norm"], row["row_weight"]) == ("quarantined", None, 1.0)


def test_an_outlier_is_told_and_stays_searchable(
    headwater: Command, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Engine.rows

    def loud(self: Engine, x_0: torch.Tensor, captions: Any, keys: list[str]) -> Rows:
        rows = honest(self, x_0, captions, keys)
        for place, key in enumerate(keys):
            if key == "img-007":
                rows.norms[place] *= 1e6
        return rows

    monkeypatch.setattr(Engine, "rows", loud)
    pq.write_table(corpus_table(24), tmp_path / "c.parquet")
    code, out, _ = headwater(
        "ingest", tmp_path / "c.parquet", "--model", model_folder, "--out", tmp_path / "i",
        "--timesteps", 1, "--dim", 64, "--quiet",
    )  # fmt: skip
    assert code == 0
    assert "with an unusual gradient norm, kept and searchable" in out
    told = out[out.index("searchable") :]
    assert "img-007: norm" in told.splitlines()[1]
    code, out, _ = headwater("inspect", tmp_path / "i")
    assert "by gradient norm, searchable" in out
    assert "img-007: norm" in out
    assert 7 in StoredIndex.open(tmp_path / "i").ok_positions


def test_inspect_of_an_index_without_norms(headwater: Command, tmp_path: Path) -> None:
    writer = IndexWriter.create(
        tmp_path / "i", feature_space_id="s", recipe={"recipe": {}, "model": {}}, dim=2
    )
    table = items([1.0, 2.0]).drop_columns(["gradient_norm"])
    table = table.append_column("error", pa.nulls(2, pa.string()))
    empty = pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    writer.add_shard(table, np.ones((2, 2), np.float32), empty)
    writer.finish()
    code, out, _ = headwater("inspect", tmp_path / "i")
    assert code == 0
    assert "0 by gradient norm" in out
