"""The published ingest loop of Concept-TRAK, written plainly: what the engine is measured against.

Per batch: 50-step DDIM inversion with guidance 7.5; at ten of its points the DPS cotangent
-grad_{x_t} |xhat0 - x_0|^2, then per-sample gradients of <v, e> by `vmap` of `grad` over the
functional UNet; each point's gradient scaled to unit norm, summed, and subsampled to 2^15
coordinates. Follows arXiv 2507.06547; all parameters and shapes as in its experiments on SD-1.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap


@torch.no_grad()
def guided_inversion(
    unet: Any,
    kept: Tensor,
    x_0: Tensor,
    text: Tensor,
    null: Tensor,
    grid: Sequence[int],
    timesteps: Sequence[int],
    guidance: float = 7.5,
) -> list[Tensor]:
    """Points x_t [B, C, h, w] of the inversion at `timesteps`; `kept` are the alpha-bar."""
    x, previous, points = x_0, kept[0], []
    for t in grid:
        both = unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([null, text])).sample
        without, with_text = both.chunk(2)
        e = without + guidance * (with_text - without)
        clean = (x - (1 - previous).sqrt() * e) / previous.sqrt()
        x = kept[t].sqrt() * clean + (1 - kept[t]).sqrt() * e
        x = x.to(x_0.dtype)
        previous = kept[t]
        if t in timesteps:
            points.append(x)
    return points


def features(
    unet: Any,
    kept: Tensor,
    x_0: Tensor,
    text: Tensor,
    points: Sequence[Tensor],
    timesteps: Sequence[int],
    coordinates: Tensor,
    pattern: str = "attn2",
) -> Tensor:
    """Subsampled features [B, len(coordinates)]: unit gradients, summed over the timesteps."""
    chosen = {n: p.detach() for n, p in unet.named_parameters() if pattern in n}
    rest = {n: p.detach() for n, p in unet.named_parameters() if pattern not in n}
    rest |= dict(unet.named_buffers())

    def pulled(some: dict[str, Tensor], x: Tensor, t: Tensor, c: Tensor, v: Tensor) -> Tensor:
        arguments = (x[None], t[None])
        e = functional_call(unet, {**some, **rest}, arguments, {"encoder_hidden_states": c[None]})
        value: Tensor = (e.sample[0] * v).sum()
        return value

    total = torch.zeros(len(x_0), len(coordinates), device=x_0.device)
    for x_t, timestep in zip(points, timesteps, strict=True):
        x_t = x_t.detach().requires_grad_()
        t = torch.full((len(x_0),), timestep, device=x_0.device)
        a, s = kept[timestep].sqrt(), (1 - kept[timestep]).sqrt()
        e = unet(x_t, t, encoder_hidden_states=text).sample
        loss = ((x_t - s * e) / a - x_0).float().square().sum()
        (cotangent,) = torch.autograd.grad(loss, x_t)
        v = -cotangent.detach()
        per_sample = vmap(grad(pulled), in_dims=(None, 0, 0, 0, 0))(
            chosen, x_t.detach(), t, text, v
        )
        flat = torch.cat([g.flatten(1) for g in per_sample.values()], dim=1)
        norm = torch.cat(
            [p.flatten(1).float().norm(dim=1, keepdim=True) for p in per_sample.values()], 1
        ).norm(dim=1, keepdim=True)
        total += flat[:, coordinates].float() / norm
    return total
