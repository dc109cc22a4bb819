"""Published methods against their papers' definitions: plain losses, plain autograd, plain sums."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import Command
from torch import Tensor

from headwater import Asking, Concept, Index, QueryError, build_index
from headwater.attribution import (
    Engine,
    Model,
    ModelError,
    Point,
    Recipe,
    contrast_rows,
    ddim_grid,
    differences,
    feature_space,
    feature_space_id,
    generation_path,
    journey_rows,
    kept,
    resolved,
    seeded_noise,
    slider_rows,
)
from headwater.attribution.conditions import Conditions
from headwater.attribution.curvature import HALF_DECADES
from headwater.attribution.hashing import make_key, signs
from headwater.attribution.trajectory import renoised
from headwater.index import StoredIndex
from headwater.queries.gradients import generate

CAPTIONS = ["a red cat", "the dog in a house", "a blue drawing"]
KEYS = ["one", "two", "three"]
PARAMETERS = r"attn2\.to_(k|out)"  # layers with and without a bias

SIGNS = signs(0, 4 * 8 * 8, make_key(0, 7)).view(4, 8, 8)  # of a recipe's seed 0

# What each method differentiates, as its paper writes it: (e, eps) -> scalar.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dsm": lambda e, eps: (e - eps).square().sum() / 2,
    "dtrak": lambda e, eps: e.square().sum() / 2,
    "das": lambda e, eps: e.abs().sum(),
    "das-mean": lambda e, eps: e.mean(),
    "probe": lambda e, eps: (e * SIGNS).sum(),
    "mixed": lambda e, eps: e.square().sum() / 2 + 2 * (e * SIGNS).sum(),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pipeline(tiny.stable_diffusion(), device="cpu")


def engine_for(model: Model, method: str, **settings: object) -> Engine:
    values = {"parameters": PARAMETERS, "projection": "identity", "timesteps": 3, "steps": 6}
    return Engine(model, Recipe(method=method, **{**values, **settings}))  # type: ignore[arg-type]


def samples(count: int = 3) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def conditions(states: Conditions | None, i: int) -> dict[str, Tensor]:
    assert states is not None
    return states.rows(slice(i, i + 1)).tensors


def autograd(
    engine: Engine, point: Point, i: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """The gradient of a loss of sample i by the selected parameters, one tensor per layer."""
    denoiser = copy.deepcopy(engine.model.denoiser).requires_grad_(True)
    where = dict(denoiser.named_modules())
    heard = conditions(point.states, i)
    e = denoiser(point.x_t[i : i + 1], point.t[i : i + 1], **heard).sample
    value = loss(e, point.eps[i : i + 1])
    found = []
    for layer in engine.selection.layers:
        parameters = list(where[layer.name].parameters())
        parts = torch.autograd.grad(value, parameters, retain_graph=True)
        found.append(torch.cat([part.flatten() for part in parts]))
    return found


def scaled(gradients: list[Tensor], scaling: str) -> Tensor:
    if scaling == "layer":
        return torch.cat([gradient / gradient.norm() for gradient in gradients])
    whole = torch.cat(gradients)
    return whole / whole.norm() if scaling == "timestep" else whole


@pytest.mark.parametrize("scaling", ["timestep", "layer", "none"])
@pytest.mark.parametrize("method", LOSSES)
def test_rows_are_sums_of_scaled_gradients_of_the_loss(
    method: str, scaling: str, model: Model
) -> None:
    engine = engine_for(model, method, scaling=scaling)
    rows = engine.rows(samples(), CAPTIONS, KEYS)
    points = list(engine.points(samples(), CAPTIONS, KEYS))
    for i in range(len(KEYS)):
        parts = [autograd(engine, point, i, LOSSES[method]) for point in points]
        expected = sum(scaled(part, scaling) for part in parts)
        torch.testing.assert_close(rows.features[i], expected, rtol=1e-4, atol=1e-5)
        norms = [float(torch.cat(part).norm()) for part in parts]
        assert float(rows.norms[i]) == pytest.approx(np.mean(norms), rel=1e-4)


def test_probes_estimate_how_alike_whole_jacobians_are(model: Model) -> None:
    point = next(iter(engine_for(model, "probe").points(samples(2), CAPTIONS[:2], KEYS[:2])))
    jacobians = []
    for i in range(2):
        denoiser = copy.deepcopy(model.denoiser).requires_grad_(True)
        selected = [p for name, p in denoiser.named_parameters() if re.search(PARAMETERS, name)]
        heard = conditions(point.states, i)
        e = denoiser(point.x_t[i : i + 1], point.t[i : i + 1], **heard).sample.flatten()
        units = torch.eye(len(e))
        rows = torch.autograd.grad(e, selected, units, is_grads_batched=True)
        jacobians.append(torch.cat([row.flatten(1) for row in rows], dim=1))
    known = float((jacobians[0] * jacobians[1]).sum())
    found = []
    for seed in range(400):
        engine = engine_for(model, "probe", seed=seed)
        v = engine.method.cotangent(model, point, torch.zeros(2, 4, 8, 8))
        assert torch.equal(v[0], v[1])
        assert set(v.unique().tolist()) == {-1.0, 1.0}
        one, other = (v[0].flatten() @ jacobian for jacobian in jacobians)
        found.append(float(one @ other))
    error = float(np.std(found) / len(found) ** 0.5)
    assert abs(np.mean(found) - known) < 4 * error
    assert error < abs(known) / 4  # of the same sign, beyond doubt


def test_probe_is_the_seeds_own_at_every_level_and_batch(model: Model) -> None:
    one, other = engine_for(model, "probe", seed=1), engine_for(model, "probe", seed=2)
    cotangents = [
        engine.method.cotangent(model, point, torch.randn(len(point.t), 4, 8, 8))
        for engine in (one, one, other)
        for point in engine.points(samples(2), CAPTIONS[:2], KEYS[:2])
    ]
    assert all(torch.equal(v, cotangents[0]) for v in cotangents[:6])
    agreement = float((cotangents[0] * cotangents[6]).mean())
    assert abs(agreement) < 4 / 256**0.5


def test_weight_of_das_as_released(model: Model) -> None:
    engine = engine_for(model, "das-mean")
    points = list(engine.points(samples(), CAPTIONS, KEYS))
    with torch.no_grad():
        e = [model.noise(point.x_t, point.t, point.states) for point in points]
    found = engine.rows(samples(), CAPTIONS, KEYS).weights
    for i in range(len(KEYS)):
        roots = [
            float((a[i] - point.eps[i]).square().mean().sqrt())
            for a, point in zip(e, points, strict=True)
        ]
        expected = np.mean([root / np.linalg.norm(roots) for root in roots])
        assert float(found[i]) == pytest.approx(expected, rel=1e-5)
        assert 1 / 3 < expected < 1 / 3**0.5


@pytest.mark.parametrize("scaling", ["timestep", "layer", "none"])
def test_what_the_caption_changes_in_a_row(scaling: str, model: Model) -> None:
    settings = {"scaling": scaling, "timesteps": 2}
    engine, plain = (engine_for(model, name, **settings) for name in ("dtrak-text", "dtrak"))
    found, silent = (
        engine.rows(samples(), CAPTIONS, KEYS), engine.rows(samples(), ["a red cat", "", ""], KEYS)
    )  # fmt: skip
    expected = plain.rows(samples(), CAPTIONS, KEYS).features
    expected = expected - plain.rows(samples(), [""] * 3, KEYS).features
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-5)
    assert silent.features.any(dim=1).tolist() == [True, False, False]
    asked = (samples(), CAPTIONS, ["a drawing"] * 3, KEYS)
    assert torch.equal(contrast_rows(engine, *asked), contrast_rows(plain, *asked))


def test_noise_levels_of_a_stretch_of_the_schedule(model: Model) -> None:
    grid = ddim_grid(model, 50)
    for levels, expected in {"0.5-1": grid[27::5], "0-0.1": grid[:5], "0-1": grid[5::10]}.items():
        engine = Engine(model, Recipe(levels=levels, timesteps=5))
        assert engine.timesteps == expected
    spelt = resolved(Recipe(levels="0.00-1.0"), model)
    assert spelt == resolved(Recipe(), model)
    for wrong in ("1", "0.5-0.5", "0.6-0.2", "0-1.1", "low-high", "0-0.5-1", "nan-1", "-0.1-1"):
        with pytest.raises(ModelError, match="0-1 is all of it"):
            Recipe(levels=wrong)
    with pytest.raises(ModelError, match="between 1 and the 5 DDIM steps in levels 0-0"):
        Recipe(levels="0-0.1", timesteps=6)
    few = Engine(model, Recipe(levels="0-0.2", timesteps=1))
    with pytest.raises(ModelError, match="take more steps, or wider levels"):
        generate(few, ["a red cat"], ["q"], Asking(steps=2))


def test_a_path_is_looked_at_where_rows_are(model: Model) -> None:
    engine = Engine(model, Recipe(levels="0.5-1", timesteps=4, steps=8))
    _, path = generate(engine, ["a red cat"], ["q"], Asking(steps=8))
    assert [int(point.t[0]) for point in path] == engine.timesteps == ddim_grid(model, 8)[4:]
    _, short = generate(engine, ["a red cat"], ["q"], Asking(steps=4))
    assert [int(point.t[0]) for point in short] == ddim_grid(model, 4)[2:]


@pytest.mark.parametrize("scaling", ["timestep", "layer", "none"])
def test_queries_are_scaled_like_rows(scaling: str, model: Model) -> None:
    engine = engine_for(model, "dtrak", scaling=scaling)
    lacking, _ = engine.states(["a drawing"] * 3)
    points = list(engine.points(samples(), CAPTIONS, KEYS))
    contrast = contrast_rows(engine, samples(), CAPTIONS, ["a drawing"] * 3, KEYS)
    slider = slider_rows(engine, points, ["a drawing"] * 3)
    for i in range(len(KEYS)):
        expected = torch.zeros(2, engine.projector.dim)
        for point in points:
            without = Point(point.x_t, point.t, point.x_0, point.eps, lacking, point.null)
            expected[0] += scaled(autograd(engine, point, i, LOSSES["dtrak"]), scaling)
            expected[0] -= scaled(autograd(engine, without, i, LOSSES["dtrak"]), scaling)
            with torch.no_grad():
                difference = model.noise(point.x_t, point.t, lacking) - model.noise(
                    point.x_t, point.t, point.states
                )
            v = difference[i : i + 1]
            slide = autograd(engine, point, i, lambda e, eps, v=v: (e * v).sum())  # type: ignore[misc]
            expected[1] += scaled(slide, scaling)
        torch.testing.assert_close(contrast[i], expected[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(slider[i], expected[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scaling", ["timestep", "none"])
def test_journey_is_the_loss_at_what_the_path_expects(scaling: str, model: Model) -> None:
    guidance = 3.0
    engine = engine_for(model, "dsm", scaling=scaling)
    states, null = engine.states(CAPTIONS)
    grid, x_t = ddim_grid(model, 6), samples()
    _, points = generation_path(
        model, x_t, states, null, grid=grid, timesteps=engine.timesteps, guidance=guidance
    )
    found = journey_rows(engine, points, KEYS, guidance)
    assert [int(point.t[0]) for point in points] == kept(grid, 3)
    for i, key in enumerate(KEYS):
        noise = seeded_noise(0, f"journey/{key}", (3, 4, 8, 8))
        expected = torch.zeros(engine.projector.dim)
        for index, point in enumerate(points):
            x, t = point.x_t[i : i + 1], point.t[i : i + 1]
            with torch.no_grad():
                e = model.denoiser(x, t, **conditions(states, i)).sample
                empty = model.denoiser(x, t, **conditions(null, i)).sample
            guided = empty + guidance * (e - empty)
            left = model.schedule.scheduler.alphas_cumprod[t].float().view(-1, 1, 1, 1)
            clean = (x - (1 - left).sqrt() * guided) / left.sqrt()
            eps = noise[index : index + 1]
            noised = left.sqrt() * clean + (1 - left).sqrt() * eps
            at = Point(noised, t, clean, eps, states.rows(slice(i, i + 1)), None)  # type: ignore[union-attr]
            expected += scaled(autograd(engine, at, 0, LOSSES["dsm"]), scaling)
        torch.testing.assert_close(found[i], expected, rtol=1e-3, atol=1e-4)


def test_training_on_a_high_scoring_image_lowers_the_loss_of_the_journey(model: Model) -> None:
    engine = engine_for(model, "dsm", parameters="", scaling="none", timesteps=1, steps=5)
    x_0 = samples(6)
    captions = [*CAPTIONS, "a fish", "the house", ""]
    (trained,) = engine.points(x_0, captions, [f"image {i}" for i in range(6)])
    rows, _, _ = engine.raw_gradient(trained, engine.method.cotangent)
    (point,) = engine.points(x_0[:1], ["a red cat"], ["question"])
    scores = rows @ journey_rows(engine, [point], ["question"], 2.0)[0]
    at = renoised(model, point, engine.noise(["journey/question"], (4, 8, 8))[:, 0], 2.0)

    def loss(model: Model) -> float:
        with torch.no_grad():
            e = model.noise(at.x_t, at.t, at.states)
        return float((e.double() - at.eps).square().sum()) / 2

    falls = []
    for row in rows:
        stepped = replace(model, denoiser=copy.deepcopy(model.denoiser))
        parameters = list(stepped.denoiser.parameters())
        parts = row.split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter -= 1e-5 * part.view_as(parameter)  # gradient descent
        falls.append(loss(model) - loss(stepped))
    assert np.corrcoef(scores.numpy(), falls)[0, 1] > 0.99


def test_journey_stays_within_the_bounds_that_the_scheduler_sets() -> None:
    model = Model.from_pipeline(tiny.pixel_diffusion(), device="cpu")
    assert model.schedule.clip == 1.0
    engine = engine_for(model, "dsm", parameters="conv_out")
    x_t = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    seen = []
    real = engine.gradient

    def watched(point: Point, *more: object) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(point)
        return real(point, *more)  # type: ignore[arg-type]

    engine.gradient = watched  # type: ignore[method-assign, assignment]
    points = list(engine.points(x_t, ["", ""], ["a", "b"]))
    journey_rows(engine, points, ["a", "b"], 7.5)
    assert len(seen) == 3
    for point in seen:
        assert float(point.x_0.abs().max()) == 1.0
        a, s = model.coefficients(point.t)
        torch.testing.assert_close(point.x_t, a * point.x_0 + s * point.eps)


def test_a_field_that_old_indexes_lack_changes_nothing_at_its_default(model: Model) -> None:
    recipe = resolved(Recipe(), model)
    space = feature_space(recipe, {"unet": "0"})
    later = ("scaling", "levels")
    old = {name: value for name, value in asdict(recipe).items() if name not in later}
    assert space == {"code": 2, "recipe": old, "model": {"unet": "0"}}
    assert Recipe.from_dict(old) == recipe
    other = feature_space(resolved(Recipe(scaling="none"), model), {"unet": "0"})
    assert differences(other, space) == ["recipe.scaling (none against unset)"]
    assert feature_space_id(other) != feature_space_id(space)
    assert Recipe.from_dict(other["recipe"]).scaling == "none"
    with pytest.raises(ModelError, match="scaling 'row' is unknown; choose timestep, layer, none"):
        Recipe(scaling="row")


def test_raw_rows_through_the_command_line(
    headwater: Command, tmp_path: Path, corpus: Path, model_folder: Path
) -> None:
    """TRAK, Journey-TRAK, Relative-IF, standard scores of raw gradients, against dense float64."""
    folder, model = tmp_path / "i", Model.from_pretrained(model_folder, device="cpu")
    small = ("--timesteps", 2, "--dim", 256, "--quiet", "--device", "cpu")
    words = ("ingest", corpus, "--model", model_folder, "--out", folder, "--method", "dsm")
    code, _, err = headwater(*words, "--scaling", "none", *small)
    assert code == 0, err
    code, _, err = headwater(*words, *small)
    assert code == 2
    assert "recipe.scaling (unset against none)" in err
    stored = StoredIndex.open(folder)
    phi = np.concatenate([block for _, block in stored.blocks()]).astype(np.float64)
    norms = stored.items()["row_norm"].to_numpy()
    assert norms.std() > 0.01 * norms.mean()
    k = phi.T @ phi
    unit = np.trace(k) / len(phi) * np.eye(len(k))
    # Unasked: where the effective dimension is nearest to a quarter of the twelve rows.
    off = {
        damping: abs(np.log(np.trace(k @ np.linalg.inv(k + damping * unit)) / (12 / 4)))
        for damping in HALF_DECADES
    }
    damping = min(off, key=lambda damping: off[damping])
    inverse = np.linalg.inv(k + damping * unit)
    ids = stored.items()["item_id"].to_pylist()
    for method, similarity in (
        ("image", "ip"),
        ("image", "relative"),
        ("image", "standard"),
        ("journey", "ip"),
    ):
        asked = ("--method", method, "--similarity", similarity, "--json", tmp_path / "r")
        code, _, err = headwater(
            "query", folder, "--model", model_folder, "--prompt", "a red cat",
            "--seeds", 2, "--top", 12, "--quiet", "--device", "cpu", *asked,
        )  # fmt: skip
        assert code == 0, err
        engine = Engine(model, Index(folder).recipe)
        assert engine.recipe.scaling == "none"
        states, null = engine.states(["a red cat"] * 2)
        keys = ["query/0", "query/1"]
        x_T = torch.stack([seeded_noise(0, f"generate/{key}", (4, 8, 8)) for key in keys])
        x_0, path = generation_path(
            model, x_T, states, null,
            grid=ddim_grid(model, 50), timesteps=engine.timesteps, guidance=7.5,
        )  # fmt: skip
        if method == "journey":
            rows = journey_rows(engine, path, keys, 7.5)
        else:
            rows = engine.rows(x_0, ["a red cat"] * 2, keys).features
        solved = inverse @ rows.double().mean(0).numpy()
        expected = phi @ solved
        if similarity == "relative":
            expected /= np.linalg.norm(phi @ inverse, axis=1)
        elif similarity == "standard":
            expected /= np.sqrt(np.square(phi @ inverse @ phi.T).mean(axis=1))
        by_id = dict(zip(ids, expected, strict=True))
        result = json.loads((tmp_path / "r").read_text())
        assert result["question"]["damping"] == damping
        hits = result["hits"]
        tolerance = 1e-3 * np.abs(expected).max()
        assert [hit["score"] for hit in hits] == pytest.approx(
            [by_id[hit["item_id"]] for hit in hits], abs=tolerance
        )
        assert len(hits) == 12


def test_refused_questions(tmp_path: Path, corpus: Path, model_folder: Path) -> None:
    with pytest.raises(QueryError, match="choose preconditioning 'query', or similarity 'cosine'"):
        Asking(similarity="relative", preconditioning="none")
    model = Model.from_pretrained(model_folder, device="cpu")
    build_index(corpus, model, tmp_path / "i", recipe=Recipe(timesteps=1, dim=16))
    index = Index(tmp_path / "i")
    journey = Asking(method="journey", seeds=1, steps=4)
    with pytest.raises(QueryError, match="a given picture has none; leave out --image"):
        index.query(Concept("a cat", image="a.png"), model, asking=journey)
    with pytest.raises(QueryError, match="'journey' takes no contrast"):
        index.query(Concept("a cat", contrast="a dog"), model, asking=journey)
    (warning,) = index.query(Concept("a red cat"), model, asking=journey, top=3).warnings
    assert "a journey has no defined direction against dtrak rows" in warning
