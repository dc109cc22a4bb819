"""The ideas beyond the default, on miniature corpora."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_art import OURS, TINY

from headwater.attribution import Engine, parted
from headwater.attribution.shares import TEXT_SIDE
from headwater.benchmarks import beyond, emoji, pieces
from headwater.benchmarks.measure import latent_scores
from headwater.benchmarks.study import Answers, Study, answer, query_rows


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
