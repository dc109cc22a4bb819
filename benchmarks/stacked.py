"""M modules of one architecture as one: every layer of weights holds M sets of them.

Sample b of model m lies at place b * M + m of the batch, so what has no weights (attention,
activations, a pipeline's sampler with its doubled batch) runs over it as it is. The weights keep
their names, with the model as their first dimension.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headwater.benchmarks.errors import BenchmarkError


class _Layer(nn.Module):
    """Layers as one, their parameters under the same names with the model as first dimension."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            values = [getattr(layer, name) for layer in layers]
            stacked = None if values[0] is None else nn.Parameter(torch.stack(values).detach())
            self.register_parameter(name, stacked)


class _Linear(_Layer):
    """M linear layers: [B M, ..., I] -> [B M, ..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        models, width, inputs = self.weight.shape
        samples = len(x) // models
        rows = x.view(samples, models, -1, inputs).transpose(0, 1).reshape(models, -1, inputs)
        y = _affine(rows, self.weight.mT, self.bias)
        y = y.view(models, samples, -1, width).transpose(0, 1)
        return y.reshape(*x.shape[:-1], width)


class Convolution(_Layer):
    """M convolutions: [B M, I, h, w] -> [B M, O, h, w].

    `gathered` says how: a matrix product over gathered neighbourhoods, or one grouped convolution,
    which is five times as fast on a CPU.
    """

    gathered = False

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__(layers)
        first = layers[0]
        if first.groups != 1 or first.dilation != (1, 1) or isinstance(first.padding, str):
            raise BenchmarkError(f"{first} cannot be stacked; use plain convolutions")
        self.stride, self.padding = first.stride, first.padding

    def forward(self, x: Tensor) -> Tensor:
        return self._gathered(x) if self.gathered else self._grouped(x)

    def _grouped(self, x: Tensor) -> Tensor:
        models, width = self.weight.shape[:2]
        y = F.conv2d(
            x.reshape(len(x) // models, -1, *x.shape[2:]),
            self.weight.flatten(0, 1),
            None if self.bias is None else self.bias.flatten(),
            stride=self.stride,
            padding=self.padding,
            groups=models,
        )
        return y.view(len(x), width, *y.shape[2:])

    def _gathered(self, x: Tensor) -> Tensor:
        models, width, _, height, breadth = self.weight.shape
        samples = len(x) // models
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # before it is copied nine times
        (down, right), (top, left) = self.stride, self.padding
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
        h, w = (x.shape[1] - height) // down + 1, (x.shape[2] - breadth) // right + 1
        shifted = [
            x[:, i : i + (h - 1) * down + 1 : down, j : j + (w - 1) * right + 1 : right]
            for i in range(height)
            for j in range(breadth)
        ]
        columns = torch.cat(shifted, dim=-1).view(samples, models, h * w, -1)
        kernel = self.weight.permute(0, 3, 4, 2, 1).reshape(models, -1, width)
        y = _affine(columns.transpose(0, 1).flatten(1, 2), kernel, self.bias)
        y = y.view(models, samples, h, w, width).transpose(0, 1)
        return y.permute(0, 1, 4, 2, 3).reshape(len(x), width, h, w)


class _GroupNorm(_Layer):
    """M group normalisations of [B M, C, ...]."""

    def __init__(self, layers: Sequence[nn.GroupNorm]) -> None:
        super().__init__(layers)
        self.groups, self.eps = layers[0].num_groups, layers[0].eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x, self.groups, eps=self.eps)
        y = y.unflatten(0, (-1, len(self.weight))).flatten(3).mT
        return _scaled(y, self.weight, self.bias).mT.reshape(x.shape)


class _LayerNorm(_Layer):
    """M layer normalisations of [B M, T, C]."""

    def __init__(self, layers: Sequence[nn.LayerNorm]) -> None:
        super().__init__(layers)
        self.shape, self.eps = layers[0].normalized_shape, layers[0].eps

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, self.shape, eps=self.eps).unflatten(0, (-1, len(self.weight)))
        return _scaled(y, self.weight, self.bias).view(x.shape)


_KINDS: dict[type[nn.Module], Callable[[Sequence[Any]], nn.Module]] = {
    nn.Linear: _Linear,
    nn.Conv2d: Convolution,
    nn.GroupNorm: _GroupNorm,
    nn.LayerNorm: _LayerNorm,
}


def _affine(rows: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """[M, n, I] @ [M, I, O] (+ [M, O])."""
    if bias is None:
        return torch.bmm(rows, kernel)
    return torch.baddbmm(bias[:, None], rows, kernel)


def _scaled(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, M, n, C] * [M, C] (+ [M, C])."""
    y = y * weight[:, None]
    return y if bias is None else y + bias[:, None]


def stack(unets: Sequence[nn.Module]) -> nn.Module:
    """M modules of one architecture as one; its state is theirs with M as first dimension.

    Raises:
        BenchmarkError: a layer with weights or randomness that is not known here.
    """
    stacked = copy.deepcopy(unets[0])
    for name, layer in unets[0].named_modules():
        if isinstance(layer, nn.Dropout) and layer.p:
            raise BenchmarkError(f"{name} drops out; stacked models draw no randomness: set p to 0")
        if next(layer.parameters(recurse=False), None) is None:
            continue
        if type(layer) not in _KINDS:
            raise BenchmarkError(
                f"{name}, a {type(layer).__name__}, cannot be stacked; "
                f"{', '.join(kind.__name__ for kind in _KINDS)} can"
            )
        layers = [unet.get_submodule(name) for unet in unets]
        stacked.set_submodule(name, _KINDS[type(layer)](layers))
    return stacked


def taken(stacked: nn.Module, place: int, template: nn.Module) -> nn.Module:
    """Model `place` of a stack as a plain module, in the template's architecture."""
    plain = copy.deepcopy(template).cpu()
    plain.load_state_dict({name: value[place] for name, value in stacked.state_dict().items()})
    return plain


def chosen(stacked: nn.Module, places: Sequence[int]) -> nn.Module:
    """The stack of some of a stack's models, in this order, with weights of its own."""

    def picked(path: str) -> Tensor:
        weight = stacked.get_parameter(path)
        return weight[torch.tensor(places, device=weight.device)]

    return _changed(stacked, picked)


def concatenated(stacks: Sequence[nn.Module]) -> nn.Module:
    """One stack of all models of these stacks, in their order."""
    return _changed(stacks[0], lambda path: torch.cat([s.get_parameter(path) for s in stacks]))


def _changed(stacked: nn.Module, value: Callable[[str], Tensor]) -> nn.Module:
    """A copy whose parameters are replaced by what `value` makes of their names."""
    other = copy.deepcopy(stacked)
    for path, module in other.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            full = f"{path}.{name}" if path else name
            setattr(module, name, nn.Parameter(value(full).detach()))
    return other
