"""Loading: any sampler, fingerprints of what matters, refusals of what is not supported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from headwater.attribution import (
    Engine,
    Model,
    ModelError,
    Recipe,
    ddim_grid,
    generation_path,
    seeded_noise,
)


def test_pipeline_saved_with_another_sampler_draws_unclipped_latents(tmp_path: Path) -> None:
    drawn = {}
    for kind in (
        None,
        DDPMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ):
        pipeline = tiny.stable_diffusion()
        if kind is not None:
            schedule = {k: v for k, v in tiny.SCHEDULE.items() if k[:4] == "beta"} | {
                "steps_offset": 1
            }
            pipeline.scheduler = kind(**schedule)
        model = Model.from_pretrained(tiny.saved(pipeline, tmp_path / str(kind)), device="cpu")
        states, null = model.encode_prompts(["a cat"]), model.encode_prompts([""])
        noise = seeded_noise(0, "x", (1, 4, 8, 8))
        drawn[kind], _ = generation_path(
            model, noise, states, null, grid=ddim_grid(model, 20), timesteps=[], guidance=5.0
        )
    reference = drawn.pop(None)
    assert reference.abs().max() > 1.5
    for kind, x_0 in drawn.items():
        # Offsets of the grid and of the last level differ a little; clipping would differ wholly.
        assert torch.cosine_similarity(x_0.flatten(), reference.flatten(), dim=0) > 0.9, kind
        assert x_0.abs().max() > 1.5, kind


def test_fingerprint_names_the_part_that_differs() -> None:
    base = Model.from_pipeline(tiny.stable_diffusion(), device="cpu").fingerprint
    assert base == Model.from_pipeline(tiny.stable_diffusion(), device="cpu").fingerprint

    def changed(part: str, **settings: object) -> set[str]:
        pipeline = tiny.stable_diffusion()
        getattr(pipeline, part).register_to_config(**settings)
        other = Model.from_pipeline(pipeline, device="cpu").fingerprint
        return {name for name in base if base[name] != other[name]}

    assert changed("vae", scaling_factor=0.5) == {"vae"}
    assert changed("unet", norm_eps=1e-3) == {"denoiser"}
    pipeline = tiny.stable_diffusion()
    pipeline.scheduler = DDIMScheduler(timestep_spacing="trailing", **tiny.SCHEDULE)
    other = Model.from_pipeline(pipeline, device="cpu").fingerprint
    assert {name for name in base if base[name] != other[name]} == {"scheduler"}
    pipeline = tiny.stable_diffusion()
    pipeline.tokenizer = tiny.word_tokenizer(length=6)
    other = Model.from_pipeline(pipeline, device="cpu").fingerprint
    assert {name for name in base if base[name] != other[name]} == {"tokenizer"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"in_channels": 9}, "takes 9 channels"),
        ({"sample_size": None}, "sample_size"),
    ],
)
def test_unsupported_denoiser_is_refused(settings: dict[str, object], message: str) -> None:
    pipeline = tiny.stable_diffusion()
    pipeline.unet.register_to_config(**settings)
    with pytest.raises(ModelError, match=message):
        Model.from_pipeline(pipeline, device="cpu")


def test_recipe_and_model_must_have_the_same_precision() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu", dtype="bfloat16")
    with pytest.raises(ModelError, match="loaded as bfloat16"):
        Engine(model, Recipe(dtype="float32"))
    assert Engine(model, Recipe(dtype="bfloat16")).model is model


def test_what_the_recipe_leaves_open_follows_the_model() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    recipe = Engine(model, Recipe(method="dps")).recipe
    assert recipe.dtype == "float32"
    assert recipe.parameters == r"attn2\."
    assert recipe.trajectory == "inversion"
    assert Engine(model, Recipe(trajectory="inversion")).recipe.trajectory == "inversion"


def test_more_steps_than_noise_levels() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    with pytest.raises(ModelError, match="1000 noise levels"):
        ddim_grid(model, 2000)


def test_half_precision_pipeline_is_computed_in_the_recipes_precision() -> None:
    pipeline = tiny.stable_diffusion().to(torch.float16)
    model = Model.from_pipeline(copy.deepcopy(pipeline), device="cpu")
    assert {p.dtype for p in model.denoiser.parameters()} == {torch.float32}
    rows = Engine(replace(model), Recipe(timesteps=1, steps=4, dim=64)).rows(
        torch.zeros(1, 4, 8, 8), ["a cat"], ["k"]
    )
    assert rows.features.isfinite().all()
