"""The emoji benchmark, its caption variants and the ideas beyond it, on miniature corpora."""

from __future__ import annotations

import inspect
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Stopped, stopping_at
from PIL import Image

from headwater.attribution import Engine, Model, Recipe, parted
from headwater.attribution.shares import TEXT_SIDE
from headwater.benchmarks import beyond, caption_variants, emoji, pieces, record, text_share
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.measure import latent_scores, measure, ranking_metrics
from headwater.benchmarks.study import Answers, Configuration, Study, answer, query_rows
from headwater.demo.art import STUDIOS, render
from headwater.demo.corpus import HELD_OUT, caption, make_corpus
from headwater.demo.run import demo_model

# What the shipped demo's model was trained on.
DEMO = ("a {name} by Studio {style}", "a drawing by Studio {style}", "a {name}")
# Words that the tests' random model knows.
TINY = ("{a} {name} drawing in {style} style", "a drawing in {style} style", "{a} {name} drawing")
NAMES, STYLES = ("cat", "dog", "fish", "house"), ("red", "blue", "studio")
HELD = (("cat", "red"), ("dog", "blue"))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def item(number: int, name: str, style: str, wording: str, picture: Image.Image) -> dict[str, Any]:
    return {
        "image_id": f"{name}-{style}-{number}",
        "image": png(picture),
        "caption": wording.format(a="a", name=name, style=style),
        "name": name,
        "style": style,
        "codepoints": name.upper(),
    }


def written(folder: Path, art: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(list(art)), folder / "train.parquet")
    pq.write_table(pa.Table.from_pylist(list(held)), folder / "heldout.parquet")
    names = [
        {"codepoint": name.upper(), "language": "xx", "name": f"x{name}"} for name in NAMES[:-1]
    ]
    pq.write_table(pa.Table.from_pylist(names), folder / "names.parquet")
    return folder


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of each pair that the demo's model learnt from, and its held-out pairs."""
    columns = {"object": "name", "studio": "style"}
    art = make_corpus(1).select(["image_id", "image", "caption", *columns])
    art = art.rename_columns([columns.get(name, name) for name in art.column_names])
    studios = {studio.name: studio for studio in STUDIOS}
    held = [
        item(0, name, style, DEMO[0], render(name, studios[style], np.random.default_rng(0)))
        for name, style in HELD_OUT
    ]
    assert held[0]["caption"] == caption(*HELD_OUT[0])
    return written(tmp_path_factory.mktemp("corpora") / "demo", art.to_pylist(), held)


@pytest.fixture(scope="module")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, captioned: ten pictures of each pair but for those held out."""

    def picture(seed: int) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    pairs = [(name, style) for name in NAMES for style in STYLES]
    art = [
        item(number, *pair, TINY[0], picture(20 * place + number))
        for place, pair in enumerate(pairs)
        if pair not in HELD
        for number in range(4)
    ]
    held = [item(9, *pair, TINY[0], picture(999)) for pair in HELD]
    return written(tmp_path_factory.mktemp("corpora") / "tiny", art, held)


@pytest.fixture(scope="module")
def tiny_study(tiny_corpus: Path, model_folder: Path) -> Study:
    art, asked = emoji.read(tiny_corpus, 0, 2)
    model = Model.from_pretrained(model_folder, device="cpu")
    study = emoji.make_study(model, art, asked, TINY, seeds=3, batch=7)
    return replace(study, steps=4)


OURS = Configuration("ours", Recipe(dim=96, timesteps=3, steps=6))


def test_whole_run_finds_the_carriers(demo_corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {
        "corpus": str(demo_corpus),
        "pairs": 2,
        "seeds": 1,
        "batch": 40,
        "methods": ["headwater"],
        "pictured": 2,
        "wording": list(DEMO),
    }
    with as_file(files("headwater.demo") / "model") as model:
        settings |= {"model": str(model)}
        table = emoji.run(tmp_path, device="cpu", say=said.append, **settings)
    rows = [row for row in table.to_pylist() if row["label_free"]]
    assert {r["carriers"] for r in rows if r["concept"] == "object"} == {5}
    assert {r["carriers"] for r in rows if r["concept"] == "style"} <= {6, 7}

    def recall(method: str, concept: str) -> float:
        mine = [r for r in rows if (r["method"], r["concept"]) == (method, concept)]
        assert len(mine) == 2
        return float(np.mean([r["recall_at_10"] for r in mine]))

    for concept in emoji.METRICS:
        assert recall("caption search (BM25)", concept) == 1  # captions name the truth
        assert recall("headwater", concept) >= 0.8  # chance finds 10 of 40
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["settings"]) == set(inspect.signature(emoji.run).parameters) - {
        "out", "device", "say"
    }  # fmt: skip
    assert config["settings"] | settings == config["settings"]
    assert Image.open(tmp_path / "top10-headwater.png").height > 200
    assert "## Wrong images in the top tens" in (tmp_path / "emoji.md").read_text()
    assert len(said) == 5


def test_misses_are_told_apart(tiny_study: Study, tiny_corpus: Path) -> None:
    art, _ = emoji.read(tiny_corpus, 0, 2)
    art = art.set_column(3, "name", pa.array(["cat food"] * len(art)))
    question = tiny_study.questions[0]  # the cat of "a cat drawing in red style"
    other = tiny_study.questions[1].truth
    pick = [np.flatnonzero(question.truth)[0], *np.flatnonzero(other)[:3]]
    pick += [*np.flatnonzero(~question.truth & ~other)[:2]]
    row = {
        "method": "m",
        "question": 0,
        "label_free": True,
        "top": [tiny_study.corpus.keys[i] for i in pick],
    }
    lines = emoji.misses(tiny_study, art, pa.Table.from_pylist([row, row | {"question": 1}]))
    assert lines[-1] == "| m | 5 | 0.600 | 1.000 |"
    assert sum(line.startswith("| m ") for line in lines) == 1


def test_what_is_certain_of_rankings(demo_corpus: Path) -> None:
    """The query's sign matters, and one ranking for both concepts of a picture finds half."""
    art, asked = emoji.read(demo_corpus, 0, 2)
    study = emoji.make_study(demo_model("cpu"), art, asked, DEMO, seeds=1, batch=40)
    ours = emoji.named(["headwater"])[0]
    answers, blind = answer(study, ours), answer(study, replace(ours, query="image"))
    scores = {
        "ours": answers.scores(),
        "turned": replace(answers, rows=-answers.rows).scores(),
        "image": blind.scores(),
        "latents": latent_scores(study),
    }
    found = {
        name: [
            ranking_metrics(question.truth[np.argsort(-np.asarray(columns[:, number]))])
            for number, question in enumerate(study.questions)
        ]
        for name, columns in scores.items()
    }
    for right, wrong in zip(found["ours"], found["turned"], strict=True):
        assert right[2] > 2 * wrong[2]  # average precision
    for name in ("image", "latents"):
        precisions = [metrics[0] for metrics in found[name]]
        for first in (0, 2):  # no image carries both concepts of a held-out pair
            assert sum(precisions[first : first + 2]) <= 1 + 1e-9


def test_what_cannot_be_read_says_why(tiny_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"holds no train\.parquet"):
        emoji.read(tmp_path, 0, 1)
    with pytest.raises(BenchmarkError, match="holds 2 held-out pairs, 3 were asked for"):
        emoji.read(tiny_corpus, 0, 3)
    with pytest.raises(BenchmarkError, match="method 'theirs' is unknown"):
        emoji.named(["theirs"])
    art, _ = emoji.read(tiny_corpus, 4, 1)
    with pytest.raises(BenchmarkError, match="is 16 x 16, the model makes 64 x 64"):
        emoji.encoded(demo_model("cpu"), art)
    with pytest.raises(BenchmarkError, match="has no names in 'yy'; choose from xx"):
        caption_variants.read_names(tiny_corpus, ["xx", "yy"])


def test_captions_keep_their_article() -> None:
    owl = {"caption": "an owl emoji in noto style", "name": "owl", "style": "noto"}
    assert [emoji.worded(template, owl) for template in emoji.EMOJI] == [
        "an owl emoji in noto style",
        "an emoji in noto style",
        "an owl emoji",
    ]


def test_variants_of_the_captions(tiny_corpus: Path) -> None:
    art, _ = emoji.read(tiny_corpus, 0, 1)
    names = caption_variants.read_names(tiny_corpus, ["xx"])
    rows = art.drop(["image"]).to_pylist()
    expected = {
        "true": [f"a {r['name']} drawing in {r['style']} style" for r in rows],
        "style silent": [f"a {r['name']} drawing" for r in rows],
        "object silent": [f"a drawing in {r['style']} style" for r in rows],
        "silent": [""] * len(rows),
        # The last object has no name in that language, and keeps its own.
        "in xx": [
            f"a {'' if r['name'] == 'house' else 'x'}{r['name']} drawing in {r['style']} style"
            for r in rows
        ],
    }
    for variant, captions in expected.items():
        assert caption_variants.retold(variant, art, TINY, names) == tuple(captions)
    with pytest.raises(BenchmarkError, match="variant 'loud' is unknown"):
        caption_variants.retold("loud", art, TINY, names)


def test_contexts_are_the_concept_in_company_that_is_not_asked_about(
    tiny_corpus: Path, tiny_study: Study
) -> None:
    cat, red = tiny_study.questions[:2]
    assert cat.prompt == "a cat drawing in red style"
    assert {len(question.company) for question in tiny_study.questions} == {4}
    assert set(cat.contexts) == {
        (f"a cat drawing in {style} style", f"a drawing in {style} style")
        for style in ("blue", "studio")
    }
    assert set(red.contexts) == {  # neither a cat nor a dog, which are asked about
        (f"a {name} drawing in red style", f"a {name} drawing") for name in ("fish", "house")
    }
    art, asked = emoji.read(tiny_corpus, 0, 2)
    again = emoji.questions(art, asked[:1], TINY)
    assert again[0].contexts == cat.contexts  # whoever else is asked about
    # Where captions name nothing, nobody says which article an object has.
    silent = art.set_column(2, "caption", pa.array([""] * len(art)))
    assert not any(question.contexts for question in emoji.questions(silent, asked, TINY))


def test_many_contexts_are_drawn_by_the_pair() -> None:
    names, styles = ([f"{kind}{i}" for i in range(14)] for kind in ("n", "s"))
    art = pa.Table.from_pylist(
        [
            {"name": name, "style": style, "caption": TINY[0].format(a="a", name=name, style=style)}
            for name in names
            for style in styles
        ]
    )
    pairs = [
        {"image_id": f"p{i}", "caption": "a n0 drawing in s0 style", "name": "n0", "style": "s0"}
        for i in range(3)
    ]
    asked = emoji.questions(art, pairs, TINY)
    assert {len(set(question.contexts)) for question in asked} == {emoji.CONTEXTS}
    assert not any("s0" in has for question in asked[::2] for has, _ in question.contexts)
    assert not any("n0" in has for question in asked[1::2] for has, _ in question.contexts)
    assert len({question.contexts for question in asked}) == len(asked)
    shuffled = art.take(np.random.default_rng(0).permutation(len(art)))
    for one, other in zip(asked, emoji.questions(shuffled, pairs, TINY), strict=True):
        assert one.contexts == other.contexts


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_wrong_captions_are_another_objects_in_another_style(
    tiny_corpus: Path, share: float
) -> None:
    art, _ = emoji.read(tiny_corpus, 0, 1)
    whose = caption_variants.captions_of(art, share)
    assert sorted(whose) == list(range(len(art)))
    wrong = np.flatnonzero(whose != np.arange(len(art)))
    assert len(wrong) == round(share * len(art))
    rows = art.drop(["image"]).to_pylist()
    for i in wrong:
        assert rows[i]["name"] != rows[whose[i]]["name"]
        assert rows[i]["style"] != rows[whose[i]]["style"]
    assert np.array_equal(whose, caption_variants.captions_of(art, share))
    assert not np.array_equal(whose, caption_variants.captions_of(art, share, seed=1))


def test_captions_that_cannot_be_wrong_are_refused() -> None:
    art = pa.table({"name": ["cat"] * 4, "style": ["red", "blue", "red", "blue"]})
    with pytest.raises(BenchmarkError, match="no way was found"):
        caption_variants.captions_of(art, 1.0)


def test_corpus_to_train_on(tiny_corpus: Path, tmp_path: Path) -> None:
    caption_variants.write_corpus(tiny_corpus, tmp_path / "new", "wrong", TINY)
    before, after = (pq.read_table(f / "train.parquet") for f in (tiny_corpus, tmp_path / "new"))
    assert before.drop(["caption"]).equals(after.drop(["caption"]))
    assert Counter(before["caption"].to_pylist()) == Counter(after["caption"].to_pylist())
    captions = (table["caption"].to_pylist() for table in (before, after))
    assert sum(a != b for a, b in zip(*captions, strict=True)) == round(0.1 * len(before))
    assert (tmp_path / "new" / "heldout.parquet").is_file()


def test_wrong_captions_tell_picture_from_caption(tiny_study: Study, tiny_corpus: Path) -> None:
    art, _ = emoji.read(tiny_corpus, 0, 2)
    whose = caption_variants.captions_of(art)
    shown = np.stack([question.truth for question in tiny_study.questions], 1).astype(float)
    table = pa.concat_tables(
        caption_variants.meet(tiny_study, whose, name, scores)
        for name, scores in (("by picture", shown), ("by caption", shown[whose]))
    )
    found: dict[tuple[str, str], list[int]] = {}
    for row in table.to_pylist():
        total = found.setdefault((row["method"], row["kind"]), [0, 0])
        total[0] += row["found"]
        total[1] += row["images"]
    wrong = int((shown[whose] != shown).sum())
    assert wrong > 0
    for method, best, worst in (
        ("by picture", "shown only", "named only"),
        ("by caption", "named only", "shown only"),
    ):
        assert found[method, best][0] == found[method, best][1] > 0
        assert found[method, "shown and named"][0] == found[method, "shown and named"][1]
        assert found[method, best][1] + found[method, worst][1] == wrong
    assert any("1.000 of" in line for line in caption_variants.met(table))


def test_variants_run_whole(
    tiny_corpus: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_variants, "named", lambda names: [replace(OURS, name=names[0])])
    table = caption_variants.run(
        tmp_path,
        corpus=str(tiny_corpus),
        model=str(model_folder),
        rows=20,
        pairs=2,
        seeds=1,
        variants=["silent", "wrong"],
        languages=["xx"],
        wording=TINY,
        device="cpu",
        say=lambda line: None,
    )
    variants = ["silent", "wrong", "in xx"]
    assert list(dict.fromkeys(table["study"].to_pylist())) == variants
    rows = [row for row in table.to_pylist() if row["label_free"]]
    methods = {"headwater", *(f"headwater, {name}" for name in caption_variants.LAYERS)}
    assert methods < {row["method"] for row in rows}
    tops = {
        variant: [r["top"] for r in rows if r["study"] == variant and r["method"] == "headwater"]
        for variant in variants
    }
    assert len({str(top) for top in tops.values()}) == 3  # every corpus was ingested anew
    silent = [r for r in rows if r["study"] == "silent" and "BM25" in r["method"]]
    assert {r["average_precision"] for r in silent} != {1.0}
    page = (tmp_path / "caption-variants.md").read_text()
    assert "in xx 0.1" in page.split("does not know: ")[1]  # one word in a caption of six
    assert "| headwater, self-attention | object |" in page
    assert set(pq.read_table(tmp_path / "wrong-captions.parquet")["method"].to_pylist()) > methods


def test_other_captions_change_the_rows_alone(tiny_study: Study) -> None:
    silent = replace(tiny_study.corpus, captions=("",) * len(tiny_study.corpus))
    heard = replace(tiny_study, corpus=silent)
    truly = answer(tiny_study, OURS)
    found, expected = caption_variants.told_otherwise(truly, heard), answer(heard, OURS)
    torch.testing.assert_close(found.scores(), expected.scores())
    assert not torch.allclose(found.features, truly.features, atol=1e-2)


def test_text_shares_run_whole(tiny_corpus: Path, model_folder: Path, tmp_path: Path) -> None:
    table = text_share.run(
        tmp_path,
        corpus=str(tiny_corpus),
        model=str(model_folder),
        rows=12,
        pairs=2,
        seeds=1,
        hits=3,
        batch=16,
        wording=TINY,
        device="cpu",
        say=lambda line: None,
    )
    assert len(table) == 2 * 2 * 3
    page = (tmp_path / "text-share.md").read_text()
    assert "| headwater | object |" in page
    assert (tmp_path / "config.json").is_file()


def test_scores_are_split_as_whole_rows_are(tiny_study: Study) -> None:
    """Against the two sides' own rows of the whole corpus, and against silent rows."""
    answers = answer(tiny_study, OURS)
    engine = Engine(tiny_study.model, OURS.recipe)
    corpus = tiny_study.corpus
    parts = parted(engine, (TEXT_SIDE,)).rows(corpus.x_0, corpus.captions, corpus.keys).features
    silent = engine.rows(corpus.x_0, [""] * len(corpus), corpus.keys).features
    asked = answers.solved()
    whole = answers.features.double() @ asked.mT
    of_text = parts[:, :96].double() @ asked.mT / whole
    without = silent.double() @ asked.mT / whole
    rows = text_share.split(tiny_study, answers, 2)
    assert len(rows) == 2 * len(tiny_study.questions)
    for row in rows:
        place = corpus.keys.index(row["key"]), row["question"]
        assert row["carrier"] == tiny_study.questions[row["question"]].truth[place[0]]
        assert row["score"] == pytest.approx(float(whole[place]), rel=1e-4)
        assert row["text_share"] == pytest.approx(float(of_text[place]), rel=1e-3, abs=1e-4)
        assert row["without_caption"] == pytest.approx(float(without[place]), rel=1e-3, abs=1e-4)


def test_pieces_sum_to_the_default(tiny_study: Study) -> None:
    engine = Engine(tiny_study.model, OURS.recipe)
    split = parted(engine, (TEXT_SIDE,))
    answers = answer(tiny_study, OURS)
    rows, losses = pieces.row_pieces(split, tiny_study.corpus, tiny_study.batch)
    assert rows.shape == (len(tiny_study.corpus), 3, 2, 96)
    torch.testing.assert_close(rows.sum((1, 2)), answers.features, rtol=1e-4, atol=1e-5)
    # The weight of `das` is the training loss.
    weights = Engine(tiny_study.model, replace(OURS.recipe, method="das")).rows(
        tiny_study.corpus.x_0, tiny_study.corpus.captions, tiny_study.corpus.keys
    )
    torch.testing.assert_close(losses / losses.mean(), weights.weights / weights.weights.mean())
    asked = pieces.query_pieces(tiny_study, split, tiny_study.questions)
    expected = query_rows(tiny_study, engine, "contrast")
    torch.testing.assert_close(asked.sum((2, 3)), expected, rtol=1e-3, atol=1e-4)
    other = beyond.other_sides(tiny_study.questions)
    assert [(q.prompt, q.contrast) for q in other[:2]] == [
        ("a cat drawing", ""),
        ("a drawing in red style", ""),
    ]
    assert not torch.allclose(
        pieces.query_pieces(tiny_study, split, other).sum((2, 3)), expected, atol=1e-2
    )


def test_blocks_of_curvature_equal_dense_algebra() -> None:
    """Answers summed over blocks are those of the block-diagonal matrix."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 2, 8, generator=generator) * torch.tensor([1.0, 3.0])[:, None]
    rows = torch.randn(4, 2, 2, 8, generator=generator)
    parts = tuple(
        Answers(
            OURS,
            features[:, i],
            torch.ones(30),
            rows[:, :, i],
            beyond.curvature_of(features[:, i]),
            3.0,
            1.0,
            2.0,
        )
        for i in range(2)
    )
    together = beyond.Combined(OURS, parts, alike=False)
    expected = torch.zeros(30, 4, dtype=torch.float64)
    for i in range(2):
        phi, q = features[:, i].double(), rows[:, :, i].double().mean(1)
        lam = 0.5 * phi.square().sum() / 30
        expected += phi @ torch.linalg.solve(phi.mT @ phi + lam * torch.eye(8).double(), q.mT)
    torch.testing.assert_close(together.scores(0.5).double(), expected, rtol=1e-4, atol=1e-5)
    assert (together.damping, together.ingest_seconds, together.query_seconds) == (3.0, 1.0, 2.0)
    alike = beyond.Combined(OURS, parts[:1], alike=True, dampings=(0.5, 2.0)).scores(1.0)
    by_hand = [parts[0].scores(damping) for damping in (0.5, 2.0)]
    by_hand = [(scores - scores.mean(0)) / scores.std(0) for scores in by_hand]
    torch.testing.assert_close(alike, by_hand[0] + by_hand[1])


def test_information_of_noise_levels_against_a_plain_loop() -> None:
    asked = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    asked[:, :, 1] += 3 * torch.eye(3, 5).double()[:, None]  # questions differ at level 1
    found = pieces.informative(asked)
    for level in range(2):
        same, across = [], []
        vectors = {(q, s): asked[q, s, level] for q in range(3) for s in range(4)}
        for a, x in vectors.items():
            for b, y in vectors.items():
                if a != b:
                    (same if a[0] == b[0] else across).append(
                        float(torch.cosine_similarity(x, y, dim=0))
                    )
        assert float(found[level]) == pytest.approx(np.mean(same) - np.mean(across))
    assert found[1] > found[0]


def test_ideas_run_whole(
    tiny_corpus: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(OURS, name=beyond.PLAIN, recipe=replace(OURS.recipe, dim=32, timesteps=2))
    monkeypatch.setattr(beyond, "named", lambda names: [small])
    table = beyond.run(
        tmp_path,
        corpus=str(tiny_corpus),
        model=str(model_folder),
        rows=16,
        pairs=2,
        seeds=2,
        batch=16,
        controls=2,
        wording=TINY,
        device="cpu",
        say=lambda line: None,
    )
    rows = [row for row in table.to_pylist() if row["label_free"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    assert methods[0] == beyond.PLAIN
    assert len(methods) >= 20
    # Several curvatures or dampings together have no one effective dimension.
    without = {row["method"] for row in rows if row["effective"] is None}
    assert without == {
        "several lambda averaged",
        "a curvature for each noise level",
        "a curvature for each side",
        "with guidance features",
    }
    page = (tmp_path / "beyond.md").read_text().split("## Gains")[1]
    assert [line.split(" | ")[0][2:] for line in page.splitlines() if line.startswith("| ")][
        1:
    ] == methods[1:]


def test_controls_are_about_other_objects(tiny_corpus: Path, tiny_study: Study) -> None:
    art, asked = emoji.read(tiny_corpus, 0, 2)
    pairs = beyond.control_pairs(art, asked, 5)
    assert len(pairs) == 5
    assert {pair["name"] for pair in pairs} <= {"fish", "house"}
    control = replace(tiny_study, questions=emoji.questions(art, pairs, TINY))
    rows = torch.randn(10, 3, 4)
    centre = beyond.centre(control, rows, tiny_study)
    assert centre.shape == (4, 1, 4)
    torch.testing.assert_close(centre[0, 0], rows[0::2].mean((0, 1)))  # objects
    torch.testing.assert_close(centre[3, 0], rows[1::2].mean((0, 1)))  # styles
    assert np.isfinite(latent_scores(tiny_study)).all()


@pytest.mark.parametrize(
    ("benchmark", "changes", "stop"),
    [
        (emoji, {"methods": ["a", "b"]}, "emoji a"),
        (
            caption_variants,
            {"methods": ["a"], "languages": [], "variants": ["true", "wrong"]},
            "wrong a, to_k",
        ),
        (beyond, {"controls": 2}, "emoji raw gradients"),
        (text_share, {"methods": ["a", "b"], "hits": 2}, "a: "),
    ],
)
def test_a_broken_off_run_loses_nothing(
    benchmark: Any,
    changes: dict[str, Any],
    stop: str,
    tiny_corpus: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = replace(OURS.recipe, dim=32, timesteps=2)
    quick = {"a": recipe, "b": replace(recipe, method="das")}
    named = lambda names: [Configuration(n, quick.get(n, recipe)) for n in names]  # noqa: E731
    monkeypatch.setattr(benchmark, "named", named)
    for name in ("plot_lambda", "plot_cost"):  # tested with the record, and slow
        monkeypatch.setattr(record, name, lambda *args: None)
    found: list[str] = []  # configurations whose rows were made
    told_otherwise = caption_variants.told_otherwise

    def answered(study: Study, configuration: Configuration, **rest: Any) -> Answers:
        found.append(configuration.name)
        return answer(study, configuration, **rest)

    def told(answers: Answers, study: Study) -> Answers:
        found.append(f"{study.name} {answers.configuration.name}")
        return told_otherwise(answers, study)

    monkeypatch.setattr(measure, "__kwdefaults__", measure.__kwdefaults__ | {"answering": answered})
    monkeypatch.setattr(caption_variants, "told_otherwise", told)
    monkeypatch.setattr(beyond, "OTHER_LAYERS", {})  # they are many
    for module in (beyond, caption_variants, text_share):
        monkeypatch.setattr(module, "answer", answered)

    def run(out: str, say: Any) -> pa.Table:
        given = {"corpus": str(tiny_corpus), "model": str(model_folder), "rows": 16, "pairs": 2}
        given |= {"seeds": 1, "batch": 16, "wording": TINY, "device": "cpu", **changes}
        return benchmark.run(tmp_path / out, say=say, **given)

    whole = run("whole", lambda line: None)
    unbroken = found.copy()
    found.clear()
    with pytest.raises(Stopped):
        run("broken", stopping_at(stop))
    assert json.loads((tmp_path / "broken/config.json").read_text())["finished"] is False
    if benchmark in (emoji, beyond):  # what there is can be read
        page = next((tmp_path / "broken").glob("*.md")).read_text()
        assert "has not ended" in page
        assert f"| {stop.removeprefix('emoji ')} |" in page
    before = found.copy()
    found.clear()
    said: list[str] = []
    resumed = run("broken", said.append)
    assert "the run goes on" in said[0]
    # What was asked in both sittings is only what other variants of a method still need.
    assert set(before) & set(found) <= {"a, to_k, to_v"}
    assert set(before) | set(found) == set(unbroken)
    seconds = [name for name in whole.column_names if name.endswith("_seconds")]
    assert resumed.drop(seconds).equals(whole.drop(seconds))
    assert json.loads((tmp_path / "broken/config.json").read_text())["finished"] is True
    pages = [next((tmp_path / out).glob("*.md")).read_text() for out in ("whole", "broken")]
    tables = [[line for line in page.splitlines() if line.startswith("|")] for page in pages]
    assert tables[0] == tables[1]
    assert not (tmp_path / "broken" / "parts").exists()
