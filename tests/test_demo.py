"""The demo end to end: what it writes, and how often it is right over every held-out pair."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import Command

from headwater import IndexStoreError
from headwater.attribution import Engine, contrast_rows
from headwater.demo.art import STUDIOS
from headwater.demo.corpus import (
    HELD_OUT,
    caption,
    object_contrast,
    studio_contrast,
)
from headwater.demo.run import demo_model, run_demo
from headwater.index import search
from headwater.queries import Asking, Index, label_free
from headwater.queries.gradients import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    run_demo(folder)
    return folder


def test_precision_over_all_held_out_pairs_and_both_concepts(folder: Path) -> None:
    index, model = Index(folder / "index"), demo_model()
    items = index.stored.items()
    engine = Engine(model, index.recipe)
    asking = Asking(seeds=4)  # half the default: quicker, and harder
    damping = label_free(asking.method, lambda: index.curvature.rows, lambda: index.curvature)
    right: dict[str, list[float]] = {"asked": [], "flipped": []}
    keys = [f"query/{seed}" for seed in range(asking.seeds)]
    for object_name, studio in HELD_OUT:
        prompts = [caption(object_name, studio)] * asking.seeds
        x_0, _ = generate(engine, prompts, keys, asking)  # both questions are about them
        for column, value, contrast in (
            ("object", object_name, object_contrast(studio)),
            ("studio", studio, studio_contrast(object_name)),
        ):
            rows = contrast_rows(engine, x_0, prompts, [contrast] * asking.seeds, keys)
            query = index.curvature.precondition(rows.mean(0)[None], damping).numpy()
            truth = np.array(items[column].to_pylist()) == value
            for name, signed in (("asked", query), ("flipped", -query)):
                _, found = search(index.stored, signed, 10)
                right[name].append(float(truth[found[0]].mean()))
    assert len(right["asked"]) == 2 * len(HELD_OUT)
    assert np.mean(right["asked"]) >= 0.9
    assert np.mean(right["flipped"]) < 0.5  # so the bar above can be missed


def test_result_and_report_show_the_asked_pair(folder: Path) -> None:
    object_name, studio = HELD_OUT[0]
    result = json.loads((folder / "result.json").read_text())
    assert result["prompt"] == caption(object_name, studio)
    holders = {s.name: s.rights_holder for s in STUDIOS}
    assert [hit["rank"] for hit in result["studio"]["hits"]] == list(range(1, 11))
    assert Counter(hit["rights_holder"] for hit in result["studio"]["hits"]).most_common(1) == [
        (holders[studio], result["studio"]["rollup"][0]["hits"])
    ]
    assert sum(hit["object"] == object_name for hit in result["object"]["hits"]) >= 9
    page = (folder / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 20
    assert page.count("data:image/png;base64,") == 16  # what the model draws, for each question
    for hit in result["studio"]["hits"] + result["object"]["hits"]:
        for text in (hit["item_id"], hit["caption"], hit["rights_holder"], hit["licence"]):
            assert text in page


def test_held_out_pairs_are_not_in_the_index(folder: Path) -> None:
    items = Index(folder / "index").stored.items()
    pairs = set(zip(items["object"].to_pylist(), items["studio"].to_pylist(), strict=True))
    assert len(pairs) == 40
    assert not pairs & set(HELD_OUT)


def test_demo_refuses_a_folder_with_other_things(headwater: Command, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    (tmp_path / "corpus.parquet").write_text("precious too")
    code, out, err = headwater("demo", "--out", tmp_path, "--quiet")
    assert (code, out) == (2, "")
    assert "holds no earlier demo" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.parquet", "thesis.txt"]
    assert (tmp_path / "corpus.parquet").read_text() == "precious too"
    with pytest.raises(IndexStoreError, match="not a folder"):
        run_demo(tmp_path / "thesis.txt")
