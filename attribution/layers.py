"""Per-sample weight gradients of one layer from its input and the gradient of its output."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from .errors import ModelError

ROLES = ("weight", "bias")


@dataclass(frozen=True)
class Slot:
    """One selected parameter and its place in the flat gradient."""

    name: str  # as in named_parameters()
    role: str  # "weight" or "bias"
    offset: int  # first coordinate in the flat gradient
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Coordinates of the parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layer:
    """A module with at least one selected parameter."""

    name: str
    module: nn.Module
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Selection:
    """The parameters theta that a gradient is taken over, in the order of named_parameters()."""

    layers: tuple[Layer, ...]
    size: int  # coordinates of the flat gradient

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every selected parameter."""
        return tuple(slot for layer in self.layers for slot in layer.slots)


# (what a model has, what is selected then), in order of preference: an adapter alone; joint
# attention of text and image; cross-attention; a transformer's only attention.
_PREFERRED = (
    (r"lora_", r"lora_"),
    (r"\.add_k_proj\.", r"transformer_blocks\.\d+\.attn\."),
    (r"attn2\.", r"attn2\."),
    (r"transformer_blocks\.\d+\.attn", r"transformer_blocks\.\d+\.attn\d?\."),
)


def default_parameters(denoiser: nn.Module) -> str:
    """The regular expression of the selection that suits a model; everything if nothing does."""
    names = [name for name, _ in denoiser.named_parameters()]
    return next(
        (chosen for sign, chosen in _PREFERRED if any(re.search(sign, name) for name in names)), ""
    )


def select_parameters(denoiser: nn.Module, pattern: str) -> Selection:
    """Select every parameter whose name matches the regular expression `pattern` anywhere.

    Raises:
        ModelError: bad pattern, no match, or a match in a layer whose per-sample gradient is
            not known here (the message names the parameter).
    """
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise ModelError(f"--parameters {pattern!r} is no regular expression: {error}") from error
    modules = dict(denoiser.named_modules())
    slots: dict[str, list[Slot]] = {}
    offset = 0
    for name, parameter in denoiser.named_parameters():
        if not matcher.search(name):
            continue
        owner, _, role = name.rpartition(".")
        module = modules[owner]
        if _rule(module) is None or role not in ROLES:
            raise ModelError(
                f"parameter {name} belongs to a {type(module).__name__}, whose per-sample gradient "
                "is not supported; narrow --parameters (Linear, Conv2d, Embedding, norms work)"
            )
        slots.setdefault(owner, []).append(Slot(name, role, offset, tuple(parameter.shape)))
        offset += parameter.numel()
    if not slots:
        top = sorted({name.split(".")[0] for name, _ in denoiser.named_parameters()})
        raise ModelError(
            f"--parameters {pattern!r} matches no parameter of this model; "
            f"its blocks are {', '.join(top)}"
        )
    layers = tuple(Layer(owner, modules[owner], tuple(found)) for owner, found in slots.items())
    return Selection(layers, offset)


def parameter_gradients(
    module: nn.Module, inputs: Tensor, grad: Tensor, roles: Collection[str]
) -> dict[str, Tensor]:
    """Per-sample gradients of one call of a layer.

    Args:
        module: a supported layer.
        inputs: what it was called with, [B, ...].
        grad: cotangent of its output, [B, ...].
        roles: which of `weight` and `bias` are wanted; the layer must have them.

    Returns:
        `weight` [B, *weight.shape] and `bias` [B, *bias.shape], in the precision of `grad` or
        float32 (norms); sums are accumulated in float32 at least.
    """
    rule = _rule(module)
    if rule is None:
        raise ModelError(f"no per-sample gradient for a {type(module).__name__}")
    if inputs.is_floating_point():
        inputs = inputs.to(grad.dtype)
    found = {}
    if "weight" in roles:
        found["weight"] = rule(module, inputs, grad)
    if "bias" in roles:
        found["bias"] = _bias(module, grad)
    return found


def _linear(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    x = x.reshape(x.shape[0], -1, x.shape[-1])  # [B, S, I]
    g = g.reshape(g.shape[0], -1, g.shape[-1])  # [B, S, O]
    return torch.bmm(g.mT, x)


def _conv2d(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    assert not isinstance(module.padding, str)  # refused by `_rule`
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    batch, groups = x.shape[0], module.groups
    patches = patches.view(batch * groups, -1, patches.shape[-1])  # [B G, I/G kh kw, L]
    g = g.reshape(batch * groups, -1, patches.shape[-1])  # [B G, O/G, L]
    return torch.bmm(g, patches.mT).view(batch, *module.weight.shape)


def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    assert isinstance(module, nn.LayerNorm)
    normed = F.layer_norm(x.float(), module.normalized_shape, eps=module.eps)
    shape = (x.shape[0], -1, *module.normalized_shape)
    return (g * normed).reshape(shape).sum(1)


def _group_norm(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    assert isinstance(module, nn.GroupNorm)
    normed = F.group_norm(x.float(), module.num_groups, eps=module.eps)
    return (g * normed).reshape(*x.shape[:2], -1).sum(-1)  # [B, C]


def _rms_norm(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    assert isinstance(module, nn.RMSNorm | RMSNorm)
    assert isinstance(module.weight, Tensor)
    shape = module.weight.shape
    axes = tuple(range(-len(shape), 0))
    eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    normed = x.float() * torch.rsqrt(x.float().square().mean(axes, keepdim=True) + eps)
    return (g * normed).reshape(x.shape[0], -1, *shape).sum(1)


def _embedding(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    assert isinstance(module, nn.Embedding)
    rows, width = module.weight.shape
    index = x.reshape(x.shape[0], -1, 1).expand(-1, -1, width)  # [B, S, D]
    found = g.new_zeros(x.shape[0], rows, width).scatter_add_(1, index, g.reshape(index.shape))
    if module.padding_idx is not None:
        found[:, module.padding_idx] = 0
    return found


def _bias(module: nn.Module, g: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d | nn.GroupNorm):
        return g.reshape(*g.shape[:2], -1).sum(-1)  # [B, C]
    assert isinstance(module.bias, Tensor)
    return g.reshape(g.shape[0], -1, *module.bias.shape).sum(1)


_Rule = Callable[[nn.Module, Tensor, Tensor], Tensor]
_RULES: tuple[tuple[type[nn.Module], _Rule], ...] = (
    (nn.Linear, _linear),
    (nn.Conv2d, _conv2d),
    (nn.LayerNorm, _layer_norm),
    (nn.GroupNorm, _group_norm),
    (nn.RMSNorm, _rms_norm),
    (RMSNorm, _rms_norm),
    (nn.Embedding, _embedding),
)


def _rule(module: nn.Module) -> _Rule | None:
    if isinstance(module, nn.Conv2d) and (
        module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        return None
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        return None
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return None  # of nn.MultiheadAttention, which reads its weight and never calls it
    return next((rule for kind, rule in _RULES if isinstance(module, kind)), None)
