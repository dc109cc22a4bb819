"""Noise schedules: x_t = a x_0 + s eps at integer levels t, and what an output says of both.

A level is an int, in a batch an int64 tensor [B]; a larger one holds more noise. Diffusion models
count in training timesteps. Flow models know any sigma in [0, 1]: their levels are sigma in units
of 2^-24, which loses nothing against float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .errors import ModelError

_FLOW_LEVELS = 2**24
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class NoiseSchedule(ABC):
    """What the paths and cotangents need to know of a pipeline's scheduler."""

    scheduler: Any  # a private copy of the deterministic sampler: spaces the grid
    prediction: str  # what the denoiser puts out: epsilon, v_prediction, sample or flow
    clean: int  # the level at which sampling ends

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of levels t [B], each [B, 1, 1, 1] float32."""

    @abstractmethod
    def time(self, t: Tensor) -> Tensor:
        """What the denoiser is told at levels t [B]: the scheduler's own timesteps [B]."""

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same for a model on another device."""
        return self

    @property
    def clip(self) -> float | None:
        """Bound of the predicted x_0 while sampling, where the scheduler sets one."""
        config = self.scheduler.config
        return float(config.clip_sample_range) if config.get("clip_sample") else None

    @property
    def velocity(self) -> bool:
        """Whether the output is a rate of change of x_t with the level."""
        return self.prediction in ("v_prediction", "flow")

    def grid(self, steps: int) -> list[int]:
        """The levels, ascending, that the pipeline's sampler visits in so many steps."""
        known = self.scheduler.config.num_train_timesteps
        if not 1 <= steps <= known:
            raise ModelError(f"steps is {steps}; the model's schedule has {known} noise levels")
        return self._spaced(steps)

    @abstractmethod
    def _spaced(self, steps: int) -> list[int]: ...

    def noise(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The noise e in x that the denoiser's output means at level t; finite also at a = 0."""
        if self.prediction == "epsilon":
            return output
        a, s = self.coefficients(t)
        if self.prediction == "v_prediction":
            return a * output + s * x
        if self.prediction == "flow":  # output = eps - x_0
            return x + a * output
        return (x - a * output) / s

    def denoised(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The x_0 in x that the output means at level t; only epsilon leaves it open at a = 0."""
        if self.prediction == "sample":
            return output
        a, s = self.coefficients(t)
        if self.prediction == "v_prediction":
            return a * x - s * output
        if self.prediction == "flow":
            return x - s * output
        return (x - s * output) / a


@dataclass(frozen=True, eq=False)
class DiffusionSchedule(NoiseSchedule):
    """A table over training timesteps, variance preserving: a^2 + s^2 = 1."""

    a: Tensor  # [N + 1] float32 on the model's device; the last, read at level -1, is the clean end
    s: Tensor

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of levels t [B], each [B, 1, 1, 1] float32."""
        return self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)

    def time(self, t: Tensor) -> Tensor:
        """Training timesteps [B] int64."""
        return t

    def to(self, device: torch.device) -> DiffusionSchedule:
        """The same with its tables on another device."""
        return replace(self, a=self.a.to(device), s=self.s.to(device))

    def _spaced(self, steps: int) -> list[int]:
        self.scheduler.set_timesteps(steps)
        return sorted(int(t) for t in self.scheduler.timesteps)


@dataclass(frozen=True, eq=False)
class FlowSchedule(NoiseSchedule):
    """The straight line from x_0 to eps: a = 1 - sigma, s = sigma."""

    shift: float | None  # mu of dynamic shifting, or None
    even: bool  # whether the pipeline spaces sigma itself, evenly from 1 to 1 / steps

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of levels t [B], each [B, 1, 1, 1] float32."""
        sigma = (t.float() / _FLOW_LEVELS).view(-1, 1, 1, 1)
        return 1 - sigma, sigma

    def time(self, t: Tensor) -> Tensor:
        """Sigma times the number of training timesteps, [B] float32."""
        return t.float() * (float(self.scheduler.config.num_train_timesteps) / _FLOW_LEVELS)

    def _spaced(self, steps: int) -> list[int]:
        given: dict[str, Any] = {"num_inference_steps": steps}
        if self.even:
            given = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        self.scheduler.set_timesteps(**given, mu=self.shift)
        return sorted(round(float(sigma) * _FLOW_LEVELS) for sigma in self.scheduler.sigmas[:-1])


def make_schedule(
    scheduler: Any, *, tokens: int, even: bool, device: torch.device
) -> NoiseSchedule:
    """The noise schedule of a pipeline's scheduler, whatever sampler the pipeline uses.

    Args:
        scheduler: as the pipeline holds it; it is not touched.
        tokens: image tokens of the denoiser's sequence, which dynamic shifting depends on.
        even: see `FlowSchedule`.
        device: where the tables shall lie.

    Raises:
        ModelError: neither a DDPM-type schedule nor Euler steps of a flow.
    """
    name = type(scheduler).__name__
    config: Any = getattr(scheduler, "config", {})
    if name == "FlowMatchEulerDiscreteScheduler":
        if config.invert_sigmas:
            raise ModelError(f"scheduler {name} with invert_sigmas is not supported")
        euler: Any = FlowMatchEulerDiscreteScheduler
        shift = _dynamic_shift(config, tokens) if config.use_dynamic_shifting else None
        return FlowSchedule(euler.from_config(config), "flow", 0, shift, even)
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ModelError(
            f"scheduler {name} has no alphas_cumprod; use a pipeline with a DDPM-type noise "
            "schedule or with FlowMatchEulerDiscreteScheduler"
        )
    if config.get("thresholding"):
        raise ModelError(
            f"scheduler {name} thresholds dynamically, which is not supported; "
            "save the pipeline with thresholding=False"
        )
    # Samplers other than DDIM do not say whether to clip; DDIM's own default would, and
    # latents are no pixels.
    unsaid = {} if "clip_sample" in config else {"clip_sample": False}
    ddim: Any = DDIMScheduler
    try:
        sampler = ddim.from_config(config, **unsaid)
    except NotImplementedError as error:
        raise ModelError(f"scheduler {name}: {error}; DDIM must know its beta_schedule") from error
    prediction = sampler.config.prediction_type
    if prediction not in _PREDICTIONS:
        raise ModelError(
            f"prediction type {prediction!r} is not supported; {', '.join(_PREDICTIONS)} are"
        )
    kept = torch.cat([sampler.alphas_cumprod, sampler.final_alpha_cumprod.view(1)]).float()
    tables = kept.sqrt().to(device), (1 - kept).sqrt().to(device)
    return DiffusionSchedule(sampler, prediction, -1, *tables)


def _dynamic_shift(config: Any, tokens: int) -> float:
    """The shift mu for a sequence length: linear between the two that the scheduler names."""
    slope = (config.max_shift - config.base_shift) / (
        config.max_image_seq_len - config.base_image_seq_len
    )
    return float(config.base_shift + slope * (tokens - config.base_image_seq_len))
