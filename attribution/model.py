"""A diffusers pipeline seen as one function: the noise prediction e(x_t, t, c)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import Tensor, nn

from . import fingerprint
from .conditions import Conditions
from .errors import ModelError
from .family import Family
from .pipelines import family_of
from .schedule import NoiseSchedule, make_schedule

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SLICE = 8  # pictures through the VAE at once: its activations dwarf the denoiser's
_PROMPTS = 32  # prompts through the text encoders at once


@dataclass(frozen=True)
class Model:
    """A denoiser with what surrounds it: conditions, noise schedule and image codec.

    All modules are frozen and in evaluation mode. A pixel model has no `vae`.
    """

    denoiser: Any  # UNet2DConditionModel, UNet2DModel or a transformer, as diffusers made it
    family: Family  # what the denoiser hears, and how it is called
    schedule: NoiseSchedule
    vae: Any  # AutoencoderKL or None
    fingerprint: dict[str, str]  # component -> SHA-256 of its configuration and weights
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        lora: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
        runs_on: str | None = None,
    ) -> Model:
        """Load a pipeline folder as diffusers writes it, or a hub id.

        Args:
            path: folder with `model_index.json`, or the id of a repository on the hub.
            lora: adapter of the denoiser, as `save_lora_weights` writes it: a safetensors file,
                a folder or a hub id. Its parameters are then what is attributed by default.
            device: a torch device, or `auto` for CUDA where there is one.
            dtype: precision of the denoiser's passes: float32, bfloat16 or float16; `auto` is
                bfloat16 on a GPU and float32 elsewhere. Text is encoded in float32 whatever it is.
            runs_on: kind of device that `auto` is for, where it will be moved to another later.

        Raises:
            ModelError: no such folder, no pipeline in it, one of a kind that is not supported, or
                an adapter that does not fit it.
        """
        folder = Path(path)
        if folder.exists() and not (folder / "model_index.json").is_file():
            raise ModelError(
                f"{path} is not a diffusers pipeline (no model_index.json); "
                "give the folder that pipeline.save_pretrained() wrote"
            )
        if not folder.exists() and not _hub_id(path):
            raise ModelError(f"model folder {path} does not exist; check --model")
        load: Any = DiffusionPipeline.from_pretrained
        try:
            with quiet_libraries(), _without_bars():
                pipeline = load(
                    str(path), dtype=torch.float32, low_cpu_mem_usage=False, **_left_out(folder)
                )
        except _LOADING as error:
            place = "" if folder.exists() else " (no such folder here, so it was sought on the hub)"
            raise ModelError(
                f"{path}{place} cannot be loaded as a diffusers pipeline: {_first_line(error)}; "
                "check that --model names a complete pipeline folder"
            ) from error
        if lora is not None:
            _load_adapter(pipeline, lora)
        return cls.from_pipeline(pipeline, device=device, dtype=dtype, runs_on=runs_on)

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, *, device: str = "auto", dtype: str = "auto", runs_on: str | None = None
    ) -> Model:
        """Wrap a pipeline that is already in memory (its modules are frozen and moved)."""
        if dtype not in ("auto", *DTYPES):
            raise ModelError(f"dtype {dtype!r} is unknown; choose auto, {', '.join(DTYPES)}")
        family = family_of(pipeline)
        where = usable_device(device)
        if dtype == "auto":
            coarse = (runs_on or where.type) == "cuda" and not family.float32_only
            dtype = "bfloat16" if coarse else "float32"
        if family.float32_only and dtype != "float32":
            raise ModelError(f"{family.name}: diffusers runs this denoiser in float32 only")
        schedule = make_schedule(
            pipeline.components.get("scheduler"),
            tokens=family.tokens,
            even=family.even_sigmas,
            device=where,
        )
        modules = {"denoiser": family.denoiser, "vae": family.vae, **family.text_encoders}
        modules = {name: module for name, module in modules.items() if module is not None}
        marks = {name: fingerprint.of_module(module) for name, module in modules.items()}
        for name, tokenizer in family.tokenizers.items():
            marks[name] = fingerprint.of_tokenizer(tokenizer)
        marks["scheduler"] = fingerprint.of_scheduler(schedule.scheduler)
        marks["pipeline"] = fingerprint.of_facts(family.facts)
        coder = torch.float32 if dtype == "float32" else torch.bfloat16  # SDXL's overflows in half
        precisions = {"denoiser": DTYPES[dtype], "vae": coder}
        for name, module in modules.items():
            module.requires_grad_(False).eval()
            # diffusers' own `to` warns about any cast.
            nn.Module.to(module, where, precisions.get(name, torch.float32))
        return cls(
            denoiser=family.denoiser,
            family=family,
            schedule=schedule,
            vae=family.vae,
            fingerprint=marks,
            device=where,
            dtype=DTYPES[dtype],
        )

    def to(self, device: str) -> Model:
        """The same model on another device; its modules are moved, not copied.

        Raises:
            ModelError: a device that cannot be used here.
        """
        where = usable_device(device)
        for module in (self.denoiser, self.vae, *self.family.text_encoders.values()):
            if module is not None:
                nn.Module.to(module, where)
        return replace(self, device=where, schedule=self.schedule.to(where))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the denoiser was made for."""
        height, width = self.family.sample_size
        return height * self.family.factor, width * self.family.factor

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of one x_t."""
        return self.family.channels, *self.family.sample_size

    @property
    def conditional(self) -> bool:
        """Whether the model listens to captions, be they text or the name of a class."""
        return self.family.conditional

    def refuses(self, caption: str) -> str | None:
        """Why the model cannot hear this caption, or None if it can."""
        return self.family.refuses(caption)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> x_0 [B, C, h, w] float32, the posterior's mean."""
        pixels = pixels.to(self.device, torch.float32)
        if self.vae is None:
            return pixels
        scale, shift = self._latent_scale
        with exact_convolutions():
            parts = [
                self.vae.encode(part.to(self.vae.dtype)).latent_dist.mode().float()
                for part in torch.split(pixels, _SLICE)
            ]
        return (torch.cat(parts) - shift) * scale

    def encode_pictures(self, pictures: np.ndarray[Any, np.dtype[np.uint8]] | Tensor) -> Tensor:
        """Pictures [B, H, W, 3] as bytes, already fitted to `image_size` -> x_0 [B, C, h, w]."""
        pixels = torch.as_tensor(pictures).to(self.device)  # bytes travel, not floats
        return self.encode_images(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)

    def decode(self, x_0: Tensor) -> Tensor:
        """x_0 [B, C, h, w] -> images [B, 3, H, W] float32, about [-1, 1]; differentiable."""
        if self.vae is None:
            return x_0
        scale, shift = self._latent_scale
        latents = (x_0 / scale + shift).to(self.vae.dtype)
        with exact_convolutions():
            parts = [self.vae.decode(part).sample.float() for part in torch.split(latents, _SLICE)]
        return torch.cat(parts)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], *, apart: bool = False) -> Conditions | None:
        """Prompts -> what the denoiser hears, one row each.

        A repeated prompt is encoded once; with `apart` each in its own place, so that its row
        depends on no other prompt even in rounding, only on its place and their number.

        An empty prompt is what the pipeline guides against. Where the model knows no such thing,
        empty prompts alone give None: nothing is heard.

        Raises:
            ModelError: a prompt that the model cannot hear, or an empty one beside others for a
                model without an unconditional prediction.
        """
        words = [prompt if prompt.strip() else "" for prompt in prompts]
        if not any(words):
            return None if self._null is None else self._null.expand(len(words))
        spoken = list(filter(None, words))
        unique = [word or spoken[0] for word in words] if apart else list(dict.fromkeys(spoken))
        with quiet_libraries():
            parts = [
                self.family.encode(unique[start : start + _PROMPTS], self.device)
                for start in range(0, len(unique), _PROMPTS)
            ]
        if "" in words:
            if self._null is None:
                raise ModelError(f"{self.refuses('')}; give every picture its class")
            parts.append(self._null)
            unique.append("")
        place = {prompt: i for i, prompt in enumerate(unique)}
        chosen = [i if apart and word else place[word] for i, word in enumerate(words)]
        rows = torch.tensor(chosen, device=self.device)
        return Conditions.cat(parts).rows(rows)

    def output(self, x_t: Tensor, t: Tensor, states: Conditions | None) -> Tensor:
        """What the denoiser puts out, in the precision of x_t; of what kind, the schedule knows."""
        heard = {} if states is None else dict(states.to(self.dtype).tensors)
        with exact_convolutions():
            output = self.family.output(
                self.denoiser, x_t.to(self.dtype), self.schedule.time(t), heard
            )
        # Some models predict a variance beside the mean.
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def noise(self, x_t: Tensor, t: Tensor, states: Conditions | None) -> Tensor:
        """The noise prediction e(x_t, t, c), whatever the model was trained to predict.

        Args:
            x_t: [B, C, h, w] float32.
            t: [B] int64 levels of the schedule.
            states: what the denoiser hears, B rows; None for a model that hears nothing.
        """
        return self.schedule.noise(x_t, self.output(x_t, t, states), t)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a_t, s_t) of x_t = a_t x_0 + s_t eps, each [B, 1, 1, 1] float32."""
        return self.schedule.coefficients(t)

    def predicted(self, x_t: Tensor, t: Tensor, e: Tensor) -> Tensor:
        """xhat0(x_t) = (x_t - s_t e) / a_t.

        Where a_t = 0, x_t holds nothing of x_0 and a model that can be sampled from there says
        e = x_t: the result is then 0 with gradient 0.
        """
        a, s = self.coefficients(t)
        return (x_t - s * e) / a.clamp(min=1e-6)

    @cached_property
    def _null(self) -> Conditions | None:
        """One row of the empty prompt: it is asked for with every batch."""
        with quiet_libraries():
            return self.family.unconditional(self.device)

    @property
    def _latent_scale(self) -> tuple[float, float]:
        """Scale and shift of x_0 = (latent - shift) * scale."""
        config = self.vae.config
        return config.scaling_factor, config.get("shift_factor") or 0.0


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions on a GPU that repeat to the bit and, in float32, do not round to TF32.

    cuDNN's defaults do neither, and the same seed must give the same index.
    """
    cudnn = torch.backends.cudnn
    flags: AbstractContextManager[None] = cudnn.flags(
        enabled=cudnn.enabled, deterministic=True, allow_tf32=False
    )
    return flags


# What the loading libraries raise over files that are missing, broken or of another kind.
_LOADING = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


def _load_adapter(pipeline: Any, lora: str | Path) -> None:
    """Put a LoRA beside the pipeline's weights."""
    name = type(pipeline).__name__
    load = getattr(pipeline, "load_lora_weights", None)
    if load is None:
        raise ModelError(f"a {name} takes no LoRA; leave --lora out")
    file = Path(lora).suffix == ".safetensors"
    if not Path(lora).exists() and (file or not _hub_id(lora)):
        raise ModelError(f"adapter {lora} does not exist; check --lora")
    try:
        # What the libraries say stays heard: layers of the adapter that found no place, say.
        with _without_bars(), _partial_adapters():
            # Adapters in pickled files are refused: reading one runs what is in it.
            load(str(lora), use_safetensors=True)
    except (*_LOADING, SafetensorError) as error:
        raise ModelError(
            f"{lora} cannot be loaded as a LoRA of a {name}: {_first_line(error)}; "
            "check that --lora names what save_lora_weights() wrote for this model"
        ) from error
    denoiser = pipeline.components.get("unet") or pipeline.components.get("transformer")
    if not any("lora_" in part for part, _ in denoiser.named_parameters()):
        raise ModelError(f"{lora} adapts no layer of the denoiser; there is nothing to attribute")


@contextmanager
def _partial_adapters() -> Iterator[None]:
    """No warning, at nearly every load, that an adapter leaves the text encoders as they are."""
    logger = logging.getLogger("diffusers.loaders.lora_base")

    def worth_saying(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("No LoRA keys associated to")

    logger.addFilter(worth_saying)
    try:
        yield
    finally:
        logger.removeFilter(worth_saying)


def _left_out(folder: Path) -> dict[str, None]:
    """Parts that were None when the pipeline was saved; diffusers wants to be told so again."""
    if not folder.exists():
        return {}
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    return {name: None for name, value in parts.items() if value == [None, None]}


def _hub_id(path: str | Path) -> bool:
    return not Path(path).is_absolute() and len(Path(path).parts) <= 2 and str(path)[:1] != "."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No advice from the libraries, such as that a caption was cut."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars from the loading libraries."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def usable_device(device: str) -> torch.device:
    """The device by name, tried before anything is computed for it.

    Raises:
        ModelError: it cannot be used here.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        where = torch.device(name)
        where = torch.zeros(1, device=where).device  # `cuda` has now its number
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            f"--device {device} cannot be used here: {_first_line(error)}; "
            "auto, cpu and cuda are usual"
        ) from error
    return where
