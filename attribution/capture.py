"""Per-sample gradients caught during the backward pass, and projected one layer at a time.

Every selected layer's output passes through a tap, which saves the layer's input. When the
backward pass reaches the tap, the gradient of that layer alone is formed, projected and freed:
the full gradient of a batch never exists. The taps hang on one anchor tensor, so differentiating
with respect to it runs exactly the part of the graph that they need.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError
from .layers import Layer, Selection, parameter_gradients
from .projection import Projector


class Capture:
    """Taps on the selected layers, for one forward pass and the backward passes through it.

    >>> with Capture(selection, projector, batch, device) as capture:
    ...     e = denoiser(...)
    ...     rows, norms = capture.pull(e, cotangent)
    """

    def __init__(
        self, selection: Selection, projector: Projector, batch: int, device: torch.device
    ) -> None:
        self._selection = selection
        self._projector = projector
        self._batch = batch
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self._calls: dict[str, int] = {}  # layer name -> taps whose gradient is still to come
        self._parts: dict[str, dict[str, Tensor]] = {}  # of layers that were called several times
        self._rows = torch.zeros(batch, projector.dim, device=device)
        self._square = torch.zeros(batch, device=device)
        self._pulling = self._unit_layers = False
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        """Set the taps."""
        for layer in self._selection.layers:

            def tap(
                _module: nn.Module, args: tuple[Tensor, ...], output: Tensor, layer: Layer = layer
            ) -> Tensor | None:
                if not torch.is_grad_enabled():
                    return None
                # In a backward pass a checkpointed block is called again: the same call.
                if torch._C._current_graph_task_id() == -1:
                    self._calls[layer.name] = self._calls.get(layer.name, 0) + 1
                check_batch(layer, output, self._batch)
                return _tap(output, self.anchor, args[0].detach(), layer, self)

            self._handles.append(layer.module.register_forward_hook(tap))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the taps."""
        for handle in self._handles:
            handle.remove()
        self._parts.clear()

    def pull(
        self, e: Tensor, cotangent: Tensor, unit_layers: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Pull a cotangent of e [B, ...] back to the parameters; frees the graph.

        Returns:
            Projected per-sample gradients [B, dim], with `unit_layers` each layer's part of unit
            norm, and the exact norms [B] of the whole gradients, float32.
        """
        self._pulling, self._unit_layers = True, unit_layers
        if self._calls:
            torch.autograd.grad(e, self.anchor, cotangent, allow_unused=True)
        # A call whose output does not reach e gets no gradient, and its layer waits for it.
        for layer in self._selection.layers:
            waiting = self._parts.pop(layer.name, {})
            self._project(layer, waiting)
        return self._rows, self._square.sqrt()

    @torch.no_grad()
    def arrived(self, layer: Layer, inputs: Tensor, gradient: Tensor) -> None:
        """Take the gradient of one call's output; project when the layer's last call is in."""
        if not self._pulling:  # a backward pass to x_t, made for a cotangent
            return
        found = with_call(self._parts.pop(layer.name, {}), layer, inputs, gradient)
        self._calls[layer.name] -= 1
        if self._calls[layer.name]:
            self._parts[layer.name] = found
        else:
            self._project(layer, found)

    def _project(self, layer: Layer, found: dict[str, Tensor]) -> None:
        project(self._projector, layer, found, self._rows, self._square, self._unit_layers)


def with_call(
    earlier: dict[str, Tensor], layer: Layer, inputs: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """The selected per-sample gradients of a call, added to those of the layer's earlier calls."""
    roles = {slot.role for slot in layer.slots}
    found = parameter_gradients(layer.module, inputs, gradient, roles)
    return {role: part + earlier[role] if earlier else part for role, part in found.items()}


def project(
    projector: Projector,
    layer: Layer,
    found: dict[str, Tensor],
    rows: Tensor,
    square: Tensor,
    unit: bool,
) -> None:
    """Add a layer's per-sample gradients to the rows [B, dim] and their squared norms [B].

    With `unit`, each row gets the layer's gradient over its norm; `square` is of the gradient.
    """
    if unit:
        part, length = torch.zeros_like(rows), torch.zeros_like(square)
        project(projector, layer, found, part, length, unit=False)
        rows += part / length.where(length != 0, 1.0).sqrt()[:, None]
        square += length
        return
    for slot in layer.slots:
        if slot.role in found:
            flat = found[slot.role].reshape(len(rows), -1)
            projector.add(rows, square, flat, slot)


def check_batch(layer: Layer, output: Tensor, batch: int) -> None:
    """Refuse a layer that sees something else than one row per sample."""
    if len(output) != batch:
        raise ModelError(
            f"layer {layer.name} is called with {len(output)} rows for a batch of {batch}: "
            "it has no per-sample gradient; narrow --parameters"
        )


def _tap(*arguments: Any) -> Tensor:
    tapped: Tensor = _Tap.apply(*arguments)  # type: ignore[no-untyped-call]
    return tapped


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass reports the gradient that flows through it."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, layer: Layer, capture: Capture
    ) -> Tensor:
        ctx.save_for_backward(inputs)  # saved so that checkpointing may drop and recompute it
        ctx.layer, ctx.capture = layer, capture
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        (inputs,) = ctx.saved_tensors
        ctx.capture.arrived(ctx.layer, inputs, gradient)
        return gradient, None, None, None, None
