"""Loading: any sampler, what is heard, fingerprints, refusals of what is not supported."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    PixArtSigmaPipeline,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    UniPCMultistepScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

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
    pipeline.tokenizer = tiny.tokenizer(length=6)
    other = Model.from_pipeline(pipeline, device="cpu").fingerprint
    assert {name for name in base if base[name] != other[name]} == {"tokenizer"}


def test_fingerprint_covers_every_text_part_and_what_the_pipeline_makes_of_it() -> None:
    def marks(pipeline: Any) -> dict[str, str]:
        return Model.from_pipeline(pipeline, device="cpu").fingerprint

    def different(left: dict[str, str], right: dict[str, str]) -> set[str]:
        assert set(left) == set(right)
        return {name for name in left if left[name] != right[name]}

    base = marks(tiny.stable_diffusion_xl())
    assert {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"} < set(base)
    assert different(base, marks(tiny.stable_diffusion_xl(zeros=False))) == {"pipeline"}
    for part in ("text_encoder", "text_encoder_2"):
        pipeline = tiny.stable_diffusion_xl()
        with torch.no_grad():
            next(getattr(pipeline, part).parameters()).add_(1)
        assert different(base, marks(pipeline)) == {part}
    flow = tiny.stable_diffusion_3()
    base = marks(flow)
    flow.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    flow.tokenizer_3 = tiny.tokenizer(length=6)
    assert different(base, marks(flow)) == {"scheduler", "tokenizer_3"}
    alpha = tiny.pixart()
    sigma = PixArtSigmaPipeline(**alpha.components)
    assert different(marks(alpha), marks(sigma)) == {"pipeline"}  # prompts of another length


def test_prompts_are_encoded_once_and_the_empty_one_is_kept() -> None:
    pipeline = tiny.stable_diffusion()
    model = Model.from_pipeline(pipeline, device="cpu")
    seen: list[int] = []
    pipeline.text_encoder.register_forward_hook(lambda _, args, out: seen.append(len(out[0])))
    found = model.encode_prompts(["a cat", "", "a dog", "a cat", " "])
    assert sum(seen) == 3
    for _ in range(3):
        empty = model.encode_prompts([""] * 4)
    assert sum(seen) == 3
    many = model.encode_prompts([f"a {word}" for word in tiny.WORDS * 3])
    assert sum(seen) == 3 + len(tiny.WORDS)
    assert found is not None
    assert empty is not None
    assert many is not None
    rows = found.tensors["encoder_hidden_states"]
    assert torch.equal(rows[0], rows[3])
    assert torch.equal(rows[1], rows[4])
    assert torch.equal(empty.tensors["encoder_hidden_states"][3], rows[1])
    assert not torch.equal(rows[0], rows[2])
    dog = many.tensors["encoder_hidden_states"][tiny.WORDS.index("dog") + len(tiny.WORDS)]
    torch.testing.assert_close(dog, rows[2])


@pytest.mark.parametrize("zeros", [True, False])
def test_empty_prompt_of_sdxl_is_the_pipelines_own(zeros: bool) -> None:
    pipeline = tiny.stable_diffusion_xl(zeros=zeros)
    _, states, _, pooled = pipeline.encode_prompt(["a cat"], device=torch.device("cpu"))
    found = Model.from_pipeline(pipeline, device="cpu").encode_prompts(["", "a dog"])
    assert found is not None
    torch.testing.assert_close(found.tensors["encoder_hidden_states"][:1], states)
    torch.testing.assert_close(found.tensors["text_embeds"][:1], pooled)
    assert states.any() != zeros
    assert found.tensors["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 2


def test_pictures_are_scaled_and_shifted_as_the_pipeline_does() -> None:
    pipeline = tiny.stable_diffusion_3()
    model = Model.from_pipeline(pipeline, device="cpu")
    pixels = torch.rand(11, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    config = pipeline.vae.config
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mode()
        x_0 = model.encode_images(pixels)
        images = pipeline.vae.decode(x_0 / config.scaling_factor + config.shift_factor).sample
        torch.testing.assert_close(model.decode(x_0), images)
    expected = (latents - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(x_0, expected)
    coarse = Model.from_pipeline(tiny.stable_diffusion_3(), device="cpu", dtype="float16")
    assert coarse.vae.dtype == torch.bfloat16
    found = coarse.encode_images(pixels)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found.flatten(), x_0.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_kind_runs_in_half_precision(kind: str, dtype: str) -> None:
    make, captions = tiny.KINDS[kind]
    if kind == "class-number":
        with pytest.raises(ModelError, match="float32 only"):
            Model.from_pipeline(make(), device="cpu", dtype=dtype)
        return
    exact = Model.from_pipeline(make(), device="cpu", dtype="float32")
    coarse = Model.from_pipeline(make(), device="cpu", dtype=dtype)
    x = seeded_noise(0, "x", (2, *exact.sample_shape))
    t = torch.full((2,), ddim_grid(exact, 4)[1])
    outputs = [m.output(x, t, m.encode_prompts(captions)) for m in (exact, coarse)]
    assert outputs[1].dtype == torch.float32
    assert torch.cosine_similarity(*(o.flatten() for o in outputs), dim=0) > 0.99


class NoReading(TorchDispatchMode):
    """Fails where a number is read out of a tensor, which on a GPU would wait for it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prediction_never_waits_for_the_device(kind: str) -> None:
    make, captions = tiny.KINDS[kind]
    model = Model.from_pipeline(make(), device="cpu")
    x = seeded_noise(0, "x", (2, *model.sample_shape))
    states = model.encode_prompts(captions)
    t = torch.full((2,), ddim_grid(model, 4)[1])
    with pytest.raises(AssertionError), NoReading():
        int(t[0])
    with NoReading():
        model.predicted(x, t, model.noise(x, t, states))


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


def changed_scheduler(pipeline: Any, kind: Any, **settings: object) -> Any:
    pipeline.scheduler = kind(**settings)
    return pipeline


def without(pipeline: Any, part: str) -> Any:
    pipeline.register_modules(**{part: None})
    return pipeline


def inpainting() -> Any:
    parts = dict(tiny.stable_diffusion().components, image_encoder=None)
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def other_codec() -> Any:
    pipeline = tiny.stable_diffusion()
    pipeline.register_modules(vae=AutoencoderTiny(latent_channels=4))
    return pipeline


def odd_packing() -> Any:
    pipeline = tiny.flux()
    pipeline.vae.register_to_config(sample_size=18)
    return pipeline


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (inpainting, "StableDiffusionInpaintPipeline is not supported"),
        (other_codec, "image codec AutoencoderTiny"),
        (odd_packing, "cannot be packed"),
        (lambda: without(tiny.stable_diffusion(), "text_encoder"), "has no text_encoder"),
        (lambda: without(tiny.flux(), "transformer"), "has no transformer"),
        (
            lambda: changed_scheduler(tiny.stable_diffusion(), EDMEulerScheduler),
            "EDMEulerScheduler has no alphas_cumprod",
        ),
        (
            lambda: changed_scheduler(tiny.stable_diffusion_3(), FlowMatchHeunDiscreteScheduler),
            "FlowMatchHeunDiscreteScheduler has no alphas_cumprod",
        ),
        (
            lambda: changed_scheduler(
                tiny.stable_diffusion_3(), FlowMatchEulerDiscreteScheduler, invert_sigmas=True
            ),
            "invert_sigmas",
        ),
        (
            lambda: changed_scheduler(
                tiny.stable_diffusion(),
                DPMSolverMultistepScheduler,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
            ),
            "'flow_prediction' is not supported",
        ),
        (
            lambda: changed_scheduler(tiny.pixel_diffusion(), DDPMScheduler, thresholding=True),
            "thresholds dynamically",
        ),
        (
            lambda: changed_scheduler(
                tiny.pixel_diffusion(), DDPMScheduler, beta_schedule="sigmoid"
            ),
            "sigmoid",
        ),
        (lambda: tiny.pixel_diffusion(class_embed_type="identity"), "'identity' is not supported"),
    ],
)
def test_unsupported_pipeline_is_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Model.from_pipeline(make(), device="cpu")
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3])
def test_more_steps_than_noise_levels(make: Any) -> None:
    model = Model.from_pipeline(make(), device="cpu")
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


def test_automatic_precision_is_that_of_the_device_to_come() -> None:
    def dtype_of(kind: str, runs_on: str | None) -> torch.dtype:
        make, _ = tiny.KINDS[kind]
        return Model.from_pipeline(make(), device="cpu", runs_on=runs_on).dtype

    assert dtype_of("sd", None) == torch.float32
    assert dtype_of("sd", "cuda") == torch.bfloat16
    assert dtype_of("class-number", "cuda") == torch.float32  # diffusers runs it in no other
