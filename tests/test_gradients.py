"""Per-sample gradients against a plain autograd loop in float64."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from headwater.attribution import METHODS, Engine, Model, ModelError, Recipe
from headwater.attribution.conditions import Conditions
from headwater.attribution.layers import parameter_gradients, select_parameters
from headwater.attribution.objectives import Point

CAPTIONS = ["a red cat", "the dog in a house", "a fish by studio", "a blue drawing"]
KEYS = ["one", "two", "three", "four"]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(prediction_type=request.param), device="cpu")


@pytest.fixture(scope="module")
def epsilon_model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


def samples(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def one(point: Point, i: int) -> Point:
    def row(value: torch.Tensor | Conditions | None) -> torch.Tensor | Conditions | None:
        if isinstance(value, Conditions):
            return value.rows(slice(i, i + 1)).to(torch.float64)
        if value is None:
            return None
        return value[i : i + 1].double() if value.is_floating_point() else value[i : i + 1]

    return Point(*(row(getattr(point, name)) for name in Point.__dataclass_fields__))  # type: ignore[arg-type]


def double_copy(model: Model) -> Model:
    return replace(model, denoiser=copy.deepcopy(model.denoiser).double(), dtype=torch.float64)


def in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model.noise and coefficients work in float32 by design; the reference needs float64."""

    def coefficients(self: Model, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self.schedule.scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
        return kept.sqrt().double(), (1 - kept).sqrt().double()

    def noise(
        self: Model, x_t: torch.Tensor, t: torch.Tensor, states: Conditions | None
    ) -> torch.Tensor:
        assert states is not None
        raw = self.denoiser(x_t, t, **states.tensors).sample
        a, s = coefficients(self, t)
        kind = self.schedule.scheduler.config.prediction_type
        return {
            "epsilon": raw,
            "v_prediction": a * raw + s * x_t,
            "sample": (x_t - a * raw) / s,
        }[kind]

    monkeypatch.setattr(Model, "coefficients", coefficients)
    monkeypatch.setattr(Model, "noise", noise)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_equal_autograd_loop_over_every_parameter(
    method: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # "" selects every parameter: Linear, Conv2d (strided ones too), GroupNorm and LayerNorm.
    recipe = Recipe(method=method, parameters="", projection="identity", timesteps=2, steps=6)
    engine = Engine(model, recipe)
    points = list(engine.points(samples(), CAPTIONS, KEYS))
    through = engine.method.through_input
    computed = [engine.raw_gradient(p, engine.method.cotangent, through) for p in points]
    reference = double_copy(model)
    in_double(monkeypatch)
    parameters = list(reference.denoiser.requires_grad_(True).parameters())
    for point, (rows, norms, _) in zip(points, computed, strict=True):
        for i in range(len(CAPTIONS)):
            single = one(point, i)
            single = replace(single, x_t=single.x_t.requires_grad_(through))
            e = reference.noise(single.x_t, single.t, single.states)
            v = engine.method.cotangent(reference, single, e)
            found = torch.autograd.grad(e, parameters, v, allow_unused=True)
            expected = torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, found, strict=True)
                ]
            )
            cosine = torch.cosine_similarity(rows[i].double(), expected, dim=0)
            assert cosine >= 0.99999
            assert abs(norms[i].double() / expected.norm() - 1) <= 1e-4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Linear(6, 5, bias=False), (3, 4, 6)),
        (nn.Linear(6, 5), (3, 2, 4, 6)),
        (nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 7, 6)),
        (nn.Conv2d(4, 6, (3, 2), dilation=(1, 2), groups=2), (3, 4, 6, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, stride=(1, 2)), (3, 4, 5, 6)),
        (nn.LayerNorm(6), (3, 4, 6)),
        (nn.LayerNorm((4, 6)), (3, 2, 4, 6)),
        (nn.GroupNorm(2, 6), (3, 6, 4, 4)),
        (nn.GroupNorm(3, 6), (3, 6, 5)),
        (nn.RMSNorm(6), (3, 4, 6)),
        (nn.RMSNorm((4, 6), eps=1e-5), (3, 2, 4, 6)),
        (RMSNorm(6, eps=1e-6, bias=True), (3, 2, 4, 6)),
    ],
    ids=str,
)
def test_layer_rule_equals_autograd(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer = copy.deepcopy(layer)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=generator)
    with torch.no_grad():  # norms begin at weight 1: make every parameter matter
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    cotangent = torch.randn(layer(inputs).shape, generator=generator)
    roles = [name for name, _ in layer.named_parameters()]
    found = parameter_gradients(layer, inputs, cotangent, roles)
    reference = copy.deepcopy(layer).double()
    names = [name for name, _ in reference.named_parameters()]
    for i in range(len(inputs)):
        output = reference(inputs[i : i + 1].double())
        expected = torch.autograd.grad(
            output, list(reference.parameters()), cotangent[i : i + 1].double()
        )
        for name, gradient in zip(names, expected, strict=True):
            torch.testing.assert_close(found[name][i].double(), gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [None, 2])
def test_embedding_rule_equals_autograd(padding: int | None) -> None:
    layer = nn.Embedding(5, 3, padding_idx=padding)
    index = torch.tensor([[0, 2, 2], [4, 1, 0]])
    cotangent = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = parameter_gradients(layer, index, cotangent, ["weight"])["weight"]
    for i in range(2):
        (expected,) = torch.autograd.grad(layer(index[i]), layer.weight, cotangent[i])
        torch.testing.assert_close(found[i], expected)


def test_half_precision_norm_uses_the_epsilon_that_torch_uses() -> None:
    layer = nn.RMSNorm(8).bfloat16()
    inputs = 1e-3 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cotangent = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = parameter_gradients(layer, inputs, cotangent, ["weight"])["weight"]
    for i in range(2):
        (expected,) = torch.autograd.grad(layer(inputs[i]), layer.weight, cotangent[i])
        torch.testing.assert_close(found[i], expected.float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
        nn.Embedding(3, 2, scale_grad_by_freq=True),
        nn.MultiheadAttention(4, 2).out_proj,
    ],
    ids=str,
)
def test_layers_of_another_kind_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"odd\.weight belongs to a"):
        select_parameters(nn.ModuleDict({"odd": layer}), "odd")


def test_layer_called_twice_sums_its_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(8, 8)
            self.config = type("Config", (), {"sample_size": 8, "in_channels": 4})()

        def forward(self, x: torch.Tensor, timestep: torch.Tensor, **_: object) -> object:
            return type("Output", (), {"sample": self.shared(torch.tanh(self.shared(x)))})()

    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    model = replace(model, denoiser=Twice().requires_grad_(False))
    engine = Engine(model, Recipe(parameters="shared", projection="identity", timesteps=1, steps=5))
    (point,) = engine.points(samples(), CAPTIONS, KEYS)
    rows, _, _ = engine.raw_gradient(point, engine.method.cotangent)
    parameters = list(model.denoiser.requires_grad_(True).parameters())
    for i in range(4):
        e = model.noise(point.x_t[i : i + 1], point.t[i : i + 1], None)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(e, parameters, e.detach())])
        torch.testing.assert_close(rows[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_rows_do_not_depend_on_batch_size_or_batch_mates(method: str, model: Model) -> None:
    engine = Engine(model, Recipe(method=method, timesteps=3, steps=12, dim=512))
    together = engine.rows(samples(), CAPTIONS, KEYS)
    order = [2, 0]
    pair = engine.rows(samples()[order], [CAPTIONS[i] for i in order], [KEYS[i] for i in order])
    for place, i in enumerate(order):
        alone = engine.rows(samples()[i : i + 1], CAPTIONS[i : i + 1], KEYS[i : i + 1])
        for other, weight in (
            (pair.features[place], pair.weights[place]),
            (together.features[i], together.weights[i]),
        ):
            difference = (other - alone.features[0]).norm() / alone.features[0].norm()
            assert difference <= 1e-5
            assert abs(weight / alone.weights[0] - 1) <= 1e-5


def test_each_noise_level_has_unit_norm(epsilon_model: Model) -> None:
    engine = Engine(epsilon_model, Recipe(projection="identity", timesteps=4, steps=8))
    for point in engine.points(samples(), CAPTIONS, KEYS):
        row, _, _ = engine.gradient(point, engine.method.cotangent)
        torch.testing.assert_close(row.norm(dim=1), torch.ones(4), rtol=1e-5, atol=1e-5)


def test_zero_gradient_stays_zero(epsilon_model: Model) -> None:
    # The guidance vector of the empty caption is exactly zero.
    engine = Engine(epsilon_model, Recipe(method="cfg", timesteps=2, steps=4, dim=64))
    rows = engine.rows(samples(1), [""], ["k"]).features
    assert torch.isfinite(rows).all()
    assert rows.norm() < 1e-3


def test_das_weights_are_the_training_loss(epsilon_model: Model) -> None:
    engine = Engine(epsilon_model, Recipe(method="das", timesteps=3, steps=6, dim=64))
    losses = [
        (epsilon_model.noise(p.x_t, p.t, p.states) - p.eps).square().mean(dim=(1, 2, 3))
        for p in engine.points(samples(), CAPTIONS, KEYS)
    ]
    weights = engine.rows(samples(), CAPTIONS, KEYS).weights
    torch.testing.assert_close(weights, torch.stack(losses).mean(0))
    others = Engine(epsilon_model, Recipe(method="dsm", timesteps=3, steps=6, dim=64))
    assert torch.equal(others.rows(samples(), CAPTIONS, KEYS).weights, torch.ones(4))


def test_pixel_model_without_text() -> None:
    model = Model.from_pipeline(tiny.pixel_diffusion(), device="cpu")
    engine = Engine(model, Recipe(parameters="conv", projection="identity", timesteps=2, steps=4))
    x_0 = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = engine.rows(x_0, ["", ""], ["a", "b"]).features
    assert rows.shape == (2, engine.selection.size)
    assert rows.any()
    with pytest.raises(ModelError, match="takes no text"):
        engine.rows(x_0, ["a cat", ""], ["a", "b"])


def test_unsupported_parameter_is_named() -> None:
    denoiser = nn.ModuleDict({"fine": nn.Linear(2, 2), "odd": nn.Bilinear(3, 2, 2)})
    with pytest.raises(ModelError, match=r"odd\.weight belongs to a Bilinear"):
        select_parameters(denoiser, "odd")
    assert select_parameters(denoiser, "fine").size == 6


def test_selection_without_match_and_bad_pattern() -> None:
    denoiser = nn.ModuleDict({"fine": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match=r"matches no parameter.*fine"):
        select_parameters(denoiser, "attn2")
    with pytest.raises(ModelError, match="no regular expression"):
        select_parameters(denoiser, "(")


def test_bfloat16_rows_point_the_same_way() -> None:
    exact = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    coarse = Model.from_pipeline(tiny.stable_diffusion(), device="cpu", dtype="bfloat16")
    recipe = Recipe(timesteps=3, steps=6, projection="identity")
    a = Engine(exact, recipe).rows(samples(), CAPTIONS, KEYS).features
    b = Engine(coarse, replace(recipe, dtype="bfloat16")).rows(samples(), CAPTIONS, KEYS).features
    assert b.dtype == torch.float32
    assert torch.cosine_similarity(a, b).min() > 0.99
