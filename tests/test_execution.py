"""How the engine runs changes speed and memory, not rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from headwater.attribution import (
    METHODS,
    Engine,
    Execution,
    Model,
    ModelError,
    Recipe,
    choose_batch,
)
from headwater.attribution import execution as execution_module
from headwater.attribution.execution import prepare, regions, running
from headwater.attribution.layers import select_parameters

CAPTIONS = ["a red cat", "the dog in a house", "a fish by studio", "a blue drawing"]
KEYS = ["one", "two", "three", "four"]


@pytest.fixture
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(model: Model, recipe: Recipe, execution: Execution | None = None) -> torch.Tensor:
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Engine(model, recipe, execution).rows(x_0, CAPTIONS, KEYS).features


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_rows_are_the_same(method: str, model: Model) -> None:
    # "" selects layers that checkpointed blocks call again in the backward pass.
    recipe = Recipe(method=method, parameters="", timesteps=2, steps=6, dim=256)
    plain = rows(model, recipe)
    assert difference(rows(model, recipe, Execution(checkpointing=True)), plain) <= 1e-5
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.denoiser.modules())
    rows(model, recipe)  # the next engine puts the model back
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.denoiser.modules())


def test_checkpointing_saves_what_the_taps_saved(model: Model) -> None:
    saved = {}
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for checkpointing in (False, True):
        engine = Engine(model, Recipe(timesteps=1, steps=5), Execution(checkpointing=checkpointing))
        kept: list[int] = []

        def pack(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            engine.rows(x_0, CAPTIONS, KEYS)
        saved[checkpointing] = len(set(kept))
    assert saved[True] < saved[False]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_rows_are_the_same(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = regions

    def some(denoiser: nn.Module, selection: Any) -> list[nn.Module]:
        kinds = ("ResnetBlock2D", "FeedForward")
        return [m for m in chosen(denoiser, selection) if type(m).__name__ in kinds]

    monkeypatch.setattr(execution_module, "regions", some)
    recipe = Recipe(method="dps", timesteps=1, steps=3, dim=256)
    plain = rows(model, recipe)
    engine = Engine(model, recipe, Execution(compile=True))
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*going on uncompiled")
        found = engine.rows(x_0, CAPTIONS, KEYS).features
    assert engine.execution.compile
    assert 0 < difference(found, plain) <= 1e-4  # not equal to the bit: other kernels ran
    # A batch of another size runs as it is written rather than compile anew.
    part = engine.rows(x_0[:3], CAPTIONS[:3], KEYS[:3]).features
    assert torch.equal(part, Engine(model, recipe).rows(x_0[:3], CAPTIONS[:3], KEYS[:3]).features)


@pytest.mark.usefixtures("fresh_compiler")
def test_wrongly_compiled_blocks_are_found_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backend(graph: Any, _: object) -> Any:
        return lambda *inputs: tuple(1.01 * output for output in graph(*inputs))

    right = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **_: right(module, backend=backend))
    recipe = Recipe(timesteps=1, steps=3, dim=256)
    engine = Engine(model, recipe, Execution(compile=True))
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="going on uncompiled"):
        found = engine.rows(x_0, CAPTIONS, KEYS).features
    assert not engine.execution.compile
    assert torch.equal(found, rows(model, recipe))


def test_regions_leave_out_what_is_tapped(model: Model) -> None:
    selection = select_parameters(model.denoiser, "attn2")
    tapped = {id(layer.module) for layer in selection.layers}
    found = regions(model.denoiser, selection)
    assert {type(m).__name__ for m in found} >= {"ResnetBlock2D", "FeedForward", "Attention"}
    assert not any(id(part) in tapped for m in found for part in m.modules())
    assert regions(model.denoiser, select_parameters(model.denoiser, "")) != found


def test_model_that_cannot_recompute() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"Linear cannot recompute.*--low-memory"):
        prepare(layer, select_parameters(layer, ""), Execution(checkpointing=True))


def test_determinism_is_put_back_and_what_lacks_it_is_named() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with running(Execution(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before
    with pytest.raises(ModelError, match=r"odd_kernel.*--no-deterministic"), running(Execution()):
        raise RuntimeError("odd_kernel does not have a deterministic implementation, but you set")
    with pytest.raises(RuntimeError, match="other"), running(Execution()):
        raise RuntimeError("other")


def test_layer_called_with_another_batch_is_named(model: Model) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(torch.cat([x, x]))[: len(x)]

    model.denoiser.conv_in = nn.Sequential(model.denoiser.conv_in, Doubled()).requires_grad_(False)
    with pytest.raises(ModelError, match=r"conv_in\.1\.inner is called with 8 rows for a batch"):
        rows(model, Recipe(parameters="inner", timesteps=1, steps=3))


def test_batch_size_on_a_cpu(model: Model) -> None:
    choice = choose_batch(Engine(model, Recipe(timesteps=2, steps=4, dim=64)))
    assert choice.batch_size == 16
    assert choice.seconds_per_image > 0
    assert choose_batch(Engine(model, Recipe(timesteps=2, steps=4, dim=64)), 4).batch_size == 4
