"""What all kinds of diffusers pipelines have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .conditions import Conditions
from .errors import ModelError


class Family(ABC):
    """A kind of pipeline, around one of them: its text or class side, and its denoiser's manners.

    The pipeline is kept for its `encode_prompt`: what the denoiser was trained to hear is that
    method's to say. Subclasses state what differs.
    """

    denoiser_name: ClassVar[str] = "transformer"
    required: ClassVar[tuple[str, ...]] = ()  # parts without which prompts cannot be encoded
    optional: ClassVar[tuple[str, ...]] = ()
    conditional: ClassVar[bool] = True  # whether the denoiser listens to captions
    patch: ClassVar[int] = 1  # side of the squares of x_t that are packed into channels
    even_sigmas: ClassVar[bool] = False  # see schedule.FlowSchedule
    cudnn_attention: ClassVar[bool] = True  # whether its gradients may go through cuDNN's attention

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.name = type(pipeline).__name__
        parts: dict[str, Any] = pipeline.components
        needed = (self.denoiser_name, *self.required)
        missing = [name for name in needed if parts.get(name) is None]
        if missing:
            raise ModelError(f"{self.name} has no {', '.join(missing)}; load it with the pipeline")
        self.denoiser: Any = parts[self.denoiser_name]
        self.vae: Any = parts.get("vae")
        listening = (*self.required, *self.optional)
        present = {name: part for name in listening if (part := parts.get(name)) is not None}
        self.text_encoders = {k: v for k, v in present.items() if isinstance(v, nn.Module)}
        self.tokenizers = {k: v for k, v in present.items() if k not in self.text_encoders}
        self.check()

    def check(self) -> None:
        """Refuse an image codec or a denoiser that is not known here, or asks for more."""
        expected = 3
        if self.vae is not None:
            config = self.vae.config
            if not any(kind.__name__ == "AutoencoderKL" for kind in type(self.vae).__mro__):
                raise ModelError(
                    f"{self.name}: image codec {type(self.vae).__name__} is not supported; "
                    "AutoencoderKL is"
                )
            if config.get("latents_mean") is not None:
                raise ModelError(f"{self.name}: a VAE with latents_mean is not supported")
            expected = int(config.latent_channels)
        if self.channels != expected:
            raise ModelError(
                f"{self.name}: its denoiser takes {self.channels} channels, its images have "
                f"{expected}; inpainting and single-channel models are not supported"
            )
        if not all(self.sample_size):
            raise ModelError(
                f"{self.name}: its denoiser's configuration has no sample_size; set it"
            )

    @property
    def float32_only(self) -> bool:
        """Whether diffusers cannot run the denoiser in another precision."""
        return False

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the conditions beside the parts themselves."""
        return {"kind": type(self).__name__}

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 1 if self.vae is None else int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        """Channels of x_t."""
        return int(self.denoiser.config.in_channels) // self.patch**2

    @property
    def sample_size(self) -> tuple[int, int]:
        """Height and width of the x_t that the denoiser was made for."""
        size = self.denoiser.config.sample_size or 0
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    @property
    def tokens(self) -> int:
        """Length of the image's sequence in a transformer."""
        side = self.denoiser.config.get("patch_size") or 1
        height, width = self.sample_size
        return (height // side) * (width // side)

    def refuses(self, caption: str) -> str | None:
        """Why the model cannot hear this caption, or None if it can."""
        return None

    @abstractmethod
    def encode(self, prompts: list[str], device: torch.device) -> Conditions:
        """Conditions of the prompts, one row each, in the precision of the text encoders."""

    def unconditional(self, device: torch.device) -> Conditions | None:
        """One row: what the pipeline guides against; None if the model knows no such thing."""
        return self.encode([""], device)

    def output(self, denoiser: Any, x: Tensor, time: Tensor, c: dict[str, Tensor]) -> Tensor:
        """The denoiser's output [B, C or more, h, w] for x [B, C, h, w] and times [B]."""
        found: Tensor = denoiser(x, timestep=time, **c).sample
        return found

    def _refuse_settings(self, *names: str) -> None:
        """Refuse settings of the denoiser's configuration that ask for other conditions."""
        found = [name for name in names if self.denoiser.config.get(name)]
        if found:
            raise ModelError(
                f"{self.name}: its denoiser needs {', '.join(found)}, which is not supported"
            )
