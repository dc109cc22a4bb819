"""Sampling, inversion and noise against diffusers and against themselves."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from headwater.attribution import Engine, Model, Recipe, ddim_grid, generation_path, seeded_noise
from headwater.attribution.trajectory import guided_output, inversion_path, kept


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
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


def drawn_by_diffusers(
    pipeline: Any, captions: list[str], start: Tensor, guidance: float, steps: int
) -> Tensor:
    """What the pipeline's own call makes of the noise `start`."""
    pipeline.set_progress_bar_config(disable=True)
    common: dict[str, Any] = {"num_inference_steps": steps, "output_type": "latent"}
    name = type(pipeline).__name__
    if name == "FluxPipeline":
        if pipeline.transformer.config.guidance_embeds:
            common |= {"guidance_scale": guidance}
        else:
            common |= {"negative_prompt": [""] * len(captions), "true_cfg_scale": guidance}
        packed = pipeline._pack_latents(start, *start.shape)
        found = pipeline(captions, latents=packed, height=16, width=16, **common).images
        return pipeline._unpack_latents(found, 16, 16, pipeline.vae_scale_factor)
    if name.startswith("PixArt"):
        common |= {"use_resolution_binning": False, "clean_caption": False}
    return pipeline(captions, latents=start, guidance_scale=guidance, **common).images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize(
    "kind", ["sdxl", "sd3", "sd3-clip", "flux", "flux-plain", "pixart", "pixart-sigma"]
)
def test_generation_equals_every_text_pipeline(kind: str, guidance: float) -> None:
    make, captions = tiny.KINDS[kind]
    pipeline = make()
    if kind == "pixart":  # it tells sizes to a transformer of this size alone
        pipeline.transformer.register_to_config(sample_size=128)
    model = Model.from_pipeline(pipeline, device="cpu")
    start = seeded_noise(0, "x", (2, model.sample_shape[0], 8, 8))
    states, null = model.encode_prompts(captions), model.encode_prompts(["", ""])
    grid = ddim_grid(model, 6)
    found, points = generation_path(
        model, start, states, null, grid=grid, timesteps=grid, guidance=guidance
    )
    expected = drawn_by_diffusers(pipeline, captions, start, guidance, 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for point in points:
        a, s = model.coefficients(point.t)
        torch.testing.assert_close(point.x_t, a * point.x_0 + s * point.eps, rtol=1e-4, atol=1e-5)


def test_generation_equals_the_pipeline_of_classes() -> None:
    pipeline = tiny.dit()
    pipeline.set_progress_bar_config(disable=True)
    model = Model.from_pipeline(pipeline, device="cpu")
    start = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(5))
    states, null = model.encode_prompts(["1", "fish"]), model.encode_prompts(["", ""])
    grid = ddim_grid(model, 6)
    for guidance in (1.0, 4.0):
        x_0, _ = generation_path(
            model, start, states, null, grid=grid, timesteps=[], guidance=guidance
        )
        with torch.no_grad():
            found = (model.decode(x_0) / 2 + 0.5).clamp(0, 1)
        expected = pipeline(
            class_labels=[1, 2],
            guidance_scale=guidance,
            num_inference_steps=6,
            generator=torch.manual_seed(5),
            output_type="pt",
        ).images
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["class", "class-number"])
def test_generation_of_a_class_equals_the_schedulers_loop(kind: str) -> None:
    make, captions = tiny.KINDS[kind]
    pipeline = make()
    model = Model.from_pipeline(pipeline, device="cpu")
    start = x = seeded_noise(0, "x", (2, 3, 8, 8))
    states, null = model.encode_prompts(captions), model.encode_prompts(["", ""])
    assert null is None
    # Without a class that is none there is nothing to guide against: guidance changes nothing.
    found, _ = generation_path(
        model, start, states, null, grid=ddim_grid(model, 6), timesteps=[], guidance=7.5
    )
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(6)
    labels = torch.tensor([int(caption) for caption in captions])
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = pipeline.unet(x, t, class_labels=labels).sample
            x = scheduler.step(output, t, x, use_clipped_model_output=True)[0]
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def zero_terminal_snr() -> Any:
    """Stable Diffusion 2.x as retrained to begin at pure noise: a = 0 at the last level."""
    pipeline = tiny.stable_diffusion(prediction_type="v_prediction")
    settings = dict(pipeline.scheduler.config)
    settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = DDIMScheduler(**{k: v for k, v in settings.items() if k[0] != "_"})
    return pipeline


def test_generation_from_pure_noise_equals_the_pipeline() -> None:
    pipeline = zero_terminal_snr()
    model = Model.from_pipeline(pipeline, device="cpu")
    grid = ddim_grid(model, 5)
    a, _ = model.coefficients(torch.tensor([grid[-1]]))
    assert float(a) == 0
    start = seeded_noise(0, "x", (2, 4, 8, 8))
    states, null = model.encode_prompts(["a cat"] * 2), model.encode_prompts([""] * 2)
    found, _ = generation_path(model, start, states, null, grid=grid, timesteps=[], guidance=4.0)
    expected = drawn_by_diffusers(pipeline, ["a cat"] * 2, start, 4.0, 5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["dtrak", "dps"])
@pytest.mark.parametrize("make", [zero_terminal_snr, tiny.stable_diffusion_3])
def test_level_of_pure_noise_teaches_nothing_and_spoils_nothing(make: Any, method: str) -> None:
    model = Model.from_pipeline(make(), device="cpu")
    recipe = Recipe(method=method, projection="identity", timesteps=3, steps=3)
    engine = Engine(model, recipe)
    x_0 = seeded_noise(0, "picture", (2, *model.sample_shape))
    *others, last = engine.points(x_0, ["a cat", "a dog"], ["one", "two"])
    a, _ = model.coefficients(last.t)
    assert not a.any()
    through = engine.method.through_input
    row, norm, e = engine.gradient(last, engine.method.cotangent, through)
    assert torch.equal(e, last.x_t)  # whatever the output is
    assert not norm.any()
    assert not row.any()
    for point in others:
        assert engine.gradient(point, engine.method.cotangent, through)[1].all()
    assert engine.rows(x_0, ["a cat", "a dog"], ["one", "two"]).features.isfinite().all()


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


@pytest.mark.parametrize(
    ("make", "guidance"),
    [
        (tiny.stable_diffusion, 2.0),
        (lambda: tiny.stable_diffusion(prediction_type="v_prediction"), 2.0),
        (zero_terminal_snr, 1.0),
        (tiny.stable_diffusion_3, 1.0),
        (tiny.stable_diffusion_3, 2.0),
        (tiny.flux, 2.0),
    ],
    ids=["epsilon", "velocity", "zero-snr", "flow", "flow-guided", "flow-distilled"],
)
def test_inversion_then_generation_returns_the_sample(make: Any, guidance: float) -> None:
    model = Model.from_pipeline(make(), device="cpu")
    x_0 = seeded_noise(0, "picture", (2, *model.sample_shape))
    states, null = model.encode_prompts(["a cat"] * 2), model.encode_prompts([""] * 2)
    errors = []
    for steps in (25, 250):
        grid = ddim_grid(model, steps)
        *_, last = inversion_path(
            model, x_0, states, null, grid=grid, timesteps=grid[-1:], guidance=guidance
        )
        back, _ = generation_path(
            model, last.x_t, states, null, grid=grid, timesteps=[], guidance=guidance
        )
        errors.append(float((back - x_0).norm() / x_0.norm()))
    assert errors[1] < errors[0] < 0.5
    assert errors[1] < 0.05


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_equals_the_inverse_scheduler(prediction_type: str) -> None:
    pipeline = tiny.stable_diffusion(prediction_type=prediction_type)
    model = Model.from_pipeline(pipeline, device="cpu")
    start = x = seeded_noise(0, "picture", (2, 4, 8, 8))
    states = model.encode_prompts(["a cat", "a dog"])
    assert states is not None
    grid = ddim_grid(model, 10)
    *_, last = inversion_path(model, start, states, None, grid=grid, timesteps=grid, guidance=1.0)
    scheduler = DDIMInverseScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    assert grid == scheduler.timesteps.tolist()
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t, **states.tensors).sample, t, x).prev_sample
    torch.testing.assert_close(last.x_t, x, rtol=1e-4, atol=1e-4)


def test_inversion_of_a_flow_is_euler_steps_backwards() -> None:
    pipeline = tiny.stable_diffusion_3()
    model = Model.from_pipeline(pipeline, device="cpu")
    start = x = seeded_noise(0, "picture", (2, 16, 8, 8))
    states = model.encode_prompts(["a cat", "a dog"])
    assert states is not None
    grid = ddim_grid(model, 5)
    *_, last = inversion_path(model, start, states, None, grid=grid, timesteps=grid, guidance=1.0)
    pipeline.scheduler.set_timesteps(5)
    sigmas = pipeline.scheduler.sigmas.flip(0)
    with torch.no_grad():
        for sigma, following in pairwise(sigmas):
            time = (1000 * following).expand(2)
            u = pipeline.transformer(x, timestep=time, **states.tensors).sample
            x = x + (following - sigma) * u
    assert float(sigmas[-1]) == 1
    torch.testing.assert_close(last.x_t, x, rtol=1e-4, atol=1e-4)


def test_distilled_guidance_is_heard_in_one_pass() -> None:
    model = Model.from_pipeline(tiny.flux(), device="cpu")
    states, null = model.encode_prompts(["a cat"]), model.encode_prompts([""])
    assert states is not None
    assert states.tensors["guidance"].tolist() == [1.0]
    x, t = seeded_noise(0, "x", (1, 4, 8, 8)), torch.tensor([ddim_grid(model, 4)[1]])
    found = [guided_output(model, x, t, states, null, scale) for scale in (1.0, 5.0)]
    assert torch.equal(found[0], model.output(x, t, states))
    assert torch.equal(found[1], model.output(x, t, states.replaced("guidance", 5.0)))
    assert not torch.allclose(found[0], found[1], atol=1e-4)


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
