"""Methods as cotangents: what is pulled back through the denoiser to make a training row.

Every row is J^T v with J = d e(x_t, t, c) / d theta. Vectors of the loss-like methods follow one
sign convention: v points where a loss grows, so that two rows with a positive inner product help
each other when one of them is trained on. The output functionals of D-TRAK and DAS are no loss;
they may be compared with themselves (image and contrast queries), where any sign cancels, but
against a reward they have no direction.

Two methods go by the name of DAS. `das-mean` is its authors' code: the signed mean of e, each level
at unit norm, and a score times the root mean squared error at each level over the length of these
errors, averaged over levels (there 1,000, here those of the row). The paper squares the score, the
code has it squared and with its sign; the sign is kept here. `das` is what Concept-TRAK compares
with, the l1 norm of e and the training loss as weight: with `scaling="none"` to the letter, but for
the number of levels and pixels, which is the same for every row.

`probe` is ours. For v of independent random signs, E <J^T v, J'^T v> = <J, J'>: one pass estimates
how alike two images' whole Jacobians are, the trace of their block of the neural tangent kernel
(Hutchinson 1989), where training on one moves the output for the other. One v serves all images and
noise levels, or nothing would remain of the estimate. The constant v of `das-mean` is such a probe
too, the sum of outputs by which Mohamadi et al. (2206.12543) approximate the kernel; a single
direction that is smooth and alike in every channel, it says less about the rest of the output.

`mixed` asks for both in one pass: e + 2 s, s the signs of `probe`. e and s have a length of about
one per number, so that the probe weighs four times what the output's norm does in <v, v>.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .conditions import Conditions
from .hashing import make_key, signs
from .model import Model

_SIGNS = 2.0  # of `mixed`, to one of e
_PROBE = 7  # purpose of the key; sjlt.py, projection.py and factored.py hold the others


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

# the mean squared errors of e at the noise levels of a row [T, B] -> [B]
Weight = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    cotangent: Cotangent
    trajectory: str  # the published one, of TRAJECTORIES
    loss_like: bool  # whether v is where a training loss grows, so that rewards have a direction
    through_input: bool  # whether the cotangent differentiates e with respect to x_t
    source: str
    weight: Weight | None = None  # factor of a row's score; None: 1
    against_null: bool = False  # whether a row is J^T v less the same of the empty prompt
    # Makes the cotangent of a recipe's seed (`method_of`); the one above is that of seed 0.
    drawn: Callable[[int], Cotangent] | None = None


def denoising(model: Model, point: Point, e: Tensor) -> Tensor:
    """e - eps: the gradient of the training loss 1/2 ||e - eps||^2."""
    return e.detach() - point.eps


def output_norm(model: Model, point: Point, e: Tensor) -> Tensor:
    """e: the gradient of 1/2 ||e||^2."""
    return e.detach()


def output_sign(model: Model, point: Point, e: Tensor) -> Tensor:
    """sign(e): the gradient of ||e||_1."""
    return e.detach().sign()


def output_mean(model: Model, point: Point, e: Tensor) -> Tensor:
    """1 / n in every entry: the gradient of the mean of e's n entries, which has a sign."""
    return torch.full_like(e.detach(), 1 / e[0].numel())


def output_probe(seed: int) -> Cotangent:
    """Independent signs, the same for every sample and noise level."""
    key = make_key(seed, _PROBE)

    def cotangent(model: Model, point: Point, e: Tensor) -> Tensor:
        return signs(0, e[0].numel(), key, e.device).view(1, *e.shape[1:]).expand_as(e)

    return cotangent


def output_mixed(seed: int) -> Cotangent:
    """e and twice the signs of `output_probe`: the gradient of 1/2 ||e||^2 + 2 <s, e>."""
    probe = output_probe(seed)

    def cotangent(model: Model, point: Point, e: Tensor) -> Tensor:
        return e.detach() + _SIGNS * probe(model, point, e)

    return cotangent


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


def mean_loss(losses: Tensor) -> Tensor:
    """The training loss, averaged over noise levels; [T, B] -> [B]."""
    return losses.mean(0)


def residual_profile(losses: Tensor) -> Tensor:
    """Mean over noise levels of r / |r|, r_t the root mean squared error at level t; [T, B] -> [B].

    |r| is the length of r [T] itself, so the size of an image's residuals cancels: the weight lies
    between 1 / T (all of them at one level) and 1 / sqrt(T) (the same at each).
    """
    residuals = losses.sqrt()
    lengths: Tensor = residuals.norm(dim=0).clamp_min(1e-8)
    return residuals.mean(0) / lengths


METHODS: dict[str, Method] = {
    "dsm": Method(
        cotangent=denoising,
        trajectory="noise",
        loss_like=True,
        through_input=False,
        source="TRAK on the denoising loss (2303.14186)",
    ),
    "dtrak": Method(
        cotangent=output_norm,
        trajectory="noise",
        loss_like=False,
        through_input=False,
        source="D-TRAK (2311.00500)",
    ),
    "dtrak-text": Method(
        cotangent=output_norm,
        trajectory="noise",
        loss_like=False,
        through_input=False,
        source="what the caption changes in a D-TRAK row (ours)",
        against_null=True,
    ),
    "das": Method(
        cotangent=output_sign,
        trajectory="noise",
        loss_like=False,
        through_input=False,
        source="DAS as Concept-TRAK runs it, there unscaled (2507.06547)",
        weight=mean_loss,
    ),
    "das-mean": Method(
        cotangent=output_mean,
        trajectory="noise",
        loss_like=False,
        through_input=False,
        source="DAS as released (2410.18639)",
        weight=residual_profile,
    ),
    "probe": Method(
        cotangent=output_probe(seed=0),
        trajectory="noise",
        loss_like=False,
        through_input=False,
        source="a random direction of the output (ours)",
        drawn=output_probe,
    ),
    "mixed": Method(
        cotangent=output_mixed(seed=0),
        trajectory="noise",
        loss_like=False,
        through_input=False,
        source="a D-TRAK row and a random direction of the output in one pass (ours)",
        drawn=output_mixed,
    ),
    "dps": Method(
        cotangent=posterior_sampling,
        trajectory="inversion",
        loss_like=True,
        through_input=True,
        source="Concept-TRAK (2507.06547)",
    ),
    "cfg": Method(
        cotangent=guidance,
        trajectory="noise",
        loss_like=True,
        through_input=False,
        source="guidance vector as a training feature (ours)",
    ),
}


def method_of(name: str, seed: int) -> Method:
    """A row of `METHODS`, its cotangent drawn by this seed if it is drawn."""
    method = METHODS[name]
    return method if method.drawn is None else replace(method, cotangent=method.drawn(seed))
