"""Where gradients are taken: noised samples, DDIM inversions and generation paths."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError
from .model import Model
from .objectives import Point


def ddim_grid(model: Model, steps: int) -> list[int]:
    """`steps` training timesteps, ascending, spaced as the scheduler's sampler spaces them."""
    levels = model.scheduler.config.num_train_timesteps
    if not 1 <= steps <= levels:
        raise ModelError(f"steps is {steps}; the model's schedule has {levels} noise levels")
    model.scheduler.set_timesteps(steps)
    return sorted(int(t) for t in model.scheduler.timesteps)


def kept(grid: Sequence[int], count: int) -> list[int]:
    """`count` noise levels of the grid, at the middle of equal stretches."""
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
    states: Tensor | None,
    null: Tensor | None,
    *,
    timesteps: Sequence[int],
    noise: Tensor,
) -> Iterator[Point]:
    """x_t = a_t x_0 + s_t eps at each timestep; `noise` is [B, T, C, h, w]."""
    for index, timestep in enumerate(timesteps):
        t = torch.full((len(x_0),), timestep, dtype=torch.int64, device=x_0.device)
        a, s = model.coefficients(t)
        eps = noise[:, index].to(x_0.device)
        yield Point(a * x_0 + s * eps, t, x_0, eps, states, null)


@torch.no_grad()
def inversion_path(
    model: Model,
    x_0: Tensor,
    states: Tensor | None,
    null: Tensor | None,
    *,
    grid: Sequence[int],
    timesteps: Sequence[int],
    guidance: float,
) -> list[Point]:
    """DDIM inversion of x_0 along the grid; the points at `timesteps` are kept (no gradient)."""
    x, previous, points = x_0, -1, []
    for timestep in grid:
        e = guided_noise(model, x, timestep, states, null, guidance)
        x = ddim_step(model, x, e, previous, timestep)
        if timestep in timesteps:
            points.append(_visited(model, x, timestep, x_0, states, null))
        previous = timestep
    return points


@torch.no_grad()
def generation_path(
    model: Model,
    x_T: Tensor,
    states: Tensor | None,
    null: Tensor | None,
    *,
    grid: Sequence[int],
    timesteps: Sequence[int],
    guidance: float,
) -> tuple[Tensor, list[Point]]:
    """Deterministic DDIM sampling from x_T: x_0, and the points of the path at `timesteps`."""
    x, visited = x_T, []
    for index in reversed(range(len(grid))):
        timestep = grid[index]
        if timestep in timesteps:
            visited.append((timestep, x))
        e = guided_noise(model, x, timestep, states, null, guidance)
        x = ddim_step(model, x, e, timestep, grid[index - 1] if index else -1)
    points = [_visited(model, x_t, at, x, states, null) for at, x_t in reversed(visited)]
    return x, points


def _visited(
    model: Model,
    x_t: Tensor,
    timestep: int,
    x_0: Tensor,
    states: Tensor | None,
    null: Tensor | None,
) -> Point:
    """A point of a path that leads to x_0; its noise is what x_t holds beside x_0."""
    t = torch.full((len(x_t),), timestep, dtype=torch.int64, device=x_t.device)
    a, s = model.coefficients(t)
    return Point(x_t, t, x_0, (x_t - a * x_0) / s, states, null)


def guided_noise(
    model: Model,
    x: Tensor,
    timestep: int,
    states: Tensor | None,
    null: Tensor | None,
    guidance: float,
) -> Tensor:
    """e(null) + guidance (e(c) - e(null)); one forward where there is nothing to guide."""
    t = torch.full((len(x),), timestep, dtype=torch.int64, device=x.device)
    if states is None or null is None or guidance == 1.0:
        return model.noise(x, t, states)
    both = model.noise(torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, states]))
    without, with_text = both.chunk(2)
    return without + guidance * (with_text - without)


def ddim_step(model: Model, x: Tensor, e: Tensor, start: int, end: int) -> Tensor:
    """Move x from timestep `start` to `end` along e, in either direction; -1 is the clean end."""
    a_0, s_0 = _level(model, start)
    a_1, s_1 = _level(model, end)
    clean = (x - s_0 * e) / a_0
    if model.scheduler.config.clip_sample and end < start:
        limit = model.scheduler.config.clip_sample_range
        clean = clean.clamp(-limit, limit)
        e = (x - a_0 * clean) / s_0
    return a_1 * clean + s_1 * e


def _level(model: Model, timestep: int) -> tuple[float, float]:
    kept = (
        model.scheduler.final_alpha_cumprod
        if timestep < 0
        else model.scheduler.alphas_cumprod[timestep]
    )
    return float(kept) ** 0.5, float(1 - kept) ** 0.5
