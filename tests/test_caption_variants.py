"""Influence or caption matching: other captions and shares of the text, on miniature corpora."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_art import OURS, TINY

from headwater.attribution import Engine, parted
from headwater.attribution.shares import TEXT_SIDE
from headwater.benchmarks import caption_variants, emoji, text_share
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.study import Study, answer


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
