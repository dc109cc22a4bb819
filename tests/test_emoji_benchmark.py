"""The emoji benchmark on miniature corpora."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import Stopped, stopping_at
from PIL import Image
from tiny_art import DEMO, OURS, TINY

from headwater.benchmarks import beyond, caption_variants, emoji, record, text_share
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.measure import latent_scores, measure, ranking_metrics
from headwater.benchmarks.study import Answers, Configuration, Study, answer
from headwater.demo.run import demo_model


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
