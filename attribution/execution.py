"""How the engine runs: settings that change speed, memory and rounding, never what is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ModelError

# cuBLAS repeats only with it, and reads it at its first product, which may come before an engine's.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Execution:
    """Not part of the feature space: rows of two executions agree to rounding."""

    compile: bool = False  # the denoiser as one fused graph; pays off over some thousand images
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    deterministic: bool = True  # the same rows to the bit at every run on one machine

    def __post_init__(self) -> None:
        """Refuse what excludes each other."""
        if self.compile and self.checkpointing:
            raise ModelError(
                "--compile and --low-memory exclude each other: a compiled graph decides itself "
                "what to recompute; leave one out"
            )


def set_checkpointing(denoiser: nn.Module, wanted: bool) -> None:
    """Let a denoiser recompute its blocks' activations in the backward pass, or keep them.

    Raises:
        ModelError: a model that cannot recompute.
    """
    capable = any(hasattr(module, "gradient_checkpointing") for module in denoiser.modules())
    if wanted and not capable:
        raise ModelError(
            f"{type(denoiser).__name__} cannot recompute its activations; "
            "leave --low-memory out and lower --batch-size"
        )
    if capable:
        getattr(denoiser, f"{'enable' if wanted else 'disable'}_gradient_checkpointing")()


@contextmanager
def running(
    execution: Execution, *, device: torch.device | None = None, cudnn_attention: bool = True
) -> Iterator[None]:
    """Kernels that repeat to the bit, where that is asked for, and the caller's setting after.

    A GPU given as `device` is the current one meanwhile: torch.ldexp of 2.11 reads another GPU's
    memory where it is not.

    Without `cudnn_attention` that kind of attention is not used, in forward passes, backward
    passes and those that recompute activations alike.

    Raises:
        ModelError: the model uses an operation that has no repeatable kernel.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # a safeguard that costs time
    torch.use_deterministic_algorithms(execution.deterministic)
    attention: Any = torch.backends.cuda
    through_cudnn = attention.cudnn_sdp_enabled()
    attention.enable_cudnn_sdp(through_cudnn and cudnn_attention)
    on_device = torch.cuda.device(device) if device and device.type == "cuda" else nullcontext()
    try:
        with on_device:
            yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise ModelError(f"{first} Compute with --no-deterministic") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = filled
        attention.enable_cudnn_sdp(through_cudnn)
