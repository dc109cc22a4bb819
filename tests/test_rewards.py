"""Query gradients: definitions, and the one sign that all of them share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from headwater.attribution import (
    Engine,
    Model,
    ModelError,
    Recipe,
    Reward,
    contrast_rows,
    image_rows,
    reward_rows,
    slider_rows,
)

PROMPTS, CONTRASTS, KEYS = ["a red cat"] * 2, ["a drawing"] * 2, ["q0", "q1"]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


def engine_for(model: Model, method: str) -> Engine:
    recipe = Recipe(method=method, projection="identity", timesteps=2, steps=6)
    return Engine(model, recipe)


def pictures() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def test_image_query_is_the_training_row(model: Model) -> None:
    engine = engine_for(model, "dtrak")
    rows = image_rows(engine, pictures(), PROMPTS, KEYS)
    assert torch.equal(rows, engine.rows(pictures(), PROMPTS, KEYS).features)


@pytest.mark.parametrize("method", ["dtrak", "dsm", "das", "cfg", "dps"])
def test_contrast_is_the_difference_at_the_same_points(model: Model, method: str) -> None:
    engine = engine_for(model, method)
    lacking, _ = engine.states(CONTRASTS)
    expected = torch.zeros(2, engine.projector.dim)
    for point in engine.points(pictures(), PROMPTS, KEYS):
        for sign, states in ((1, point.states), (-1, lacking)):
            at = replace(point, states=states)
            row, norm, _ = engine.raw_gradient(
                at, engine.method.cotangent, engine.method.through_input
            )
            expected += sign * row / norm[:, None]
    found = contrast_rows(engine, pictures(), PROMPTS, CONTRASTS, KEYS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    swapped = contrast_rows(engine, pictures(), CONTRASTS, CONTRASTS, KEYS)
    assert not swapped.any()


FURTHER = (
    (["a cat", "a dog"], ["", ""]),
    (["a blue cat", "the fish"], ["a blue drawing"] * 2),
    (["the cat"] * 2, CONTRASTS),  # a contrast that another pair has, too
)


@pytest.mark.parametrize("method", ["dtrak", "dsm"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_concept_in_several_contexts_is_the_mean_of_their_contrasts(
    model: Model, count: int, method: str
) -> None:
    engine = engine_for(model, method)
    further = FURTHER[:count]
    found = contrast_rows(engine, pictures(), PROMPTS, CONTRASTS, KEYS, further)
    pairs = [(PROMPTS, CONTRASTS), *further]
    total = torch.zeros(found.shape, dtype=torch.float64)
    for point in engine.points(pictures(), PROMPTS, KEYS):
        for prompts, contrasts in pairs:
            for said, sign in ((prompts, 1), (contrasts, -1)):
                states, _ = engine.states(said)
                row, norm, _ = engine.raw_gradient(
                    replace(point, states=states), engine.method.cotangent
                )
                total += sign * (row / norm[:, None]).double() / len(pairs)
    torch.testing.assert_close(found.double(), total, rtol=1e-4, atol=1e-6)


def test_texts_of_several_pairs_are_heard_once_and_those_that_cancel_never(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(model, "dtrak")
    heard: list[object] = []
    gradient = Engine.method_gradient

    def counted(self: Engine, point: Any) -> Any:
        heard.append(point.states)
        return gradient(self, point)

    monkeypatch.setattr(Engine, "method_gradient", counted)
    nothing = ["", ""]
    plain = contrast_rows(engine, pictures(), PROMPTS, nothing, KEYS)
    assert len(heard) == 2 * len(engine.timesteps)
    heard.clear()
    same = contrast_rows(engine, pictures(), PROMPTS, nothing, KEYS, [(PROMPTS, nothing)])
    assert len(heard) == 2 * len(engine.timesteps)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6)
    heard.clear()
    # Prompt - contrast + contrast - nothing: the middle is not looked at, the rest is halved.
    chain = contrast_rows(engine, pictures(), PROMPTS, CONTRASTS, KEYS, [(CONTRASTS, nothing)])
    assert len(heard) == 2 * len(engine.timesteps)
    torch.testing.assert_close(chain, plain / 2, rtol=1e-5, atol=1e-6)
    heard.clear()
    assert not contrast_rows(
        engine, pictures(), PROMPTS, CONTRASTS, KEYS, [(CONTRASTS, PROMPTS)]
    ).any()
    assert not heard


def test_slider_is_the_reward_of_the_prompts_likelihood_ratio(model: Model) -> None:
    # grad log p(c | x_t) / p(c- | x_t) = -(e(c) - e(c-)) / s_t: a reward linear in x_t with that
    # gradient must give the slider's rows, sign included.
    engine = engine_for(model, "dtrak")
    lacking, _ = engine.states(CONTRASTS)
    points = list(engine.points(pictures(), PROMPTS, KEYS))
    slider = slider_rows(engine, points, CONTRASTS)
    total = torch.zeros_like(slider)
    for point in points:
        with torch.no_grad():
            _, s = model.coefficients(point.t)
            slope = -(
                model.noise(point.x_t, point.t, point.states)
                - model.noise(point.x_t, point.t, lacking)
            )
        ratio = Reward(lambda x, g=slope / s: (x * g).flatten(1).sum(1), of="x_t")
        total += reward_rows(engine, [point], ratio)
    torch.testing.assert_close(slider, total, rtol=1e-4, atol=1e-4)


def test_reward_of_the_training_picture_is_its_dps_row(model: Model) -> None:
    # R = -||xhat0 - x_0||^2 rewards drawing x_0: after unit scaling that is the row of x_0 itself.
    engine = engine_for(model, "dps")
    row = engine.rows(pictures(), PROMPTS, KEYS).features
    pixel = replace(model, vae=None)  # reward on the predicted sample itself
    flat = Engine(pixel, engine.recipe)
    points = list(engine.points(pictures(), PROMPTS, KEYS))
    reward = Reward(lambda x: -(x - pictures()).square().flatten(1).sum(1), of="image")
    torch.testing.assert_close(reward_rows(flat, points, reward), row, rtol=1e-4, atol=1e-4)


def test_reward_sees_the_decoded_picture(model: Model) -> None:
    seen = []

    def darkness(images: torch.Tensor) -> torch.Tensor:
        seen.append(images.shape)
        return -images.mean(dim=(1, 2, 3))

    engine = engine_for(model, "dtrak")
    points = engine.points(pictures(), PROMPTS, KEYS)
    rows = reward_rows(engine, points, Reward(darkness))
    assert seen == [(2, 3, 16, 16)] * 2
    assert rows.any()


def test_reward_must_be_differentiable(model: Model) -> None:
    engine = engine_for(model, "dtrak")
    with pytest.raises(ModelError, match="not differentiable"):
        reward_rows(
            engine, engine.points(pictures(), PROMPTS, KEYS), Reward(lambda x: x.detach().sum())
        )
    with pytest.raises(ModelError, match="x_t or image"):
        Reward(lambda x: x.sum(), of="latent")
