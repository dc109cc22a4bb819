"""Shares of a score: parts sum to the rows, and equal a dense split of unprojected gradients."""

from __future__ import annotations

import re

import pytest
import tiny
import torch

from headwater.attribution import Engine, Execution, Model, ModelError, Recipe, contrast_rows
from headwater.attribution.shares import TEXT_SIDE, parted, text_share

CAPTIONS = ["a red cat", "the dog in a house", "a fish by studio"]
KEYS = ["one", "two", "three"]
PATTERNS = (r"attn2\.to_[kv]\.", r"attn2\.to_q\.")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


def samples(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def recipe(**settings: object) -> Recipe:
    return Recipe(**{"timesteps": 2, "steps": 6, "dim": 64, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("projection", ["sjlt", "mask", "factored"])
@pytest.mark.parametrize("method", ["dtrak", "dps"])
def test_parts_sum_to_the_rows(model: Model, projection: str, method: str) -> None:
    engine = Engine(model, recipe(projection=projection, method=method))
    rows = engine.rows(samples(), CAPTIONS, KEYS)
    split = parted(engine, PATTERNS).rows(samples(), CAPTIONS, KEYS)
    parts = split.features.view(3, 3, engine.projector.dim)
    torch.testing.assert_close(parts.sum(1), rows.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(split.norms, rows.norms)
    assert (parts.norm(dim=2) > 0).all()
    queries = contrast_rows(engine, samples(), CAPTIONS, ["a dog"] * 3, KEYS)
    asked = contrast_rows(parted(engine, PATTERNS), samples(), CAPTIONS, ["a dog"] * 3, KEYS)
    torch.testing.assert_close(
        asked.view(3, 3, -1).sum(1), queries, rtol=1e-4, atol=1e-5 * float(queries.abs().max())
    )


def test_share_equals_a_dense_split_of_the_gradient(model: Model) -> None:
    """Unprojected rows: the text's part is the rows with every other coordinate set to zero."""
    engine = Engine(model, recipe(projection="identity"))
    rows = engine.rows(samples(), CAPTIONS, KEYS).features.double()
    of_text = torch.zeros(engine.selection.size, dtype=torch.float64)
    for slot in engine.selection.slots:
        if re.search(r"attn2\.to_(k|v)\.", slot.name):
            of_text[slot.offset : slot.offset + slot.size] = 1
    assert 0 < of_text.sum() < len(of_text)
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, engine.selection.size, generator=generator, dtype=torch.float64)
    expected = (queries * of_text) @ rows.mT / (queries @ rows.mT)
    found = text_share(engine, samples(), CAPTIONS, KEYS, queries)
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_share_is_all_or_nothing_where_one_side_is_selected(model: Model) -> None:
    queries = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    text = Engine(model, recipe(parameters=r"attn2\.to_[kv]\."))
    share = text_share(text, samples(), CAPTIONS, KEYS, queries)
    assert torch.equal(share, torch.ones(2, 3, dtype=torch.float64))
    picture = Engine(model, recipe(parameters=r"attn2\.to_(q|out)"))
    with pytest.raises(ModelError, match=re.escape(f"belongs to the part {TEXT_SIDE!r}")):
        text_share(picture, samples(), CAPTIONS, KEYS, queries)


def test_joint_attention_has_a_text_side() -> None:
    pipeline, captions = tiny.KINDS["sd3"]
    model = Model.from_pipeline(pipeline(), device="cpu")
    engine = Engine(model, recipe())
    shape = (2, *model.sample_shape)
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    names = {slot.name.split(".")[-2] for slot in engine.selection.slots if "add" in slot.name}
    assert names == {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    parts = parted(engine, (TEXT_SIDE,)).rows(x_0, captions, KEYS[:2]).features.view(2, 2, -1)
    rows = engine.rows(x_0, captions, KEYS[:2]).features
    torch.testing.assert_close(parts.sum(1), rows, rtol=1e-4, atol=1e-5)
    assert (parts.norm(dim=2) > 0).all()


def test_a_compiled_engine_is_left_as_it_was(model: Model) -> None:
    engine = Engine(model, recipe(), Execution(compile=True))
    split = parted(engine, PATTERNS)
    assert engine.projector.dim == 64
    assert split.projector.dim == 3 * 64
    before = parted(Engine(model, recipe()), PATTERNS).rows(samples(), CAPTIONS, KEYS).features
    assert torch.equal(split.rows(samples(), CAPTIONS, KEYS).features, before)
