"""Questions end to end on a tiny model: answers, reports, and dense references of their scores."""

from __future__ import annotations

import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, ask, corpus_table, png
from PIL import Image

from headwater import (
    Asking,
    Concept,
    Index,
    IndexStoreError,
    Model,
    QueryError,
    Recipe,
    Reward,
    build_index,
)
from headwater.attribution import Engine, contrast_rows, ddim_grid, generation_path, seeded_noise
from headwater.index import Metric, StoredIndex, plain_json


def test_query_prints_writes_json_and_html(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    json_file, html = tmp_path / "r.json", tmp_path / "r.html"
    code, out, err = ask(
        headwater, index, model_folder, "--prompt", "a red cat", "--contrast", "a drawing",
        "--top", 3, "--json", json_file, "--html", html, "--where", "licence <> 'MIT'",
    )  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(json_file.read_text())
    columns = set(StoredIndex.open(index).items().column_names)
    assert [hit["rank"] for hit in result["hits"]] == [1, 2, 3]
    for hit in result["hits"]:
        assert set(hit) == columns | {"rank", "score"}
        assert hit["licence"] == "CC-BY-4.0"
        assert hit["item_id"] in out
        assert hit["item_id"] in html.read_text()
    scores = [hit["score"] for hit in result["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert html.read_text().count("data:image/webp;base64,") == 3
    assert "Influence is not copying" in html.read_text()
    assert "http" not in html.read_text().replace("http-equiv", "")  # needs no network


@pytest.mark.parametrize(
    "metric",
    [
        (),
        ("--preconditioning", "none"),
        ("--similarity", "cosine", "--preconditioning", "both", "--damping", 0.5),
    ],
)
def test_bottom_is_the_other_end_of_the_same_ranking(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path, metric: tuple[object, ...]
) -> None:
    words = ("--prompt", "a red cat", "--contrast", "a drawing", "--top", 10, *metric)
    results = {}
    for name, more in {"top": (), "bottom": ("--bottom", "--exact")}.items():
        code, _, err = ask(
            headwater, index, model_folder, *words, *more, "--json", tmp_path / name
        )  # fmt: skip
        assert code == 0
        assert ("other end" in err) == (name == "bottom")
        results[name] = json.loads((tmp_path / name).read_text())
        assert results[name]["question"]["bottom"] == (name == "bottom")
        assert any("other end" in text for text in results[name]["warnings"]) == (name == "bottom")
    ends = [[(hit["item_id"], hit["score"]) for hit in results[name]["hits"]] for name in results]
    assert ends[0] == ends[1][::-1]
    scores = [score for _, score in ends[0]]
    assert len(set(scores)) == 10
    if "cosine" in metric:
        assert max(map(abs, scores)) <= 1 + 1e-5
    plain = ask(headwater, index, model_folder, *words[:6], "--json", tmp_path / "plain")
    assert plain[0] == 0
    default = json.loads((tmp_path / "plain").read_text())["hits"]
    assert ([hit["score"] for hit in default] == scores) == (not metric)


def test_quality_is_what_its_parts_ask(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    words = ("--prompt", "a red cat", "--contrast", "a drawing", "--top", 5)
    damping = Index(index).curvature.rows ** 0.5 / 4
    found = {}
    for name, more in {
        "quality": ("--quality",),
        "parts": ("--similarity", "standard", "--damping", damping, "--seeds", 16),
        "fewer": ("--quality", "--seeds", 2),
    }.items():
        options = (*words, *more, "--device", "cpu", "--json", tmp_path / name)
        assert headwater("query", index, "--model", model_folder, *options)[0] == 0
        found[name] = json.loads((tmp_path / name).read_text())
    assert found["quality"]["hits"] == found["parts"]["hits"]
    asked = found["fewer"]["question"]
    assert (asked["similarity"], asked["seeds"]) == ("standard", 2)


@pytest.mark.parametrize("dim", [8, 256])  # fewer dimensions than rows, and more: both forms
def test_scores_equal_a_dense_float64_reference(
    tmp_path: Path, corpus: Path, model_folder: Path, dim: int
) -> None:
    model = Model.from_pretrained(model_folder, device="cpu")
    build_index(corpus, model, tmp_path / "i", recipe=Recipe(timesteps=2, dim=dim))
    asking = Asking(seeds=2, guidance=2.0, damping=0.3)
    concept = Concept("a red cat", contrast="a drawing")
    product = replace(asking, similarity="ip")
    results = [
        Index(tmp_path / "i").query(concept, model, asking=how, top=12) for how in (product, asking)
    ]
    stored = StoredIndex.open(tmp_path / "i")
    assert ("gram" in stored.curvature()) == (dim == 8)
    engine = Engine(model, Index(tmp_path / "i").recipe)
    states, null = engine.states(["a red cat"] * 2)
    keys = ["query/0", "query/1"]
    noise = torch.stack([seeded_noise(0, f"generate/{key}", (4, 8, 8)) for key in keys])
    grid = ddim_grid(model, 50)
    x_0, _ = generation_path(model, noise, states, null, grid=grid, timesteps=[], guidance=2.0)
    rows = contrast_rows(engine, x_0, ["a red cat"] * 2, ["a drawing"] * 2, keys)
    query = rows.double().mean(0).numpy()
    units = np.load(tmp_path / "i" / "features" / "part-00000.npy").astype(np.float64)
    phi = units * stored.items()["row_norm"].to_numpy()[:, None]
    k = phi.T @ phi
    damped = k + 0.3 * np.trace(k) / 12 * np.eye(len(k))
    expected = phi @ np.linalg.solve(damped, query)
    inverse = np.linalg.solve(damped, phi.T)
    deviations = np.sqrt(np.einsum("dn,de,en->n", inverse, k, inverse) / 12)
    # The default counts in standard deviations of a row's scores over questions like the corpus.
    for result, scores in zip(results, (expected, expected / deviations), strict=True):
        by_id = dict(zip(stored.items()["item_id"].to_pylist(), scores, strict=True))
        assert len(result.hits) == 12
        for hit in result.hits:
            assert abs(hit.score - by_id[hit.item_id]) <= 1e-4 * np.abs(scores).max()


def test_local_question_is_about_the_given_picture(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    picture = tmp_path / "asked.png"
    picture.write_bytes(png(4))
    found = {}
    for name, more in (
        ("image", ("--method", "image", "--prompt", "a red cat")),
        ("contrast", ("--prompt", "a red cat", "--contrast", "a drawing")),
        ("slider", ("--method", "slider", "--prompt", "a red cat", "--contrast", "a drawing")),
    ):
        code, _, err = ask(
            headwater, index, model_folder, "--image", picture, "--json", tmp_path / "r.json",
            "--top", 10, "--html", tmp_path / "r.html", *more,
        )  # fmt: skip
        assert code == 0
        assert ("no defined direction" in err) == (name == "slider")  # these are dtrak rows
        found[name] = json.loads((tmp_path / "r.json").read_text())
        assert found[name]["question"]["image"] == str(picture)
        page = (tmp_path / "r.html").read_text()
        assert "The picture asked about" in page
        assert f"damping={found[name]['question']['damping']}<" in page
    # What is saved holds the number, which the rows decide for a whole picture alone, and replays.
    dampings = {name: result["question"]["damping"] for name, result in found.items()}
    corpus = Index(index).curvature
    chosen = {"image": corpus.damping(0.25), "contrast": corpus.rows**0.5 / 4, "slider": 10.0}
    assert dampings == chosen
    noted = [json.loads(line) for line in (index / "ledger.jsonl").read_text().splitlines()[-3:]]
    assert [line["details"]["damping"] for line in noted] == list(dampings.values())
    similarities = {name: result["question"]["similarity"] for name, result in found.items()}
    assert similarities == {"image": "ip", "contrast": "standard", "slider": "ip"}
    question = found["image"]["question"]
    again = Asking(**{field.name: question[field.name] for field in fields(Asking)})
    model = Model.from_pretrained(model_folder, device="cpu")
    concept = Concept("a red cat", image=str(picture))
    repeated = Index(index).query(concept, model, asking=again, top=10).as_dict()
    assert plain_json(repeated) == found["image"]
    orders = {name: [hit["item_id"] for hit in r["hits"]] for name, r in found.items()}
    assert orders["image"] != orders["contrast"] != orders["slider"] != orders["image"]


def test_a_question_in_several_contexts_is_the_mean_of_its_contrasts(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    picture, saved, html = (tmp_path / name for name in ("asked.png", "r.json", "r.html"))
    picture.write_bytes(png(4))
    code, _, err = ask(
        headwater, index, model_folder, "--image", picture, "--prompt", "a red cat",
        "--contrast", "a drawing", "--alone", "cat", "--context", "a blue cat | a blue drawing",
        "--context", "the cat | ", "--top", 10, "--json", saved, "--html", html,
    )  # fmt: skip
    assert (code, err) == (0, "")
    result = json.loads(saved.read_text())
    question, found = result["question"], {h["item_id"]: h["score"] for h in result["hits"]}
    pairs = [("a blue cat", "a blue drawing"), ("the cat", "")]
    assert question["contexts"] == [list(pair) for pair in pairs]
    page = " ".join(html.read_text().split())
    assert "what “a blue cat” has and “a blue drawing” has not" in page
    assert "what “the cat” has and the empty prompt has not" in page

    model, opened = Model.from_pretrained(model_folder, device="cpu"), Index(index)
    again = Asking(**{field.name: question[field.name] for field in fields(Asking)})
    keys = ("prompt", "contrast", "image", "alone", "contexts")
    replayed = Concept(**{key: question[key] for key in keys})
    repeated = opened.query(replayed, model, asking=again, top=10).as_dict()
    assert plain_json(repeated) == result

    # A score is linear in the query's row, and a given picture is the same to every pair.
    mean = dict.fromkeys(found, 0.0)
    for prompt, contrast in (("a red cat", "a drawing"), ("cat", ""), *pairs):
        one = opened.query(Concept(prompt, contrast, picture), model, asking=again, top=10)
        for hit in one.hits:
            mean[hit.item_id] += hit.score / 4
    largest = max(map(abs, mean.values()))
    assert found == pytest.approx(mean, rel=0, abs=1e-4 * largest)


def test_an_index_without_curvature_is_asked_without_preconditioning(
    index: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.from_pretrained(model_folder, device="cpu")
    monkeypatch.setattr(StoredIndex, "curvature", lambda self: {})
    for method in ("contrast", "image"):
        asking = Asking(method=method, seeds=1, preconditioning="none")
        result = Index(index).query(Concept("a red cat"), model, asking=asking, top=3)
        assert result.question["damping"] is None  # none was used
        asking = Asking(method=method, seeds=1)
        with pytest.raises(IndexStoreError, match="holds no curvature"):
            Index(index).query(Concept("a red cat"), model, asking=asking, top=3)


def test_a_damping_that_no_index_settled_is_not_guessed() -> None:
    with pytest.raises(QueryError, match="until an index settles it"):
        _ = Asking().metric
    assert Asking(damping=0.3).metric == Metric("standard", "query", 0.3)
    assert Asking(similarity="ip", damping=0.3).metric == Metric("ip", "query", 0.3)
    assert Asking(preconditioning="none").metric == Metric("ip", "none")
    assert Asking(preconditioning="both", damping=0.3).metric == Metric("ip", "both", 0.3)


def test_contexts_that_are_no_pairs_are_refused(index: Path, model_folder: Path) -> None:
    model = Model.from_pretrained(model_folder, device="cpu")
    for wrong in (("a cat", "a dog"), (("a cat",),)):
        unpaired: Any = wrong
        with pytest.raises(QueryError, match="is no pair; give the concept in other company"):
            Index(index).query(Concept("a red cat", contexts=unpaired), model)


def test_a_training_picture_asked_about_as_a_whole_finds_itself(
    index: Path, model_folder: Path
) -> None:
    model = Model.from_pretrained(model_folder, device="cpu")
    captions = corpus_table()["caption"].to_pylist()
    ranks = []
    for i in (0, 2, 4, 6, 8):
        picture = Image.open(io.BytesIO(png(i)))
        concept = Concept(captions[i], image=picture)
        asking = Asking(method="image", seeds=4, damping=0.3)
        result = Index(index).query(concept, model, asking=asking, top=10)
        assert len(result.pictures) == 1
        ranks += [hit.rank for hit in result.hits if hit.item_id == f"img-{i:03d}"]
    assert len(ranks) == 5
    assert np.mean(ranks) <= 2.5  # of ten; chance is 5.5


def test_reward_from_python(index: Path, model_folder: Path) -> None:
    model = Model.from_pretrained(model_folder, device="cpu")

    def redness(images: object) -> object:
        return images[:, 0].mean(dim=(1, 2))  # type: ignore[index]

    asking = Asking(method="reward", seeds=2, guidance=2.0)
    found = {
        of: Index(index).query(
            Concept("a red cat", reward=Reward(redness, of=of)), model, asking=asking, top=10
        )
        for of in ("image", "x_t")
    }
    assert found["image"].question["reward"].endswith("redness")
    assert [h.item_id for h in found["image"].hits] != [h.item_id for h in found["x_t"].hits]
    with pytest.raises(QueryError, match="belong together"):
        Index(index).query(Concept("a red cat", reward=Reward(redness)), model)


def test_question_is_noted_in_the_ledger(
    headwater: Command, index: Path, model_folder: Path
) -> None:
    ask(headwater, index, model_folder, "--prompt", "a blue dog", "--top", 2)
    last = json.loads((index / "ledger.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "query"
    assert last["details"]["prompt"] == "a blue dog"
    assert len(last["details"]["hits"]) == 2


def test_results_do_not_depend_on_the_query_batch(index: Path, model_folder: Path) -> None:
    model = Model.from_pretrained(model_folder, device="cpu")
    concept = Concept("a red cat", contrast="a drawing")
    results = [
        Index(index).query(
            concept, model, asking=Asking(seeds=3, guidance=2.0, batch_size=size), top=10
        )
        for size in (1, 2, 16)
    ]
    first = [hit.item_id for hit in results[0].hits]
    for result in results[1:]:
        assert [hit.item_id for hit in result.hits] == first
        for a, b in zip(result.hits, results[0].hits, strict=True):
            assert abs(a.score - b.score) <= 1e-4 * abs(results[0].hits[0].score)


# ------------------------------------------------------------------ errors: one line, exit code 2
