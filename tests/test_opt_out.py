"""Refusals of training are carried with their words; what is no refusal is not one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import png

from headwater.ingest import open_source

ROBOTS = "Use of image disallowed by X-Robots-Tag directive"


@pytest.mark.parametrize(
    ("column", "refusals", "others"),
    [
        ("noai", [True], [False, None]),
        ("NoImageAI", [1], [0, None]),
        ("opt_out", ["yes", "Spawning"], ["no", "", "false", None, " 0 "]),
        ("tdm-reservation", ["1", "1.0"], ["0", None, "none"]),
        ("tdm_reservation", [1.0], [0.0, float("nan"), None]),
        ("X-Robots-Tag", ["noai", "otherbot: noimageai, nofollow", "NOINDEX"],
         ["all", "nofollow", "max-image-preview:large", "noaim", "", None]),
        ("cawg.ai_generative_training", ["notAllowed", "constrained"], ["allowed", None]),
        ("c2pa_training_mining",
         ['{"entries": {"c2pa.ai_training": {"use": "notAllowed"}}}'], ['{"use": "allowed"}']),
        ("training_mining", [{"use": "constrained"}], [{"use": "allowed"}, None]),
        ("plus:DataMining", ["DMI-PROHIBITED-AIMLTRAINING"], ["DMI-ALLOWED", "DMI-UNSPECIFIED"]),
        ("error_message", [ROBOTS], ["HTTP Error 404: Not Found", None]),
        ("noaise", [], ["1"]),
        ("mining_company", [], ["notAllowed"]),
    ],
)  # fmt: skip
def test_every_signal(tmp_path: Path, column: str, refusals: list[Any], others: list[Any]) -> None:
    values = [*refusals, *others]
    count = len(values)
    table = {"image": [png(n) for n in range(count)], "caption": ["x"] * count, column: values}
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    items = list(open_source(tmp_path / "c.parquet"))
    told = [item.opt_out for item in items]
    assert told == [f"{column}={value}" for value in refusals] + [None] * len(others)
    kept = "original_opt_out" if column == "opt_out" else column
    assert [str(item.extra[kept]) for item in items] == [str(value) for value in values]
    assert all(item.error is None and item.data is not None for item in items)


def test_all_signals_of_a_record_are_named(tmp_path: Path) -> None:
    table = {"image": [png(0)], "caption": ["x"], "tdm_reservation": [1], "noai": [True],
             "robots": ["all"]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "c.parquet")
    (item,) = open_source(tmp_path / "c.parquet")
    assert item.opt_out == "tdm_reservation=1; noai=True"
