"""The command line end to end on a tiny model: ingest, query, inspect, and every error."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import Command, corpus_table, png
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
from headwater.ingest.journal import Journal
from headwater.printing import printable

SMALL = ("--timesteps", 2, "--dim", 256, "--quiet")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, corpus: Path, model_folder: Path) -> Path:
    """An index of ten good items and two bad ones, made through Python."""
    folder = tmp_path_factory.mktemp("index") / "idx"
    table = corpus_table()
    images = table["image"].to_pylist()
    images[3], images[7] = b"", images[7][:100]
    path = folder.with_suffix(".parquet")
    pq.write_table(table.set_column(1, "image", pa.array(images)), path)
    model = Model.from_pretrained(model_folder, device="cpu")
    summary = build_index(path, model, folder, recipe=Recipe(timesteps=2, dim=256))
    assert (summary.items, summary.rows, sum(summary.quarantined.values())) == (12, 10, 2)
    return folder


def ask(headwater: Command, index: Path, model: Path, *more: object) -> tuple[int, str, str]:
    words = ("query", index, "--model", model, "--seeds", 2, "--guidance", 2, "--quiet")
    return headwater(*words, *more)


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


def one_line(code: int, out: str, err: str) -> str:
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("missing", "does not exist; check --model"),
        ("empty", "not a diffusers pipeline"),
        ("halved", "cannot be loaded as a diffusers pipeline"),
        ("no/hub/id", "does not exist; check --model"),
    ],
)
def test_bad_model_folder(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path, broken: str, message: str
) -> None:
    folder: Path | str = tmp_path / broken
    if broken == "empty":
        (tmp_path / broken).mkdir()
    elif broken == "halved":
        shutil.copytree(model_folder, folder)
        (tmp_path / broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    elif broken == "no/hub/id":
        folder = broken
    err = one_line(*headwater("ingest", corpus, "--model", folder, "--out", tmp_path / "i", *SMALL))
    assert message in err
    assert str(folder) in err
    assert not (tmp_path / "i").exists()


def bad_source(tmp_path: Path, kind: str) -> Path:
    table = corpus_table(3)
    if kind == "no captions":
        table = table.drop_columns(["caption"])
    elif kind == "empty captions":
        table = table.set_column(2, "caption", pa.array([None, "", " "]))
    elif kind == "no images":
        table = table.drop_columns(["image"])
    elif kind == "all broken":
        table = table.set_column(1, "image", pa.array([b"", b"x", b""]))
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "text file":
        (tmp_path / "s.parquet").write_text("hello")
        return tmp_path / "s.parquet"
    elif kind == "missing":
        return tmp_path / "nowhere"
    pq.write_table(table, tmp_path / "s.parquet")
    return tmp_path / "s.parquet"


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("no captions", (), "--caption-column"),
        ("no images", (), "--image-column"),
        ("all broken", (), "no usable image"),
        ("no rows", (), "no records"),
        ("text file", (), "Parquet"),
        ("missing", (), "does not exist"),
        ("fine", ("--caption-column", "titel"), "titel"),
        ("fine", ("--where", "\"group\" = 'none'"), "widen it"),
        ("fine", ("--where", "grup = 'even'"), "group"),
        ("fine", ("--where", "read_csv('/etc/passwd')"), "read_csv"),
        ("fine", ("--where", "true; drop table items"), "drop table"),
        ("fine", ("--limit", 0), "--limit 0"),
        ("fine", ("--batch-size", 0), "--batch-size 0"),
        ("fine", ("--method", "magic"), "dsm, dtrak, dtrak-text, das, das-mean, probe, dps, cfg"),
        ("fine", ("--scaling", "row"), "timestep, layer, none"),
        ("fine", ("--levels", "1-0"), "0-1 is all of it"),
        ("fine", ("--parameters", "nothing_like_it"), "matches no parameter"),
        ("fine", ("--dim", 0), "--dim 0"),
        ("fine", ("--projection", "fourier"), "sjlt, mask, factored, trak, identity"),
        ("fine", ("--device", "foo"), "--device foo cannot be used"),
        ("empty captions", (), "has a caption"),
        ("fine", ("--dtype", "int8"), "float32"),
    ],
)
def test_bad_ingest_leaves_nothing_behind(
    headwater: Command, tmp_path: Path, model_folder: Path, kind: str, flags: tuple[object, ...],
    message: str,
) -> None:  # fmt: skip
    source = bad_source(tmp_path, kind)
    words = ("ingest", source, "--model", model_folder, "--out", tmp_path / "i", *SMALL, *flags)
    assert message in one_line(*headwater(*words))
    assert not (tmp_path / "i").exists()


def test_out_folder_that_is_no_index_or_one_of_another_space(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path, index: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for out, message in (
        (tmp_path / "mine", "is no index"),
        (tmp_path / "file", "not a folder"),
        (index, "another feature space; different: recipe.seed (3 against 0)"),
    ):
        words = ("ingest", corpus, "--model", model_folder, "--out", out, *SMALL, "--seed", 3)
        assert message in one_line(*headwater(*words))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert StoredIndex.open(index).manifest.rows == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "a cat", "--contrast", "a cat"), "zero gradient"),
        ((), "no concept was given"),
        (("--prompt", "zebra", "--contrast", "yak"), "words it does not know"),
        (("--prompt", "a cat", "--top", 11), "10 items can be ranked"),
        (("--prompt", "a cat", "--top", 0), "choose 1 to 10"),
        (("--prompt", "a cat", "--where", "licence = 'GPL'"), "widen --where"),
        (("--prompt", "a cat", "--where", "licens = 'GPL'"), "licence"),
        (("--prompt", "a cat", "--where", "(select 1) = 1"), "subquer"),
        (("--prompt", "a cat", "--method", "dps"), "training method"),
        (("--prompt", "a cat", "--method", "magic"), "contrast, slider, image, journey"),
        (("--prompt", "a cat", "--damping", 0), "must be positive"),
        (("--prompt", "a cat", "--damping", "inf"), "must be positive"),
        (("--prompt", "a cat", "--guidance", "nan"), "must be finite"),
        (("--prompt", "a cat", "--method", "image", "--contrast", "a"), "takes no contrast"),
        (("--prompt", "a cat", "--method", "image", "--alone", "a"), "takes no --alone"),
        (("--prompt", "a cat", "--method", "slider", "--alone", "a"), "takes no --alone"),
        (("--prompt", "a cat", "--alone", "a"), "the rest as --contrast"),
        (("--prompt", "a cat", "--context", "a dog"), "'a dog' is no pair; write it as"),
        (("--prompt", "a cat", "--context", "a | b | c"), "'a | b | c' is no pair"),
        (("--prompt", "a cat", "--context", "a | a"), "both sides of a context are 'a'"),
        (("--prompt", "a cat", "--contrast", "a", "--context", "a | a cat"), "take back"),
        (("--context", "a cat | a"), "no concept was given"),
        *(
            (("--prompt", "a cat", "--method", method, "--context", "a | b"), "takes no --context")
            for method in ("image", "journey", "slider")
        ),
        (("--prompt", "a cat", "--device", "foo"), "--device foo cannot be used"),
        (("--prompt", "a cat", "--json", "no/such/folder/r.json"), "folder that exists"),
        (("--prompt", "a cat", "--seeds", 0), "at least 1"),
        (("--prompt", "a cat", "--image", "nowhere.png"), "nowhere.png"),
        (("--prompt", "a cat", "--image", __file__), "cannot be used"),
    ],
)
def test_bad_question(
    headwater: Command, index: Path, model_folder: Path, flags: tuple[object, ...], message: str
) -> None:
    assert message in one_line(*ask(headwater, index, model_folder, *flags))


def test_index_of_another_model_or_recipe_says_which_part_differs(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    other = tiny.saved(tiny.stable_diffusion(seed=1), tmp_path / "other")
    err = one_line(*ask(headwater, index, other, "--prompt", "a cat"))
    assert "model.denoiser" in err
    assert "model.scheduler" not in err
    moved = shutil.copytree(model_folder, tmp_path / "moved")
    assert ask(headwater, index, moved, "--prompt", "a cat")[0] == 0
    model = Model.from_pretrained(model_folder, device="cpu")
    with pytest.raises(QueryError, match=r"recipe\.method \(dsm against dtrak\)"):
        Index(index).query(
            Concept("a cat"), model, recipe=Recipe(method="dsm", timesteps=2, dim=256)
        )


def test_not_an_index_or_an_unfinished_one(
    headwater: Command, tmp_path: Path, index: Path, model_folder: Path
) -> None:
    for words in (
        ("inspect", tmp_path / "no"),
        ("query", tmp_path / "no", "--model", model_folder),
    ):
        assert str(tmp_path / "no") in one_line(*headwater(*words))
    broken = shutil.copytree(index, tmp_path / "broken")
    (broken / "manifest.json").unlink()
    assert "is no index" in one_line(*headwater("inspect", broken))
    (broken / "job").mkdir()
    (broken / "job/job.json").touch()
    assert "is not finished" in one_line(*headwater("inspect", broken))


def test_folder_that_was_there_stays_after_an_error(
    headwater: Command, tmp_path: Path, model_folder: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    source = bad_source(tmp_path, "all broken")
    words = ("ingest", source, "--model", model_folder, "--out", tmp_path / "link", *SMALL)
    assert "no usable image" in one_line(*headwater(*words))
    assert list((tmp_path / "link").iterdir()) == []


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
