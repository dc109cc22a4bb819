"""Methods as cotangents: what is pulled back through the denoiser to make a training row.

Every row is J^T v with J = d e(x_t, t, c) / d theta. Vectors of the loss-like methods follow one
sign convention: v points where a loss grows, so that two rows with a positive inner product help
each other when one of them is trained on. The output functionals of D-TRAK and DAS are no loss;
they may be compared with themselves (image and contrast queries), where any sign cancels, but
against a reward they have no direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .conditions import Conditions
from .model import Model


@dataclass(frozen=True)
class Point:
    """One noise level of a batch, before the forward pass."""

    x_t: Tensor  # [B, C, h, w] float32
    t: Tensor  # [B] int64 levels of the model's noise schedule
    x_0: Tensor  # [B, C, h, w] the clean sample
    eps: Tensor  # [B, C, h, w] the noise that takes x_0 to x_t
    states: Conditions | None  # what the caption lets the denoiser hear, B rows
    null: Conditions | None  # the same of the empty prompt


# "noise": x_0 with drawn noise; "inversion": deterministic inversion of x_0, guided.
TRAJECTORIES = ("noise", "inversion")

# (model, point, e with its graph) -> v, all [B, C, h, w]
Cotangent = Callable[[Model, Point, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    cotangent: Cotangent
    trajectory: str  # the published one, of TRAJECTORIES
    loss_like: bool  # whether v is where a training loss grows, so that rewards have a direction
    loss_weight: bool  # whether a row's score is multiplied by its training loss
    through_input: bool  # whether the cotangent differentiates e with respect to x_t
    source: str


def denoising(model: Model, point: Point, e: Tensor) -> Tensor:
    """e - eps: the gradient of the training loss 1/2 ||e - eps||^2."""
    return e.detach() - point.eps


def output_norm(model: Model, point: Point, e: Tensor) -> Tensor:
    """e: the gradient of 1/2 ||e||^2."""
    return e.detach()


def output_sign(model: Model, point: Point, e: Tensor) -> Tensor:
    """sign(e): the gradient of ||e||_1."""
    return e.detach().sign()


def posterior_sampling(model: Model, point: Point, e: Tensor) -> Tensor:
    """-grad_{x_t} ||xhat0(x_t) - x_0||^2: the DPS loss; one backward to x_t through the forward."""
    residual = (model.predicted(point.x_t, point.t, e) - point.x_0).square().sum()
    (gradient,) = torch.autograd.grad(residual, point.x_t, retain_graph=True)
    return -gradient


def guidance(model: Model, point: Point, e: Tensor) -> Tensor:
    """e(null) - e(c): against the classifier-free guidance vector of the caption."""
    with torch.no_grad():
        null = model.noise(point.x_t, point.t, point.null)
    return null - e.detach()


METHODS: dict[str, Method] = {
    "dsm": Method(
        cotangent=denoising,
        trajectory="noise",
        loss_like=True,
        loss_weight=False,
        through_input=False,
        source="TRAK on the denoising loss (2303.14186)",
    ),
    "dtrak": Method(
        cotangent=output_norm,
        trajectory="noise",
        loss_like=False,
        loss_weight=False,
        through_input=False,
        source="D-TRAK (2311.00500)",
    ),
    "das": Method(
        cotangent=output_sign,
        trajectory="noise",
        loss_like=False,
        loss_weight=True,
        through_input=False,
        source="DAS (2410.18639)",
    ),
    "dps": Method(
        cotangent=posterior_sampling,
        trajectory="inversion",
        loss_like=True,
        loss_weight=False,
        through_input=True,
        source="Concept-TRAK (2507.06547)",
    ),
    "cfg": Method(
        cotangent=guidance,
        trajectory="noise",
        loss_like=True,
        loss_weight=False,
        through_input=False,
        source="guidance vector as a training feature (ours)",
    ),
}
