"""Pictures with noise at fixed levels, and what many stacked models predict of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwater.attribution import Model, kept, seeded_noise
from headwater.attribution.conditions import Conditions
from headwater.benchmarks.material import Pictures
from headwater.benchmarks.retraining import text_states, with_denoiser

SAMPLES = 4096  # through all models of a stack at once


@dataclass(frozen=True)
class Noised:
    """P pictures, each at T noise levels, with a draw of noise that its key names for each."""

    x_0: Tensor  # [P, C, h, w]
    states: Tensor  # [P, L, D] what their captions say
    t: Tensor  # [T]
    noise: Tensor  # [P, T, C, h, w]


@dataclass(frozen=True)
class Predicted:
    """A batch of b noised pictures, and the predictions of M models."""

    picture: Tensor  # [b] positions
    x_t: Tensor  # [b, C, h, w]
    t: Tensor  # [b]
    residual: Tensor  # [b, M, C h w] prediction less noise
    eps: Tensor  # [b, C, h, w]


def noised(base: Model, pictures: Pictures, levels: int) -> Noised:
    """Pictures at `levels` noise levels, evenly spread over the base's schedule."""
    grid = range(len(base.schedule.scheduler.alphas_cumprod))
    shape = (levels, *pictures.x_0.shape[1:])
    noise = torch.stack([seeded_noise(0, f"utility/{key}", shape) for key in pictures.keys])
    return Noised(
        pictures.x_0,
        text_states(base, pictures.captions),
        torch.tensor(kept(grid, levels), device=base.device),
        noise.to(base.device),
    )


@torch.no_grad()
def predicted(
    base: Model, stacked: nn.Module, given: Noised, samples: int = SAMPLES
) -> Iterator[Predicted]:
    """Batches of all (picture, level), as stacked models predict them, each with its caption."""
    model = with_denoiser(base, stacked)
    models = len(next(stacked.parameters()))
    places = torch.cartesian_prod(torch.arange(len(given.x_0)), torch.arange(len(given.t)))
    for part in places.to(base.device).split(max(1, samples // models)):
        p, level = part.unbind(1)
        t, eps = given.t[level], given.noise[p, level]
        a, s = base.coefficients(t)
        x_t = a * given.x_0[p] + s * eps
        e = model.noise(
            x_t.repeat_interleave(models, 0),
            t.repeat_interleave(models),
            heard(given.states[p].repeat_interleave(models, 0)),
        )
        residual = e.view(len(p), models, -1) - eps.flatten(1)[:, None]
        yield Predicted(p, x_t, t, residual, eps)


def heard(states: Tensor) -> Conditions:
    """Text states [B, L, D] as a Stable Diffusion's denoiser takes them."""
    return Conditions({"encoder_hidden_states": states})
