"""Random pipelines of real size: speed and memory depend on shapes, not on weights.

Denoisers have the shapes of the released models. Text encoders of the larger models and all
VAEs but SD-1.4's are stand-ins of the right widths: the measurements start from latents, and
text is encoded once per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ("a", "photo", "of", "the", "cat", "dog", "house", "tree", "red", "blue", "painting")
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def sd14(layers: int = 12) -> Any:
    """Stable Diffusion 1.4: 860 M parameters, 64 x 64 latents."""
    return StableDiffusionPipeline(
        vae=_vae((128, 256, 512, 512), latent_channels=4, layers_per_block=2),
        text_encoder=CLIPTextModel(_clip(768, 12, layers)),
        tokenizer=_tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Stable Diffusion XL: 2.6 B parameters, 128 x 128 latents."""
    return StableDiffusionXLPipeline(
        vae=_vae((8, 8, 8, 8), latent_channels=4),
        text_encoder=CLIPTextModel(_clip(768, 12, 2)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(1280, 20, 2)),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        ),
        scheduler=DDIMScheduler(**SCHEDULE),
    )


def sd3_medium() -> Any:
    """Stable Diffusion 3 medium: an MMDiT of 2 B parameters, 128 x 128 latents of 16 channels."""
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=128,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        ),
        vae=_vae((8, 8, 8, 8), latent_channels=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(_clip(768, 12, 2)),
        text_encoder_2=CLIPTextModelWithProjection(_clip(1280, 20, 2)),
        text_encoder_3=None,
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=None,
    )


def flux() -> Any:
    """FLUX.1 dev: a flow transformer of 12 B parameters, 128 x 128 latents of 16 channels."""
    return FluxPipeline(
        transformer=FluxTransformer2DModel(guidance_embeds=True),
        vae=_vae((8, 8, 8, 8), latent_channels=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=CLIPTextModel(_clip(768, 12, 2)),
        tokenizer=_tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(WORDS) + 4, d_model=4096, d_ff=512, num_layers=1, num_heads=64)
        ),
        tokenizer_2=_tokenizer(512),
    )


PIPELINES: dict[str, Callable[[], Any]] = {
    "sd-1.4": sd14,
    "sdxl": sdxl,
    "sd3-medium": sd3_medium,
    "flux": flux,
}


def build(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """A pipeline with random weights, drawn on the device in the precision it will run in."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with device:
            pipeline = PIPELINES[name]()
    finally:
        torch.set_default_dtype(before)
    # diffusers keeps the scheduler's tables on the CPU, whatever the default device.
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    return pipeline


def _vae(widths: tuple[int, ...], latent_channels: int, layers_per_block: int = 1) -> Any:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=latent_channels,
        layers_per_block=layers_per_block,
        sample_size=1024,  # FLUX's pipeline has no other mark of its pictures' size
        norm_num_groups=min(32, widths[0]),
    )


def _clip(width: int, heads: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _tokenizer(length: int = 77) -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS, length)


def word_tokenizer(words: Sequence[str], length: int) -> PreTrainedTokenizerFast:
    """A tokenizer that knows whole words; ids 0 to 3 are padding, begin, end and unknown."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
