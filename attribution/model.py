"""A diffusers pipeline seen as one function: the noise prediction e(x_t, t, c)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from .errors import ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Settings of a scheduler that change e(x_t, t, c) or x_t; the rest only steers samplers.
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class Model:
    """A denoiser with what surrounds it: image codec, text encoder and noise schedule.

    Everything outside the denoiser is optional: a pixel model has no `vae`, an unconditional
    one no `text_encoder`. All modules are frozen and in evaluation mode.
    """

    denoiser: Any  # UNet2DConditionModel or UNet2DModel
    scheduler: Any  # DDIMScheduler with the pipeline's noise schedule
    vae: Any  # AutoencoderKL or None
    text_encoder: Any  # CLIPTextModel or None
    tokenizer: Any
    fingerprint: dict[str, str]  # component -> SHA-256 of its configuration and weights
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str = "auto", dtype: str = "float32"
    ) -> Model:
        """Load a pipeline folder as diffusers writes it, or a hub id.

        Args:
            path: folder with `model_index.json`, or the id of a repository on the hub.
            device: a torch device, or `auto` for CUDA where there is one.
            dtype: precision of the denoiser's forward pass; text and images are encoded in
                float32 whatever it is.

        Raises:
            ModelError: no such folder, no pipeline in it, or a pipeline without a noise schedule.
        """
        folder = Path(path)
        if folder.exists() and not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{path} is not a diffusers pipeline (no model_index.json); "
                "give the folder that pipeline.save_pretrained() wrote"
            )
        hub_id = not folder.is_absolute() and len(folder.parts) <= 2 and str(path)[:1] != "."
        if not folder.exists() and not hub_id:
            raise ModelError(f"model folder {path} does not exist; check --model")
        load: Any = DiffusionPipeline.from_pretrained
        try:
            with _quiet():
                pipeline = load(str(path), dtype=torch.float32, low_cpu_mem_usage=False)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            place = "" if folder.exists() else " (no such folder here, so it was sought on the hub)"
            raise ModelError(
                f"{path}{place} cannot be loaded as a diffusers pipeline: {first}; "
                "check that --model names a complete pipeline folder"
            ) from error
        return cls.from_pipeline(pipeline, device=device, dtype=dtype)

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, device: str = "auto", dtype: str = "float32") -> Model:
        """Wrap a pipeline that is already in memory (its modules are frozen and moved)."""
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        parts: dict[str, Any] = pipeline.components
        denoiser = parts.get("unet")
        if not isinstance(denoiser, nn.Module):
            raise ModelError(
                f"{type(pipeline).__name__} has no UNet; "
                "use a Stable Diffusion, DDPM or DDIM pipeline"
            )
        schedule = parts.get("scheduler")
        if getattr(schedule, "alphas_cumprod", None) is None:
            raise ModelError(
                f"scheduler {type(schedule).__name__} has no alphas_cumprod; "
                "use a pipeline with a DDPM-type noise schedule"
            )
        where = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        parts = {
            "denoiser": denoiser,
            "vae": parts.get("vae"),
            "text_encoder": parts.get("text_encoder"),
            "scheduler": schedule,
        }
        fingerprint = {name: _fingerprint(part) for name, part in parts.items()}
        for part in parts.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval().to(where)
        if dtype != "float32":
            nn.Module.to(denoiser, DTYPES[dtype])  # diffusers' own `to` warns about any cast
        ddim: Any = DDIMScheduler
        return cls(
            denoiser=denoiser,
            scheduler=ddim.from_config(getattr(schedule, "config", {})),
            vae=parts["vae"],
            text_encoder=parts["text_encoder"],
            tokenizer=getattr(pipeline, "tokenizer", None),
            fingerprint=fingerprint,
            device=where,
            dtype=DTYPES[dtype],
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the denoiser was made for."""
        height, width = _pair(self.denoiser.config.sample_size)
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        return height * factor, width * factor

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one x_t."""
        height, width = _pair(self.denoiser.config.sample_size)
        return int(self.denoiser.config.in_channels), height, width

    @property
    def conditional(self) -> bool:
        """Whether the model listens to text."""
        return self.text_encoder is not None

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> x_0 [B, C, h, w], the posterior's mean, scaled."""
        pixels = pixels.to(self.device, torch.float32)
        if self.vae is None:
            return pixels
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode()
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        scaled: Tensor = (latents - shift) * self.vae.config.scaling_factor
        return scaled

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 [B, C, h, w] -> images [B, 3, H, W], about [-1, 1]; differentiable."""
        if self.vae is None:
            return x_0
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        images: Tensor = self.vae.decode(x_0 / self.vae.config.scaling_factor + shift).sample
        return images

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor | None:
        """Prompts -> text states [B, L, D]; None for a model that takes no text.

        Raises:
            ModelError: a non-empty prompt for a model that takes no text.
        """
        if self.text_encoder is None:
            if any(prompts):
                raise ModelError(
                    f"this model takes no text, so {next(filter(None, prompts))!r} means nothing "
                    "to it; ask about an image (--image) or give a reward"
                )
            return None
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            unique,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        ids = tokens.input_ids.to(self.device)
        states = torch.cat([self.text_encoder(part)[0] for part in ids.split(64)])
        return states[torch.tensor([unique.index(prompt) for prompt in prompts])]

    def noise(self, x_t: Tensor, t: Tensor, states: Tensor | None) -> Tensor:
        """The noise prediction e(x_t, t, c) in float32, whatever the model was trained to predict.

        Args:
            x_t: [B, C, h, w] float32.
            t: [B] int64 training timesteps.
            states: [B, L, D] text states, or None.
        """
        inputs = x_t.to(self.dtype)
        output: Tensor
        text = {} if states is None else {"encoder_hidden_states": states.to(self.dtype)}
        with exact_convolutions():
            output = self.denoiser(inputs, t, **text).sample
        # Some models predict a variance beside the mean.
        output = output[:, : x_t.shape[1]].float()
        a, s = self.coefficients(t)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return output
        if kind == "v_prediction":
            return a * output + s * x_t
        if kind == "sample":
            return (x_t - a * output) / s
        raise ModelError(
            f"prediction type {kind!r} is not supported; epsilon, v_prediction or sample"
        )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t) of x_t = a_t x_0 + s_t eps, each [B, 1, 1, 1] float32."""
        kept: Tensor = self.scheduler.alphas_cumprod.to(t.device)[t].float().view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def predicted(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        """xhat0(x_t) = (x_t - s_t e) / a_t."""
        a, s = self.coefficients(t)
        return (x_t - s * e) / a


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions on a GPU that repeat to the bit and, in float32, do not round to TF32.

    cuDNN's defaults do neither, and the same seed must give the same index.
    """
    cudnn = torch.backends.cudnn
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled, deterministic=True, allow_tf32=False
    )
    return flags


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice from the loading libraries, whose settings are put back."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _fingerprint(part: Any) -> str:
    """SHA-256 over a component's architecture and float32 weights, independent of its folder."""
    if part is None:
        return "none"
    digest = hashlib.sha256(type(part).__name__.encode())
    if isinstance(part, nn.Module):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    else:
        config = {key: part.config.get(key) for key in _NOISE_SCHEDULE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=list).encode())
    return digest.hexdigest()
