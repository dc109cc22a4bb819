"""The denoiser compiled as one graph, and per-sample gradients read off it.

A compiled backward pass calls nobody back. So a zero tensor is added to every selected layer's
output: it is an input of the graph, and its gradient is the gradient of that output; the layers'
inputs come out beside e. The zeros are one number each (stride 0), and adding them fuses with
whatever follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .capture import check_batch, project, with_call
from .layers import Layer, Selection
from .projection import Projector


class CompiledDenoiser:
    """A denoiser that runs compiled for as long as this is wired to it."""

    def __init__(self, denoiser: nn.Module, selection: Selection, projector: Projector) -> None:
        unwire(denoiser)
        self._selection = selection
        self._projector = projector
        self._calls: dict[str, list[int]] = {}  # layer name -> which calls of a forward are its
        self._taps: list[Tensor] = []  # one for each call
        self._inputs: list[Tensor] | None = None  # of the calls, while they are captured
        self._handles: list[Any] = [
            layer.module.register_forward_hook(self._tap) for layer in selection.layers
        ]
        # Another batch size, gradient mode or precision is another graph of the same code.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        torch._functorch.config.donated_buffer = False  # `dps` goes back through a graph twice
        denoiser.compile(dynamic=False)
        self.wired = True  # until a later engine takes the denoiser over
        _WIRED[denoiser] = self

    def _tap(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._inputs is None or not torch.is_grad_enabled():
            return None
        self._inputs.append(args[0])
        return output + self._taps[len(self._inputs) - 1]

    def measure(self, forward: Callable[[], object], batch: int) -> None:
        """Learn from one uncompiled forward pass which layers are called, and with what shapes."""
        self._calls, self._taps = {}, []
        handles = []
        for layer in self._selection.layers:

            def note(_m: nn.Module, _a: object, output: Tensor, layer: Layer = layer) -> None:
                check_batch(layer, output, batch)
                zero = torch.zeros((), dtype=output.dtype, device=output.device)
                self._calls.setdefault(layer.name, []).append(len(self._taps))
                self._taps.append(zero.expand(output.shape).requires_grad_())

            handles.append(layer.module.register_forward_hook(note))
        try:
            with torch.no_grad():
                forward()
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def capture(self) -> Iterator[CompiledDenoiser]:
        """The next forward pass with gradients is captured; `pull` then gives them."""
        self._inputs = []
        try:
            yield self
        finally:
            self._inputs = None

    def pull(
        self, e: Tensor, cotangent: Tensor, unit_layers: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `Capture.pull`."""
        assert self._inputs is not None
        rows = torch.zeros(len(e), self._projector.dim, device=e.device)
        square = torch.zeros(len(e), device=e.device)
        gradients = torch.autograd.grad(e, self._taps, cotangent, allow_unused=True)
        with torch.no_grad():
            for layer in self._selection.layers:
                found: dict[str, Tensor] = {}
                for call in self._calls.get(layer.name, ()):
                    if (gradient := gradients[call]) is not None:
                        found = with_call(found, layer, self._inputs[call], gradient)
                project(self._projector, layer, found, rows, square, unit_layers)
        return rows, square.sqrt()


_WIRED: WeakKeyDictionary[nn.Module, CompiledDenoiser] = WeakKeyDictionary()


def unwire(denoiser: nn.Module) -> None:
    """Let a denoiser run as it is written."""
    denoiser._compiled_call_impl = None
    wired = _WIRED.pop(denoiser, None)
    if wired is not None:
        wired.wired = False
        for handle in wired._handles:
            handle.remove()
