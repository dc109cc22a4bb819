"""A diffusers pipeline seen as one function: the noise prediction e(x_t, t, c)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from . import fingerprint
from .errors import ModelError

# Settings of a UNet that make it ask for more than x_t, t and text states.
_MORE_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        cls, path: str | Path, *, device: str = "auto", dtype: str = "auto"
    ) -> Model:
        """Load a pipeline folder as diffusers writes it, or a hub id.

        Args:
            path: folder with `model_index.json`, or the id of a repository on the hub.
            device: a torch device, or `auto` for CUDA where there is one.
            dtype: precision of the denoiser's passes: float32, bfloat16 or float16; `auto` is
                bfloat16 on a GPU and float32 elsewhere. Text is encoded in float32 whatever it is.

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
            with quiet_libraries():
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
    def from_pipeline(cls, pipeline: Any, *, device: str = "auto", dtype: str = "auto") -> Model:
        """Wrap a pipeline that is already in memory (its modules are frozen and moved)."""
        if dtype not in ("auto", *DTYPES):
            raise ModelError(f"dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
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
        parts = {name: parts.get(name) for name in ("vae", "text_encoder", "tokenizer")}
        _check_supported(denoiser, parts["vae"], pipeline)
        where = _usable(device)
        dtype = automatic_dtype(where.type) if dtype == "auto" else dtype
        # Samplers other than DDIM do not say whether to clip; DDIM's own default would, and
        # latents are no pixels.
        config: Any = getattr(schedule, "config", {})
        unsaid = {} if "clip_sample" in config else {"clip_sample": False}
        ddim: Any = DDIMScheduler
        scheduler = ddim.from_config(config, **unsaid)
        marks = {
            "denoiser": fingerprint.of_module(denoiser),
            "vae": fingerprint.of_module(parts["vae"]),
            "text_encoder": fingerprint.of_module(parts["text_encoder"]),
            "tokenizer": fingerprint.of_tokenizer(parts["tokenizer"]),
            "scheduler": fingerprint.of_scheduler(scheduler),
        }
        for part in (denoiser, parts["vae"], parts["text_encoder"]):
            if part is not None:
                part.requires_grad_(False).eval()
                precision = DTYPES[dtype] if part is denoiser else torch.float32
                nn.Module.to(part, where, precision)  # diffusers' own `to` warns about any cast
        return cls(
            denoiser=denoiser,
            scheduler=scheduler,
            vae=parts["vae"],
            text_encoder=parts["text_encoder"],
            tokenizer=parts["tokenizer"],
            fingerprint=marks,
            device=where,
            dtype=DTYPES[dtype],
        )

    def to(self, device: str) -> Model:
        """The same model on another device; its modules are moved, not copied.

        Raises:
            ModelError: a device that cannot be used here.
        """
        where = _usable(device)
        for part in (self.denoiser, self.vae, self.text_encoder):
            if part is not None:
                nn.Module.to(part, where)
        return replace(self, device=where)

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

    def encode_pictures(self, pictures: np.ndarray[Any, np.dtype[np.uint8]] | Tensor) -> Tensor:
        """Pictures [B, H, W, 3] as bytes, already fitted to `image_size` -> x_0 [B, C, h, w]."""
        pixels = torch.as_tensor(pictures).to(self.device)  # bytes travel, not floats
        return self.encode_images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)

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


def automatic_dtype(device: str) -> str:
    """The precision that `auto` stands for on a kind of device."""
    return "bfloat16" if device == "cuda" else "float32"


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
def quiet_libraries() -> Iterator[None]:
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


def _usable(device: str) -> torch.device:
    """The device by name, tried before anything is computed for it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        where = torch.device(name)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"--device {device} cannot be used here: {first}; auto, cpu and cuda are usual"
        ) from error
    return where


def _check_supported(denoiser: nn.Module, vae: Any, pipeline: Any) -> None:
    """Refuse a pipeline whose denoiser needs more than x_t, t and text states."""
    config: Any = denoiser.config
    name = type(pipeline).__name__
    needs = [key for key in _MORE_CONDITIONS if config.get(key)]
    if needs:
        raise ModelError(
            f"{name}: its denoiser needs {', '.join(needs)}, which is not supported yet; "
            "use a Stable Diffusion 1.x or 2.x pipeline, or an unconditional one"
        )
    expected = 3 if vae is None else int(vae.config.latent_channels)
    if config.in_channels != expected:
        raise ModelError(
            f"{name}: its denoiser takes {config.in_channels} channels, its images have "
            f"{expected}; inpainting and single-channel models are not supported"
        )
    if not config.sample_size:
        raise ModelError(f"{name}: its denoiser's configuration has no sample_size; set it")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
