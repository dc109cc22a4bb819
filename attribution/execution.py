"""How the engine runs: settings that change speed, memory and rounding, never what is computed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ModelError
from .layers import Selection


@dataclass(frozen=True)
class Execution:
    """Not part of the feature space: rows of two executions agree to rounding."""

    compile: bool = False  # fuse the denoiser's blocks; pays off over some hundred images
    checkpointing: bool = False  # recompute activations in the backward pass: less memory
    deterministic: bool = True  # the same rows to the bit at every run on one machine


def prepare(denoiser: nn.Module, selection: Selection, execution: Execution) -> None:
    """Bring a denoiser into the state that an execution asks for, whatever it was before.

    Raises:
        ModelError: checkpointing of a model that cannot do it.
    """
    capable = [m for m in denoiser.modules() if hasattr(m, "gradient_checkpointing")]
    if execution.checkpointing and not capable:
        raise ModelError(
            f"{type(denoiser).__name__} cannot recompute its activations; "
            "leave --low-memory out and lower --batch-size"
        )
    if capable:
        switch = "enable" if execution.checkpointing else "disable"
        getattr(denoiser, f"{switch}_gradient_checkpointing")()
    for module in denoiser.modules():
        module._compiled_call_impl = None
    if execution.compile:
        # A block's code serves all blocks of its class, in every shape and gradient mode.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 256)
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4096)
        torch._functorch.config.donated_buffer = False  # `dps` goes back through a graph twice
        for module in regions(denoiser, selection):
            module.compile(dynamic=False)


def regions(denoiser: nn.Module, selection: Selection) -> list[nn.Module]:
    """The largest modules without a selected layer inside: what can be compiled whole.

    Taps need the selected layers themselves to run as they are. torch's own single layers are
    left out (there is nothing to fuse in them).
    """
    selected = {id(layer.module) for layer in selection.layers}

    def walk(module: nn.Module) -> Iterator[nn.Module]:
        free = not any(id(part) in selected for part in module.modules())
        if free and not type(module).__module__.startswith("torch.nn"):
            yield module
            return
        for child in module.children():
            yield from walk(child)

    return list(walk(denoiser))


@contextmanager
def running(execution: Execution) -> Iterator[None]:
    """Kernels that repeat to the bit, where that is asked for, and the caller's setting after.

    Raises:
        ModelError: the model uses an operation that has no repeatable kernel.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # a safeguard that costs time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with it
    torch.use_deterministic_algorithms(execution.deterministic)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise ModelError(f"{first} Compute with --no-deterministic") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        settings.fill_uninitialized_memory = filled


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled blocks run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield
