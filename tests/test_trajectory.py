"""Sampling, inversion and noise against diffusers and against themselves."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from headwater.attribution import Engine, Model, Recipe, ddim_grid, generation_path, seeded_noise
from headwater.attribution.trajectory import inversion_path, kept


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_generation_equals_the_diffusers_pipeline(prediction_type: str, guidance: float) -> None:
    pipeline = tiny.stable_diffusion(prediction_type=prediction_type)
    pipeline.set_progress_bar_config(disable=True)
    model = Model.from_pipeline(pipeline, device="cpu")
    start = seeded_noise(0, "x", (2, 4, 8, 8))
    states, null = model.encode_prompts(["a cat"] * 2), model.encode_prompts([""] * 2)
    grid = ddim_grid(model, 10)
    found, points = generation_path(
        model, start, states, null, grid=grid, timesteps=grid[::3], guidance=guidance
    )
    expected = pipeline(
        ["a cat"] * 2,
        latents=start,
        num_inference_steps=10,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [int(point.t[0]) for point in points] == grid[::3]
    for point in points:  # x_t = a x_0 + s eps must hold with the eps that a point claims
        a, s = model.coefficients(point.t)
        torch.testing.assert_close(point.x_t, a * point.x_0 + s * point.eps, rtol=1e-4, atol=1e-5)


def test_clipping_scheduler_equals_diffusers() -> None:
    pipeline = tiny.pixel_diffusion()
    assert pipeline.scheduler.config.clip_sample
    model = Model.from_pipeline(pipeline, device="cpu")
    start = x = seeded_noise(0, "x", (2, 3, 8, 8))
    grid = ddim_grid(model, 8)
    found, _ = generation_path(model, start, None, None, grid=grid, timesteps=[], guidance=1.0)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, use_clipped_model_output=True)[0]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_inversion_then_generation_returns_the_sample() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    x_0 = seeded_noise(0, "picture", (2, 4, 8, 8))
    states, null = model.encode_prompts(["a cat"] * 2), model.encode_prompts([""] * 2)
    errors = []
    for steps in (25, 250):
        grid = ddim_grid(model, steps)
        *_, last = inversion_path(
            model, x_0, states, null, grid=grid, timesteps=grid[-1:], guidance=2.0
        )
        back, _ = generation_path(
            model, last.x_t, states, null, grid=grid, timesteps=[], guidance=2.0
        )
        errors.append(float((back - x_0).norm() / x_0.norm()))
    assert errors[1] < errors[0] < 0.5
    assert errors[1] < 0.05


def test_noise_depends_on_seed_and_key_alone() -> None:
    one = seeded_noise(3, "image-7", (2, 4))
    assert torch.equal(one, seeded_noise(3, "image-7", (2, 4)))
    assert not torch.equal(one, seeded_noise(3, "image-8", (2, 4)))
    assert not torch.equal(one, seeded_noise(4, "image-7", (2, 4)))
    many = torch.stack([seeded_noise(0, str(i), (64,)) for i in range(500)])
    assert abs(float(many.mean())) < 0.03
    assert abs(float(many.var()) - 1) < 0.04


def test_kept_levels_are_spread_over_the_grid() -> None:
    grid = list(range(1, 1000, 20))
    assert kept(grid, 10) == [41, 141, 241, 341, 441, 541, 641, 741, 841, 941]
    assert kept(grid, 50) == grid
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    assert Engine(model, Recipe(parameters="attn2")).timesteps == kept(ddim_grid(model, 50), 10)
