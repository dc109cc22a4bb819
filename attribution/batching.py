"""How many images to compute at once: as many as still make it faster and fit in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .engine import Engine
from .trajectory import guided_output, seeded_noise

CPU_BATCH = 16  # the caches are full long before
LARGEST = 1024
SHARE = 0.8  # of the free memory; the rest is for fragmentation and for kernels' workspaces
GAIN = 1.04  # a doubled batch must be faster per image by so much, or it only costs memory


@dataclass(frozen=True)
class BatchChoice:
    """A batch size and what it costs."""

    batch_size: int
    bytes_fixed: int  # of device memory, whatever the batch: the model itself (0 on a CPU)
    bytes_per_image: int  # of device memory (0 on a CPU)
    seconds_per_image: float  # for a whole row, estimated from one point of the trajectory


def choose_batch(engine: Engine, largest: int = LARGEST) -> BatchChoice:
    """Measure the engine on noise, at doubling batch sizes, and choose.

    Sizes are powers of two, so that they divide a shard. The denoiser is measured uncompiled:
    compiling at every size would take longer than it tells.
    """
    cuda = engine.model.device.type == "cuda"
    size = 1 if cuda else min(CPU_BATCH, largest)
    with engine.uncompiled():
        best = _measure(engine, size)
        while cuda and size * 2 <= largest:
            free = torch.cuda.mem_get_info(engine.model.device)[0]
            needed = best.bytes_per_image * size * 2
            if needed > SHARE * (
                free + torch.cuda.memory_reserved(engine.model.device) - best.bytes_fixed
            ):
                break
            size *= 2
            try:
                found = _measure(engine, size)
            except torch.OutOfMemoryError:
                break
            if found.seconds_per_image * GAIN > best.seconds_per_image:
                break
            best = found
    if cuda:
        torch.cuda.empty_cache()
    return best


def _measure(engine: Engine, size: int) -> BatchChoice:
    """Time and memory of one point of the trajectory, after one run that is not counted."""
    model, recipe = engine.model, engine.recipe
    cuda = model.device.type == "cuda"
    keys = [f"measure/{i}" for i in range(size)]
    x_0 = torch.stack([seeded_noise(recipe.seed, key, model.sample_shape) for key in keys])
    # What refuses an empty caption takes classes, and has a first one.
    caption = "0" if model.refuses("") else ""
    states, null = engine.states([caption] * size)
    point = next(iter(engine.noised(x_0.to(model.device), states, null, keys)))
    inverted = recipe.trajectory == "inversion"

    def run() -> None:
        engine.row_gradient(point)

    def walk() -> None:
        with torch.no_grad():
            guided_output(model, point.x_t, point.t, states, null, recipe.guidance)

    fixed = torch.cuda.memory_allocated(model.device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = len(engine.timesteps) * _seconds(run, model.device)
    if inverted:
        seconds += len(engine.grid) * _seconds(walk, model.device)
    peak = torch.cuda.max_memory_allocated(model.device) if cuda else 0
    return BatchChoice(size, fixed, (peak - fixed) // size, seconds / size)


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
