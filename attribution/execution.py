"""How the engine runs: settings that change speed, memory and rounding, never what is computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Execution:
    """Not part of the feature space: rows of two executions agree to rounding."""

    compile: bool = False  # fuse the denoiser's blocks; pays off over some hundred images
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    deterministic: bool = True  # the same rows to the bit at every run on one machine
