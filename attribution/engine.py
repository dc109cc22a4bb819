"""The one engine: a forward pass, a cotangent, and projected per-sample gradients of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .conditions import Conditions
from .execution import Execution
from .layers import Selection, parameter_gradients, select_parameters
from .model import Model, exact_convolutions
from .objectives import METHODS, Cotangent, Point
from .projection import Projector, make_projector
from .recipe import Recipe, resolved
from .trajectory import ddim_grid, inversion_path, kept, noise_path, seeded_noise


@dataclass(frozen=True)
class Rows:
    """Features of a batch."""

    features: Tensor  # [B, dim] float32
    weights: Tensor  # [B] float32: factor of each row's score (the loss for DAS, else 1)
    norms: Tensor  # [B] float32: mean norm of the whole gradient, before scaling and projection


class Engine:
    """Computes rows for one model and one recipe; holds no state that depends on the data."""

    def __init__(self, model: Model, recipe: Recipe, execution: Execution | None = None) -> None:
        self.model = model
        self.recipe = recipe = resolved(recipe, model)
        self.execution = execution or Execution()
        self.method = METHODS[recipe.method]
        self.selection: Selection = select_parameters(model.denoiser, recipe.parameters)
        self.projector: Projector = make_projector(
            recipe.projection, slots=self.selection.slots, dim=recipe.dim, seed=recipe.seed
        )
        self.grid = ddim_grid(model, recipe.steps)
        self.timesteps = kept(self.grid, recipe.timesteps)

    def rows(self, x_0: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Rows:
        """Training rows of a batch; each depends on its own image, caption and key alone.

        Args:
            x_0: [B, C, h, w] clean samples, as `Model.encode_images` gives them.
            captions: one per image.
            keys: one per image; names its noise, so that batches can be cut anywhere.
        """
        x_0 = x_0.to(self.model.device)
        features = torch.zeros(len(x_0), self.projector.dim, device=x_0.device)
        loss = torch.zeros(len(x_0), device=x_0.device)
        norms = torch.zeros(len(x_0), device=x_0.device)
        for point in self.points(x_0, captions, keys):
            gradient, norm, e = self.method_gradient(point)
            features += gradient
            norms += norm
            loss += (e - point.eps).square().flatten(1).mean(1)
        count = len(self.timesteps)
        weights = loss / count if self.method.loss_weight else torch.ones_like(loss)
        return Rows(features, weights, norms / count)

    def points(self, x_0: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Iterable[Point]:
        """The noise levels of a batch, on the recipe's trajectory."""
        states, null = self.states(captions)
        if self.recipe.trajectory == "inversion":
            return inversion_path(
                self.model,
                x_0,
                states,
                null,
                grid=self.grid,
                timesteps=self.timesteps,
                guidance=self.recipe.guidance,
            )
        shape = (len(self.timesteps), *x_0.shape[1:])
        if self.recipe.noise == "shared":
            keys = ["shared"] * len(keys)
        noise = torch.stack([seeded_noise(self.recipe.seed, key, shape) for key in keys])
        return noise_path(self.model, x_0, states, null, timesteps=self.timesteps, noise=noise)

    def states(self, captions: Sequence[str]) -> tuple[Conditions | None, Conditions | None]:
        """What the captions let the denoiser hear and, beside it, as many empty prompts."""
        return self.model.encode_prompts(captions), self.model.encode_prompts([""] * len(captions))

    def method_gradient(self, point: Point) -> tuple[Tensor, Tensor, Tensor]:
        """`gradient` with the cotangent of the recipe's method."""
        return self.gradient(point, self.method.cotangent, self.method.through_input)

    def gradient(
        self, point: Point, cotangent: Cotangent, through_input: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected per-sample gradient J^T v at one point, scaled to unit norm.

        The norm is that of the whole gradient, before projection. A zero gradient stays zero.
        `through_input` says that the cotangent differentiates with respect to `point.x_t`.

        Returns:
            [B, dim] float32, the norm [B] and the noise prediction e [B, C, h, w].
        """
        projected, norm, e = self.raw_gradient(point, cotangent, through_input)
        return projected / norm.where(norm != 0, 1.0)[:, None], norm, e

    def raw_gradient(
        self, point: Point, cotangent: Cotangent, through_input: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `gradient`, unscaled, with the exact norm [B] of the whole gradient."""
        point = replace(point, x_t=point.x_t.detach().requires_grad_(through_input))
        with torch.enable_grad(), exact_convolutions(), _Capture(self.selection) as calls:
            e = self.model.noise(point.x_t, point.t, point.states)
            v = cotangent(self.model, point, e)
            outputs = [output for _, _, output in calls]
            grads = torch.autograd.grad(e, outputs, v, allow_unused=True)
        return *self._project(calls, grads, len(point.x_t)), e.detach()

    @torch.no_grad()
    def _project(
        self, calls: list[tuple[str, Tensor, Tensor]], grads: Sequence[Tensor | None], batch: int
    ) -> tuple[Tensor, Tensor]:
        device = self.model.device
        projected = torch.zeros(batch, self.projector.dim, device=device)
        square = torch.zeros(batch, device=device)
        for layer in self.selection.layers:
            total: dict[str, Tensor] = {}
            for (name, inputs, _), grad in zip(calls, grads, strict=True):
                if name == layer.name and grad is not None:
                    for role, part in parameter_gradients(layer.module, inputs, grad).items():
                        total[role] = total[role] + part if role in total else part
            for slot in layer.slots:
                if slot.role in total:
                    flat = total[slot.role].reshape(batch, -1)
                    self.projector.add(projected, square, flat, slot)
        return projected, square.sqrt()


class _Capture:
    """Records (layer, input, output) of every call of the selected layers during a forward."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._handles: list[Any] = []

    def __enter__(self) -> list[tuple[str, Tensor, Tensor]]:
        calls: list[tuple[str, Tensor, Tensor]] = []
        for layer in self._selection.layers:

            def record(
                _module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = layer.name
            ) -> None:
                if torch.is_grad_enabled():
                    if not output.requires_grad:  # the graph begins at the first selected layer
                        output.requires_grad_()
                    calls.append((name, args[0].detach(), output))

            self._handles.append(layer.module.register_forward_hook(record))
        return calls

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
