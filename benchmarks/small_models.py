"""The parts of small text-to-image models, in the form of a ``StableDiffusionPipeline``.

Autoencoder, word-level tokenizer of the few words it is told, text encoder without mixing layers
and UNet, all untrained; ``small_training.py`` trains them.
"""

# diffusers annotates only part of what is called here.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

MAX_TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """What decides a small model and its gate; saved beside the model."""

    seed: int = 0
    vae_steps: int = 3000
    vae_batch_size: int = 64
    vae_learning_rate: float = 1.5e-3
    steps: int = 3000
    batch_size: int = 192
    learning_rate: float = 1e-3
    unet_widths: tuple[int, int, int] = (64, 72, 72)  # channels at 16, 8 and 4 latents
    text_width: int = 96
    dropout: float = 0.15  # of the UNet's residual blocks; without it pairs are known by heart
    classifier_images: int = 3840
    classifier_steps: int = 800
    classifier_width: int = 32
    gate_images: int = 20  # for each combination that was never shown
    sampling_steps: int = 50
    guidance: float = 7.5
    graph: bool = True  # on a GPU, one CUDA graph a training step: the models are launch-bound


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def to_tensor(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures as float32 in [-1, 1], [N, 3, H, W]."""
    pixels = np.stack([np.asarray(p.convert("RGB")) for p in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def build_vae() -> Any:
    return AutoencoderKL(
        sample_size=64,
        latent_channels=4,
        block_out_channels=(32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
    )


def build_tokenizer(sentences: Sequence[str]) -> Any:
    """A word-level tokenizer of the sentences' own words, in the form that transformers loads."""
    words = sorted({word for line in sentences for word in line.lower().split()})
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="$A $B",
        special_tokens=[("<bos>", vocabulary["<bos>"]), ("<eos>", vocabulary["<eos>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=MAX_TOKENS,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def token_ids(tokenizer: Any, lines: Sequence[str]) -> torch.Tensor:
    """Ids as the pipeline makes them, [N, MAX_TOKENS]."""
    ids = tokenizer(
        list(lines),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    if (ids == tokenizer.unk_token_id).any():
        unknown = [x for x, row in zip(lines, ids, strict=True) if tokenizer.unk_token_id in row]
        raise ValueError(f"the tokenizer does not know every word of {unknown[0]!r}")
    return torch.as_tensor(ids)


def build_text_encoder(tokenizer: Any, width: int) -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            # Words reach the UNet unmixed: with layers that mix them the encoder learns whole
            # sentences by heart, and pairs that were never drawn come out as pairs that were.
            num_hidden_layers=0,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_unet(cfg: Settings) -> Any:
    # Attention at 8 x 8 and 4 x 4 only: that halves the time of an ingest on two cores.
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=cfg.unet_widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cfg.text_width,
        attention_head_dim=cfg.unet_widths[-1]
        // 12,  # the number of heads, in diffusers' old naming
        dropout=cfg.dropout,
        norm_num_groups=8,
    )


def build_scheduler() -> Any:
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def assemble(vae: Any, text: Any, tokenizer: Any, unet: Any) -> Any:
    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
