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
from headwater.attribution.capture import Capture
from headwater.attribution.execution import running, set_checkpointing

CAPTIONS = ["a red cat", "the dog in a house", "a fish by studio", "a blue drawing"]
KEYS = ["one", "two", "three", "four"]


@pytest.fixture
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
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


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """The whole way through torch.compile but for the generated kernels, which take minutes."""
    right = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda module, **given: right(module, backend=backend, **given)
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("method", "scaling"),
    [
        ("dtrak", "none"),
        ("dtrak-text", "layer"),
        ("dps", "timestep"),
        ("cfg", "timestep"),
        ("probe", "timestep"),
        ("mixed", "timestep"),
    ],
)
def test_compiled_rows_are_the_same(
    method: str, scaling: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, "aot_eager")
    recipe = Recipe(method=method, scaling=scaling, timesteps=2, steps=4, dim=256)
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = [rows(model, recipe), Engine(model, recipe).rows(x_0[:3], CAPTIONS[:3], KEYS[:3])]
    engine = Engine(model, recipe, Execution(compile=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*going on uncompiled")
        found = engine.rows(x_0, CAPTIONS, KEYS).features
    assert engine.execution.compile
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert difference(found, plain[0]) <= 1e-5
    # A smaller batch is filled up rather than compiled anew.
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    part = engine.rows(x_0[:3], CAPTIONS[:3], KEYS[:3])
    assert torch.equal(part.features, found[:3])
    assert difference(part.features, plain[1].features) <= 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    # Another engine takes the model over; the first goes on, uncompiled.
    assert torch.equal(rows(model, recipe), plain[0])
    assert torch.equal(engine.rows(x_0, CAPTIONS, KEYS).features, plain[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_engines_of_one_model_do_not_disturb_each_other(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, "aot_eager")
    recipe = Recipe(timesteps=1, steps=3, dim=64)
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    first = Engine(model, recipe)
    plain = first.rows(x_0, CAPTIONS, KEYS).features
    later = Engine(model, recipe, Execution(compile=True))
    later.batch_size = 4
    # A first batch that lost a picture decides nothing: it is filled up to the size that was said.
    assert difference(later.rows(x_0[:3], CAPTIONS[:3], KEYS[:3]).features, plain[:3]) <= 1e-5
    assert later.batch_size == 4
    assert torch.equal(first.rows(x_0, CAPTIONS, KEYS).features, plain)
    assert difference(later.rows(x_0, CAPTIONS, KEYS).features, plain) <= 1e-5


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_that_fails_is_done_without(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_graph: object, _inputs: object) -> Any:
        raise RuntimeError("no such instruction")

    compile_with(monkeypatch, failing)
    recipe = Recipe(timesteps=1, steps=3, dim=64)
    engine = Engine(model, recipe, Execution(compile=True))
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match=r"cannot be compiled: .*; going on uncompiled"):
        found = engine.rows(x_0, CAPTIONS, KEYS).features
    assert torch.equal(found, rows(model, recipe))


def test_no_layer_waits_for_calls_that_never_come(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The way to x_t of `dps` calls checkpointed blocks again, before the gradients are pulled.
    waiting: list[int] = []
    right = Capture.pull

    def watched(self: Capture, *given: Any) -> Any:
        waiting.append(max(self._calls.values()))
        return right(self, *given)

    monkeypatch.setattr(Capture, "pull", watched)
    recipe = Recipe(method="dps", timesteps=1, steps=3, dim=64)
    rows(model, recipe, Execution(checkpointing=True))
    assert waiting == [1]


@pytest.mark.usefixtures("fresh_compiler")
def test_layer_called_twice_in_a_compiled_graph(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(monkeypatch, "aot_eager")
    shared = nn.Linear(8, 8).requires_grad_(False)
    model.denoiser.conv_in = nn.Sequential(model.denoiser.conv_in, shared, nn.SiLU(), shared)
    recipe = Recipe(parameters=r"conv_in\.1|attn2", timesteps=1, steps=3, projection="identity")
    plain = rows(model, recipe)
    assert difference(rows(model, recipe, Execution(compile=True)), plain) <= 1e-5


@pytest.mark.usefixtures("fresh_compiler")
def test_a_wrongly_compiled_model_is_found_out(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Any, _: object) -> Any:
        return lambda *inputs: tuple(1.01 * output for output in graph(*inputs))

    compile_with(monkeypatch, wrong)
    recipe = Recipe(timesteps=1, steps=3, dim=256)
    engine = Engine(model, recipe, Execution(compile=True))
    x_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match="going on uncompiled"):
        found = engine.rows(x_0, CAPTIONS, KEYS).features
    assert not engine.execution.compile
    assert torch.equal(found, rows(model, recipe))


def test_compiling_and_checkpointing_exclude_each_other() -> None:
    with pytest.raises(ModelError, match=r"--compile and --low-memory exclude"):
        Execution(compile=True, checkpointing=True)


def test_model_that_cannot_recompute() -> None:
    with pytest.raises(ModelError, match=r"Linear cannot recompute.*--low-memory"):
        set_checkpointing(nn.Linear(2, 2), True)


def test_determinism_is_put_back_and_what_lacks_it_is_named() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with running(Execution(deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before
    with pytest.raises(ModelError, match=r"odd_kernel.*--no-deterministic"), running(Execution()):
        raise RuntimeError("odd_kernel does not have a deterministic implementation, but you set")
    with pytest.raises(RuntimeError, match="other"), running(Execution()):
        raise RuntimeError("other")


@pytest.mark.parametrize(("make", "allowed"), [(tiny.flux, False), (tiny.stable_diffusion_3, True)])
def test_flux_recomputes_without_cudnn_attention_too(make: Any, allowed: bool) -> None:
    model = Model.from_pipeline(make(), device="cpu")
    seen: list[bool] = []
    block = model.denoiser.transformer_blocks[0].attn
    block.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    shape = (2, *model.sample_shape)
    x_0 = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(timesteps=2, steps=6, dim=64)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    Engine(model, recipe, Execution(checkpointing=True)).rows(x_0, CAPTIONS[:2], KEYS[:2])
    assert seen == [allowed and before] * 4  # two points, each computed and computed again
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


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
