"""Where gradients are taken: noised samples, DDIM inversions and generation paths."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .conditions import Conditions
from .errors import ModelError
from .model import Model
from .objectives import Point


def ddim_grid(model: Model, steps: int) -> list[int]:
    """`steps` noise levels, ascending, spaced as the pipeline's sampler spaces them."""
    return model.schedule.grid(steps)


def shares(levels: str) -> tuple[float, float]:
    """Where a stretch of the noise schedule begins and ends, in [0, 1] from its clean end.

    Raises:
        ModelError: not two shares in ascending order.
    """
    try:
        low, high = (float(share) for share in levels.split("-"))
    except ValueError:
        low = high = math.nan
    if not 0 <= low < high <= 1:
        raise ModelError(
            f"levels {levels!r} is no stretch of the noise schedule; 0-1 is all of it, 0.5-1 its "
            "noisier half"
        )
    return low, high


def stretch(grid: Sequence[int], levels: str) -> Sequence[int]:
    """The part of a grid between two `shares` of it."""
    low, high = (round(share * len(grid)) for share in shares(levels))
    return grid[low:high]


def kept(grid: Sequence[int], count: int) -> list[int]:
    """`count` noise levels of the grid, at the middle of equal stretches.

    Raises:
        ModelError: the grid has none.
    """
    if not grid:
        raise ModelError("no step lies in the recipe's levels; take more steps, or wider levels")
    width = len(grid) / count
    return [grid[int((i + 0.5) * width)] for i in range(count)]


def seeded_noise(seed: int, key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal float32 that depends on the seed and the key alone, on any device."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def noise_path(
    model: Model,
    x_0: Tensor,
    states: Conditions | None,
    null: Conditions | None,
    *,
    timesteps: Sequence[int],
    noise: Tensor,
) -> Iterator[Point]:
    """x_t = a_t x_0 + s_t eps at each timestep; `noise` is [B, T, C, h, w], where x_0 is."""
    for index, timestep in enumerate(timesteps):
        t = _levels(x_0, timestep)
        a, s = model.coefficients(t)
        eps = noise[:, index]
        yield Point(a * x_0 + s * eps, t, x_0, eps, states, null)


@torch.no_grad()
def inversion_path(
    model: Model,
    x_0: Tensor,
    states: Conditions | None,
    null: Conditions | None,
    *,
    grid: Sequence[int],
    timesteps: Sequence[int],
    guidance: float,
) -> list[Point]:
    """DDIM inversion of x_0 along the grid; the points at `timesteps` are kept (no gradient)."""
    x, previous, points = x_0, model.schedule.clean, []
    for timestep in grid:
        t = _levels(x, timestep)
        output = guided_output(model, x, t, states, null, guidance)
        # The step begins at x's own level. There a velocity is read as one; a predicted sample
        # leaves no noise to read at the clean end, so it is read where the denoiser was asked.
        own = _levels(x, previous) if model.schedule.velocity else t
        e = model.schedule.noise(x, output, own)
        a, s = model.coefficients(_levels(x, previous))
        a_next, s_next = model.coefficients(t)
        x = a_next * ((x - s * e) / a) + s_next * e
        if timestep in timesteps:
            points.append(_visited(model, x, timestep, x_0, states, null))
        previous = timestep
    return points


@torch.no_grad()
def generation_path(
    model: Model,
    x_T: Tensor,
    states: Conditions | None,
    null: Conditions | None,
    *,
    grid: Sequence[int],
    timesteps: Sequence[int],
    guidance: float,
) -> tuple[Tensor, list[Point]]:
    """Deterministic DDIM sampling from x_T: x_0, and the points of the path at `timesteps`.

    For a flow these are the sampler's Euler steps.
    """
    x, visited = x_T, []
    for index in reversed(range(len(grid))):
        timestep = grid[index]
        if timestep in timesteps:
            visited.append((timestep, x))
        output = guided_output(model, x, _levels(x, timestep), states, null, guidance)
        end = grid[index - 1] if index else model.schedule.clean
        x = _ddim_step(model, x, output, timestep, end)
    points = [_visited(model, x_t, at, x, states, null) for at, x_t in reversed(visited)]
    return x, points


@torch.no_grad()
def renoised(model: Model, point: Point, eps: Tensor, guidance: float) -> Point:
    """The sample that a guided path expects at its end, noised to the level of `point` by `eps`."""
    output = guided_output(model, point.x_t, point.t, point.states, point.null, guidance)
    x_0 = _expected(model, point.x_t, output, point.t)
    a, s = model.coefficients(point.t)
    eps = eps.to(x_0.device)
    return replace(point, x_t=a * x_0 + s * eps, x_0=x_0, eps=eps)


def _visited(
    model: Model,
    x_t: Tensor,
    timestep: int,
    x_0: Tensor,
    states: Conditions | None,
    null: Conditions | None,
) -> Point:
    """A point of a path that leads to x_0; its noise is what x_t holds beside x_0."""
    t = _levels(x_t, timestep)
    a, s = model.coefficients(t)
    return Point(x_t, t, x_0, (x_t - a * x_0) / s, states, null)


def guided_output(
    model: Model,
    x: Tensor,
    t: Tensor,
    states: Conditions | None,
    null: Conditions | None,
    guidance: float,
) -> Tensor:
    """The denoiser's output f at guidance w: f(null) + w (f(c) - f(null)).

    One forward where there is nothing to guide, or where guidance is distilled into the denoiser
    and its scale is a condition.
    """
    if states is not None and "guidance" in states.tensors:
        return model.output(x, t, states.replaced("guidance", guidance))
    if states is None or null is None or guidance == 1.0:
        return model.output(x, t, states)
    both = model.output(torch.cat([x, x]), torch.cat([t, t]), Conditions.cat([null, states]))
    without, with_text = both.chunk(2)
    return without + guidance * (with_text - without)


def _ddim_step(model: Model, x: Tensor, output: Tensor, start: int, end: int) -> Tensor:
    """Move x from level `start` towards the clean end, to level `end`, as the output says."""
    t = _levels(x, start)
    clean, e = _expected(model, x, output, t), model.schedule.noise(x, output, t)
    if model.schedule.clip is not None:
        a, s = model.coefficients(t)
        e = (x - a * clean) / s
    a, s = model.coefficients(_levels(x, end))
    return a * clean + s * e


def _expected(model: Model, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
    """The clean sample that an output means, within the bounds that the scheduler sets."""
    clean, limit = model.schedule.denoised(x, output, t), model.schedule.clip
    return clean if limit is None else clean.clamp(-limit, limit)


def _levels(x: Tensor, level: int) -> Tensor:
    return torch.full((len(x),), level, dtype=torch.int64, device=x.device)
