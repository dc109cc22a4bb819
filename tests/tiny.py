"""Tiny random pipelines in the standard diffusers format: the real classes, milliseconds a pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from headwater.benchmarks.sizes import SCHEDULE, word_tokenizer

WORDS = [
    "a",
    "an",
    "the",
    "cat",
    "dog",
    "red",
    "blue",
    "drawing",
    "by",
    "of",
    "in",
    "studio",
    "style",
    "fish",
    "house",
]


def tokenizer(length: int = 8) -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS, length)


def text_unet(width: int = 16, **settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(width, 2 * width),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        **{"cross_attention_dim": 16, **settings},
    )


def autoencoder(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        norm_num_groups=4,
        **{"latent_channels": 4, **settings},
    )


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        projection_dim=12,
    )


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(WORDS) + 4,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
        )
    )


def stable_diffusion(
    *, prediction_type: str = "epsilon", seed: int = 0, width: int = 16
) -> StableDiffusionPipeline:
    """A 16 x 16 pixel, 8 x 8 latent Stable Diffusion with random weights."""
    torch.manual_seed(seed)
    unet = text_unet(width)
    vae = autoencoder()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(prediction_type=prediction_type, **SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixel_diffusion(seed: int = 0, **settings: Any) -> DDPMPipeline:
    """An 8 x 8 pixel model, as in the CIFAR literature; unconditional unless `settings` differ."""
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        **settings,
    )
    return DDPMPipeline(unet=unet, scheduler=DDIMScheduler())


def stable_diffusion_xl(*, zeros: bool = True, seed: int = 0) -> StableDiffusionXLPipeline:
    """Two text encoders, pooled text and sizes."""
    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=tokenizer(),
        unet=text_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=12 + 6 * 4,
        ),
        scheduler=DDIMScheduler(**SCHEDULE),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def stable_diffusion_3(*, t5: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """A flow over joint attention, with or without its third text encoder."""
    torch.manual_seed(seed)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=24,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=not t5, base_image_seq_len=4, max_image_seq_len=64
        ),
        vae=autoencoder(
            latent_channels=16,
            scaling_factor=1.5,
            shift_factor=0.06,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_encoder() if t5 else None,
        tokenizer_3=tokenizer() if t5 else None,
    )


def flux(*, distilled: bool = True, seed: int = 0) -> FluxPipeline:
    """A flow over packed latents with a shift that depends on the picture's size."""
    torch.manual_seed(seed)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=distilled,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=distilled, base_image_seq_len=4, max_image_seq_len=64
        ),
        vae=autoencoder(scaling_factor=0.4, shift_factor=0.1),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=tokenizer(),
    )


def pixart(
    kind: type[PixArtAlphaPipeline] | type[PixArtSigmaPipeline] = PixArtAlphaPipeline,
    seed: int = 0,
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """Masked T5 states; the alpha kind hears the picture's size too."""
    torch.manual_seed(seed)
    return kind(
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            caption_channels=32,
            sample_size=8,
            use_additional_conditions=kind is PixArtAlphaPipeline,
        ),
        scheduler=DDIMScheduler(**SCHEDULE),
        vae=autoencoder(),
        text_encoder=t5_encoder(),
        tokenizer=tokenizer(),
    )


def dit(seed: int = 0) -> DiTPipeline:
    """Classes, the last of them none."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # the pipeline takes class 1000 for none, whatever the model
    )
    with torch.no_grad():  # gates begin at zero: make every layer matter
        for block in transformer.transformer_blocks:
            torch.nn.init.normal_(block.norm1.linear.weight, std=0.5)
    return DiTPipeline(
        transformer=transformer,
        vae=autoencoder(),
        scheduler=DDIMScheduler(**SCHEDULE),
        id2label={i: name for i, name in enumerate(["cat, kitten", "dog", "fish"])},
    )


# Every kind of pipeline, with captions that it can hear.
KINDS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "sd": (stable_diffusion, ["a red cat", "a blue dog"]),
    "sd-v": (lambda: stable_diffusion(prediction_type="v_prediction"), ["a red cat", "a blue dog"]),
    "sdxl": (stable_diffusion_xl, ["a red cat", "a blue dog"]),
    "sd3": (stable_diffusion_3, ["a red cat", "a blue dog"]),
    "sd3-clip": (lambda: stable_diffusion_3(t5=False), ["a red cat", "a blue dog"]),
    "flux": (flux, ["a red cat", "a blue dog"]),
    "flux-plain": (lambda: flux(distilled=False), ["a red cat", "a blue dog"]),
    "pixart": (pixart, ["a red cat", "a blue dog"]),
    "pixart-sigma": (lambda: pixart(PixArtSigmaPipeline), ["a red cat", "a blue dog"]),
    "dit": (dit, ["1", "fish"]),
    "pixel": (pixel_diffusion, ["", ""]),
    "class": (lambda: pixel_diffusion(num_class_embeds=4), ["1", "3"]),
    "class-number": (lambda: pixel_diffusion(class_embed_type="timestep"), ["1", "3"]),
}


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder
