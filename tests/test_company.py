"""Company: which captions are drawn, that they are asked as contexts by hand are, and replay."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import Command, png

from headwater import Asking, Concept, Index, Model, QueryError, Recipe, Result, build_index, delete
from headwater.attribution import Engine, contrast_rows
from headwater.benchmarks.further import COMPANY, in_company
from headwater.benchmarks.study import Corpus, Question, Study, query_rows
from headwater.index import plain_json
from headwater.ingest import job
from headwater.queries import company_of, drawn_captions

RECIPE = Recipe(timesteps=1, dim=64)
SAID = ["a red cat", "a red drawing", "cat"]  # prompt, contrast, alone
CONCEPT = Concept(*SAID[:2], alone=SAID[2])
CAPTIONS = [f"{a} {b}" for a in ("a red", "the blue") for b in ("dog", "fish", "house", "studio")]
ASKED = Asking(seeds=1, steps=2, guidance=2.0, company=3)
BROKEN = "by an house"  # the caption of an item in quarantine


def written(path: Path, captions: list[str], first: int = 0) -> Path:
    numbers = range(first, first + len(captions))
    images = [
        b"" if words == BROKEN else png(i) for i, words in zip(numbers, captions, strict=True)
    ]
    ids = [f"img-{i:02d}" for i in numbers]
    pq.write_table(pa.table({"image_id": ids, "image": images, "caption": captions}), path)
    return path


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Model:
    return Model.from_pretrained(model_folder, device="cpu")


@pytest.fixture(scope="module")
def index(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions twice each, some that the question says, one without a caption, one in quarantine.

    In three parts.
    """
    folder = tmp_path_factory.mktemp("company")
    source = written(folder / "c.parquet", [*CAPTIONS, *SAID, *CAPTIONS, "", BROKEN])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SHARD_ITEMS", 8)
        build_index(source, model, folder / "idx", recipe=RECIPE)
    return folder / "idx"


def ask(index: Path, model: Model, concept: Concept = CONCEPT, **settings: Any) -> Result:
    return Index(index).query(concept, model, asking=replace(ASKED, **settings), top=5)


def company(result: Result) -> list[str]:
    """The captions, of which each pair is checked to be one."""
    pairs = result.question["contexts"]
    assert all(has == f"cat, {lacks}" for has, lacks in pairs)
    return [lacks for _, lacks in pairs]


def by_hash(captions: dict[str, str], seed: int = 0) -> list[str]:
    """Every caption once, as its first item comes in the order of hashes: by sorting them all."""
    hashed = {hashlib.sha256(f"{seed}/{key}".encode()).hexdigest(): key for key in captions}
    return list(dict.fromkeys(captions[hashed[name]] for name in sorted(hashed)))


def test_drawn_are_the_captions_of_the_smallest_hashes() -> None:
    generator = np.random.default_rng(0)
    items = {f"i{n}": f"caption {generator.integers(40)}" for n in range(200)}
    more = {f"b{n}": words for n, words in enumerate(("", " \n", None))}
    for seed in (0, 1):
        expected = by_hash(items, seed)
        for count in (1, 2, 7, 39, 100):
            shuffled = [[*(items | more).items()][i] for i in generator.permutation(203)]
            assert drawn_captions(shuffled, count, seed) == expected[:count]
    assert by_hash(items, 0)[:7] != by_hash(items, 1)[:7]


def test_company_is_asked_as_the_same_contexts_by_hand(index: Path, model: Model) -> None:
    result = ask(index, model)
    captions = company(result)
    listed = Index(index).stored.items().to_pylist()
    usable = {item["item_id"]: item["caption"] for item in listed if item["status"] == "ok"}
    assert len(usable) == len(listed) - 1
    fresh = [words for words in by_hash(usable) if words and words not in SAID]
    assert captions == fresh[:3]
    by_hand = replace(CONCEPT, contexts=company_of("cat", captions, 3, said=()))
    again = ask(index, model, by_hand, company=0)
    assert [(hit.item_id, hit.score) for hit in again.hits] == [
        (hit.item_id, hit.score) for hit in result.hits
    ]
    without = ask(index, model, company=0)
    assert [hit.score for hit in without.hits] != [hit.score for hit in result.hits]
    assert company(ask(index, model, seed=1)) != captions
    # It is of the whole corpus, also where a part of it is ranked.
    assert company(Index(index).query(CONCEPT, model, asking=ASKED, top=1, where="width > 0"))

    some = ask(index, model, replace(CONCEPT, contexts=(("the cat", captions[0]),)))
    assert some.question["contexts"][0] == ["the cat", captions[0]]
    assert [words for _, words in some.question["contexts"][1:]] == fresh[1:4]  # said already


def test_other_items_do_not_change_the_company(
    index: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "SHARD_ITEMS", 8)
    shutil.copytree(index, tmp_path / "idx")
    first = ask(index, model)
    drawn = company(first)
    captions = Index(index).stored.items(["caption"])["caption"].to_pylist()
    others = [f"img-{i:02d}" for i, words in enumerate(captions) if words not in drawn]
    delete(tmp_path / "idx", ids=others[::2])
    assert company(ask(tmp_path / "idx", model)) == drawn
    further = [f"{word} style" for word in ("dog", "fish", "house", "studio", "red", "blue")]
    more = written(tmp_path / "m.parquet", further, first=50)
    build_index(more, model, tmp_path / "idx", recipe=RECIPE)
    many = company(ask(tmp_path / "idx", model, company=20))
    assert set(further) < set(many)
    assert [words for words in many if words not in further][:3] == drawn

    delete(tmp_path / "idx", where=f"caption = '{drawn[0]}'")
    after = ask(tmp_path / "idx", model)
    assert drawn[0] not in company(after)
    # What is saved asks as it did, of captions that are no longer there.
    question = json.loads(json.dumps(plain_json(first.question)))
    asking = Asking(**{field.name: question[field.name] for field in fields(Asking)})
    keys = ("prompt", "contrast", "image", "alone", "contexts")
    saved = Concept(**{key: question[key] for key in keys})
    repeated = Index(tmp_path / "idx").query(saved, model, asking=asking, top=5)
    assert plain_json(repeated.question) == question
    assert plain_json(ask(index, model, saved).as_dict()) == plain_json(first.as_dict())


def test_a_corpus_of_few_captions_gives_what_it_has(
    index: Path, model: Model, tmp_path: Path
) -> None:
    result = ask(index, model, company=20)
    assert sorted(company(result)) == sorted(CAPTIONS)
    assert result.question["company"] == 8
    (warning,) = result.warnings
    assert "in the company of 8 captions, not 20" in warning
    few = written(tmp_path / "c.parquet", [*SAID, ""])
    build_index(few, model, tmp_path / "idx", recipe=RECIPE)
    with pytest.raises(QueryError, match=r"a caption to say 'cat' beside.* ask with --company 0$"):
        Index(tmp_path / "idx").query(CONCEPT, model, asking=ASKED, top=2)


@pytest.mark.parametrize(
    ("concept", "settings", "message"),
    [
        (CONCEPT, {"company": -1}, "company is -1; it must be at least 0"),
        (replace(CONCEPT, alone=""), {}, "--company 3 says what --alone names .*; give --alone"),
        (Concept("a cat", "a"), {"method": "slider"}, r"takes no --company \(3 was given\)"),
        (Concept("a cat"), {"method": "image"}, r"takes no --company \(3 was given\)"),
    ],
)
def test_company_without_a_concept_alone_is_refused(
    index: Path, model: Model, concept: Concept, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(QueryError, match=message):
        ask(index, model, concept, **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny.dit, "caption '2, fish' is no class .* ask with --company 0"),
        (tiny.pixel_diffusion, "this model takes no text"),
    ],
)
def test_a_model_that_hears_no_text_keeps_no_company(
    tmp_path: Path, make: Any, message: str
) -> None:
    model = Model.from_pipeline(make(), device="cpu")
    source = written(tmp_path / "c.parquet", ["fish", "1"])
    recipe = replace(RECIPE, parameters="conv" if make is tiny.pixel_diffusion else "auto")
    build_index(source, model, tmp_path / "idx", recipe=recipe)
    with pytest.raises(QueryError, match=message):
        Index(tmp_path / "idx").query(Concept("1", "0", alone="2"), model, asking=ASKED, top=1)


def test_the_command_asks_in_company(
    headwater: Command, index: Path, model_folder: Path, tmp_path: Path
) -> None:
    picture, saved, html = (tmp_path / name for name in ("a.png", "r.json", "r.html"))
    picture.write_bytes(png(4))
    told = ("--prompt", SAID[0], "--contrast", SAID[1], "--image", picture, "--seeds", 1)
    alone = ("--alone", SAID[2])
    files = ("--top", 3, "--json", saved, "--html", html, "--quiet")

    def pairs(*more: object) -> int:
        found = headwater("query", index, "--model", model_folder, *told, *files, *more)
        assert (found[0], found[2]) == (0, "")
        question = json.loads(saved.read_text())["question"]
        entry = json.loads((index / "ledger.jsonl").read_text().splitlines()[-1])["details"]
        page = " ".join(html.read_text().split())
        for has, lacks in question["contexts"]:
            assert has == f"cat, {lacks}"
            assert f"what “{has}” has and “{lacks}” has not" in page
        assert entry["contexts"] == question["contexts"]
        assert question["company"] == entry["company"] == len(question["contexts"])
        return len(question["contexts"])

    assert pairs(*alone, "--company", 2) == 2
    assert pairs(*alone) == 0
    assert pairs(*alone, "--quality") == 0
    assert pairs(*alone, "--quality", "--company", 2) == 2
    code, _, err = headwater("query", index, "--model", model_folder, *told, "--company", 2)
    assert code == 2
    assert "give --alone" in err


def test_a_study_asks_in_the_company_of_an_index_of_its_corpus(index: Path, model: Model) -> None:
    items = [row for row in Index(index).stored.items().to_pylist() if row["status"] == "ok"]
    keys, captions = (tuple(row[name] for row in items) for name in ("item_id", "caption"))
    corpus = Corpus(torch.zeros(len(keys), 1), captions, keys)
    truth = np.zeros(len(keys), bool)
    texts = (SAID, [captions[0], captions[1], captions[2]])
    asked = [Question("kind", *said[:2], "p", truth, alone=said[2]) for said in texts]
    found = in_company(asked, corpus)
    for question, before in zip(found, asked, strict=True):
        concept = Concept(before.prompt, before.contrast, alone=before.alone)
        one = ask(index, model, concept, company=COMPANY).question
        assert [list(pair) for pair in question.company] == one["contexts"]
        assert replace(question, company=()) == before
        pictures = torch.randn(1, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        study = Study("s", model, corpus, (question,), seeds=1, given={"p": pictures[0]})
        engine = Engine(model, RECIPE)
        rows = query_rows(study, engine, "company")
        own, *further = replace(concept, contexts=tuple(map(tuple, one["contexts"]))).pairs
        expected = contrast_rows(
            engine, pictures, [own[0]], [own[1]], ["p#0"], [([a], [b]) for a, b in further]
        )
        torch.testing.assert_close(rows[0], expected, rtol=1e-5, atol=1e-7)
    # As many for all: where one says three of four captions itself, one is left to everybody.
    few = Corpus(corpus.x_0[:4], captions[:4], keys[:4])
    assert [len(question.company) for question in in_company(asked, few)] == [1, 1]
    untold = [asked[0], replace(asked[1], alone="")]
    assert not any(question.company for question in in_company(untold, corpus))
    assert in_company([], corpus) == ()
