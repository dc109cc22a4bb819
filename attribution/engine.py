"""The one engine: a forward pass, a cotangent, and projected per-sample gradients of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .capture import Capture
from .compiled import CompiledDenoiser, unwire
from .conditions import Conditions
from .execution import Execution, running, set_checkpointing
from .layers import Selection, select_parameters
from .model import Model
from .objectives import Cotangent, Point, method_of
from .projection import Projector, make_projector
from .recipe import Recipe, resolved
from .trajectory import (
    ddim_grid,
    guided_output,
    inversion_path,
    kept,
    noise_path,
    seeded_noise,
    stretch,
)

# Relative difference of compiled and uncompiled rows that rounding explains. Torch's compiler has
# produced wrong gradients (2.13 on a CPU: a UNet's first up block), so the first batch is checked.
_COMPILED = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.1}


@dataclass(frozen=True)
class Rows:
    """Features of a batch."""

    features: Tensor  # [B, dim] float32
    weights: Tensor  # [B] float32: factor of each row's score (of DAS from its loss, else 1)
    norms: Tensor  # [B] float32: mean norm of the whole gradient, before scaling and projection


class Engine:
    """Computes rows for one model and one recipe; holds no state that depends on the data."""

    def __init__(self, model: Model, recipe: Recipe, execution: Execution | None = None) -> None:
        self.model = model
        self.recipe = recipe = resolved(recipe, model)
        self.execution = execution or Execution()
        self.method = method_of(recipe.method, recipe.seed)
        self.selection: Selection = select_parameters(model.denoiser, recipe.parameters)
        self.projector: Projector = make_projector(
            recipe.projection, slots=self.selection.slots, dim=recipe.dim, seed=recipe.seed
        )
        set_checkpointing(model.denoiser, self.execution.checkpointing)
        unwire(model.denoiser)
        self._graph: CompiledDenoiser | None = None
        # Size of every batch where rows shall repeat to the bit: they depend on it in rounding.
        # Compiled batches have it too (0: that of the first): a smaller one is filled up, a larger
        # one runs uncompiled rather than compile anew.
        self.batch_size = 0
        self._tried = False
        if self.execution.compile:
            self._graph = CompiledDenoiser(model.denoiser, self.selection, self.projector)
        self.grid = ddim_grid(model, recipe.steps)
        self.timesteps = kept(stretch(self.grid, recipe.levels), recipe.timesteps)

    def rows(self, x_0: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Rows:
        """Training rows of a batch; each depends on its own image, caption and key alone.

        Args:
            x_0: [B, C, h, w] clean samples, as `Model.encode_images` gives them.
            captions: one per image.
            keys: one per image; names its noise, so that batches can be cut anywhere.
        """
        if self._graph is None:
            return self._rows(x_0, captions, keys)
        self.batch_size = self.batch_size or len(x_0)
        count, missing = len(x_0), max(0, self.batch_size - len(x_0))
        x_0 = torch.cat([x_0, x_0[-1:].expand(missing, *x_0.shape[1:])])
        captions = [*captions, *[captions[-1]] * missing]
        keys = [*keys, *[keys[-1]] * missing]
        if len(x_0) > self.batch_size:
            with self.uncompiled():
                return self._rows(x_0, captions, keys)
        if not self._tried:
            self._try_graph(self._graph, x_0, captions, keys)
        rows = self._rows(x_0, captions, keys)
        return Rows(rows.features[:count], rows.weights[:count], rows.norms[:count])

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """The denoiser runs as it is written."""
        graph, self._graph = self._graph, None
        try:
            # It may be compiled for another engine.
            compiled = self.model.denoiser._compiled_call_impl is not None
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                yield
        finally:
            self._graph = graph

    def _try_graph(
        self,
        graph: CompiledDenoiser,
        x_0: Tensor,
        captions: Sequence[str],
        keys: Sequence[str],
    ) -> None:
        """Go on uncompiled, with a warning, if the compiled graph gives another e or gradient."""
        states, null = self.states(captions)
        point = next(iter(self.noised(x_0.to(self.model.device), states, null, keys)))

        through = self.method.through_input

        def checked() -> Tensor:
            gradient, norm, e = self.raw_gradient(point, self.method.cotangent, through)
            parts = [e.flatten(1) / e.flatten(1).norm(dim=1, keepdim=True), _unit(gradient, norm)]
            if self.recipe.trajectory == "inversion":  # passes without gradients: another graph
                with torch.no_grad():
                    given = (point.x_t, point.t, states, null, self.recipe.guidance)
                    e = guided_output(self.model, *given).flatten(1)
                parts.append(e / e.norm(dim=1, keepdim=True))
            return torch.cat(parts, 1)

        with self.uncompiled():
            graph.measure(lambda: self.model.output(point.x_t, point.t, states), len(x_0))
            plain = checked()
        self._tried = True
        try:
            difference = float((checked() - plain).norm() / plain.norm())
            if difference <= _COMPILED[self.recipe.dtype]:
                return
            reason = (
                f"the compiled model's gradients differ by {difference:.2g} from the uncompiled "
                "one's, more than rounding explains"
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # the compiler's own
            reason = f"the model cannot be compiled: {str(error).strip().splitlines()[0]}"
        warnings.warn(f"{reason}; going on uncompiled", stacklevel=3)
        unwire(self.model.denoiser)
        self.execution = replace(self.execution, compile=False)
        self._graph = None

    def _rows(self, x_0: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Rows:
        x_0 = x_0.to(self.model.device)
        features = torch.zeros(len(x_0), self.projector.dim, device=x_0.device)
        norms = torch.zeros(len(x_0), device=x_0.device)
        losses = []
        for point in self.points(x_0, captions, keys):
            gradient, norm, e = self.row_gradient(point)
            features += gradient
            norms += norm
            losses.append((e - point.eps).square().flatten(1).mean(1))
        weight = self.method.weight
        weights = torch.ones_like(norms) if weight is None else weight(torch.stack(losses))
        return Rows(features, weights, norms / len(self.timesteps))

    def points(self, x_0: Tensor, captions: Sequence[str], keys: Sequence[str]) -> Iterable[Point]:
        """The noise levels of a batch, on the recipe's trajectory."""
        states, null = self.states(captions)
        if self.recipe.trajectory == "inversion":
            with self._running():
                return inversion_path(
                    self.model,
                    x_0,
                    states,
                    null,
                    grid=self.grid,
                    timesteps=self.timesteps,
                    guidance=self.recipe.guidance,
                )
        return self.noised(x_0, states, null, keys)

    def noised(
        self,
        x_0: Tensor,
        states: Conditions | None,
        null: Conditions | None,
        keys: Sequence[str],
    ) -> Iterable[Point]:
        """x_0 with drawn noise, at every noise level."""
        # Copied once: a copy at every level would make the host wait for the level before.
        noise = self.noise(keys, x_0.shape[1:]).to(x_0.device)
        return noise_path(self.model, x_0, states, null, timesteps=self.timesteps, noise=noise)

    def noise(self, keys: Sequence[str], sample: Sequence[int]) -> Tensor:
        """The noise of each key at every noise level, of samples (C, h, w): [B, T, C, h, w]."""
        shape = (len(self.timesteps), *sample)
        if self.recipe.noise == "shared":
            keys = ["shared"] * len(keys)
        with ThreadPoolExecutor() as threads:  # numpy draws without the interpreter's lock
            drawn = list(threads.map(partial(seeded_noise, self.recipe.seed, shape=shape), keys))
        return torch.stack(drawn)

    def states(self, captions: Sequence[str]) -> tuple[Conditions | None, Conditions | None]:
        """What the captions let the denoiser hear and, beside it, as many empty prompts."""
        heard = self.model.encode_prompts(captions, apart=self.batch_size > 0)
        return heard, self.model.encode_prompts([""] * len(captions))

    def row_gradient(self, point: Point) -> tuple[Tensor, Tensor, Tensor]:
        """What one noise level adds to a row: `method_gradient`, or what the caption changes in it.

        Norm and e are the caption's in either case.
        """
        gradient, norm, e = self.method_gradient(point)
        if self.method.against_null:
            gradient = gradient - self.method_gradient(replace(point, states=point.null))[0]
        return gradient, norm, e

    def method_gradient(self, point: Point) -> tuple[Tensor, Tensor, Tensor]:
        """`gradient` with the cotangent of the recipe's method."""
        return self.gradient(point, self.method.cotangent, self.method.through_input)

    def gradient(
        self, point: Point, cotangent: Cotangent, through_input: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected per-sample gradient J^T v at one point, scaled as the recipe says.

        The norm is that of the whole gradient, before scaling and projection. A zero gradient
        stays zero. `through_input` says that the cotangent differentiates with respect to
        `point.x_t`.

        Returns:
            [B, dim] float32, the norm [B] and the noise prediction e [B, C, h, w].
        """
        scaling = self.recipe.scaling
        projected, norm, factor, e = self._pulled(
            point, cotangent, through_input, unit_layers=scaling == "layer"
        )
        if scaling == "timestep":
            projected = _unit(projected, norm)
        elif scaling == "none":
            projected = projected / factor[:, None]
        return projected, norm / factor, e

    def raw_gradient(
        self, point: Point, cotangent: Cotangent, through_input: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `gradient`, unscaled, with the exact norm [B] of the whole gradient."""
        projected, norm, factor, e = self._pulled(point, cotangent, through_input)
        return projected / factor[:, None], norm / factor, e

    def _pulled(
        self, point: Point, cotangent: Cotangent, through_input: bool, unit_layers: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `raw_gradient`, of the cotangent times a factor [B], which comes third."""
        point = replace(point, x_t=point.x_t.detach().requires_grad_(through_input))
        with torch.enable_grad(), self._running(), self._capture(point) as capture:
            e = self.model.noise(point.x_t, point.t, point.states)
            v = cotangent(self.model, point, e)
            factor = _power_of_two(v)
            v = v * factor.view(-1, *[1] * (v.ndim - 1))
            projected, norm = capture.pull(e, v, unit_layers)
        return projected, norm, factor, e.detach()

    def _running(self) -> AbstractContextManager[None]:
        return running(
            self.execution,
            device=self.model.device,
            cudnn_attention=self.model.family.cudnn_attention,
        )

    @contextmanager
    def _capture(self, point: Point) -> Iterator[Capture | CompiledDenoiser]:
        batch = len(point.x_t)
        if (
            self._graph is not None
            and self._graph.wired
            and self._tried
            and (batch == self.batch_size)
        ):
            with self._graph.capture() as captured:
                yield captured
            return
        with (
            self.uncompiled(),
            Capture(self.selection, self.projector, batch, point.x_t.device) as capture,
        ):
            yield capture


def _unit(projected: Tensor, norm: Tensor) -> Tensor:
    """Rows [B, dim] over the norms [B] of their gradients; zero where the gradient is."""
    return projected / norm.where(norm != 0, 1.0)[:, None]


def _power_of_two(v: Tensor) -> Tensor:
    """A factor [B] that brings each cotangent near unit size: half precision neither overflows
    nor underflows, and the result, divided by it, is exactly the unscaled one."""
    _, exponent = torch.frexp(v.flatten(1).norm(dim=1) / v[0].numel() ** 0.5)
    return torch.ldexp(torch.ones_like(exponent, dtype=v.dtype), -exponent)
