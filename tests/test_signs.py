"""Every sign, pinned: by a real training step, and by corpora whose concept carriers are known."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from headwater.attribution import (
    Engine,
    Model,
    Point,
    Recipe,
    Reward,
    contrast_rows,
    dual_curvature,
    generation_path,
    image_rows,
    reward_rows,
    seeded_noise,
    slider_rows,
)
from headwater.demo.corpus import (
    HELD_OUT,
    caption,
    make_corpus,
    object_contrast,
    studio_contrast,
)
from headwater.demo.run import demo_model

SHORT = Recipe(timesteps=4, steps=20, dim=2048)
PROMPT, CONTRAST = "a red cat", "a drawing"


@pytest.mark.parametrize("kind", ["slider", "reward"])
def test_training_on_a_high_scoring_image_raises_the_reward(kind: str) -> None:
    """One small gradient step on each image's training loss; the reward must change as scored."""
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu")
    recipe = Recipe(method="dsm", parameters="", projection="identity", timesteps=1, steps=5)
    engine = Engine(model, recipe)
    x_0 = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = [PROMPT, "a blue dog", "the house", CONTRAST, "a fish", ""]
    (trained,) = engine.points(x_0, captions, [f"image {i}" for i in range(6)])
    rows, _, _ = engine.raw_gradient(trained, engine.method.cotangent)
    (asked,) = engine.points(x_0[:1], [PROMPT], ["question"])
    lacking, _ = engine.states([CONTRAST])
    _, s = model.coefficients(asked.t)
    with torch.no_grad():
        e = model.noise(asked.x_t, asked.t, asked.states)
        towards_concept = e - model.noise(asked.x_t, asked.t, lacking)
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    if kind == "slider":
        scores = rows @ slider_rows(engine, [asked], [CONTRAST])[0]
        raises_reward = towards_concept  # e moves from c- towards c
    else:
        reward = Reward(lambda x: (x * target).flatten(1).sum(1), of="x_t")
        scores = rows @ reward_rows(engine, [asked], reward)[0]
        raises_reward = -s * target  # e moves against grad R, for guided samples to follow it
    changes = []
    for i in range(6):
        stepped = replace(model, denoiser=copy.deepcopy(model.denoiser))
        offset = 0
        with torch.no_grad():
            for parameter in stepped.denoiser.parameters():
                part = rows[i, offset : offset + parameter.numel()]
                parameter -= 1e-5 * part.view_as(parameter)  # gradient descent
                offset += parameter.numel()
            moved = stepped.noise(asked.x_t, asked.t, asked.states) - e
        changes.append(float((moved * raises_reward).sum()))
    assert np.corrcoef(scores.numpy(), changes)[0, 1] > 0.99


def separation(scores: np.ndarray, carriers: np.ndarray) -> float:
    """Chance that a carrier outranks another image (area under the ROC curve); 0.5 is chance."""
    ranks = np.argsort(np.argsort(scores))
    return float((ranks[carriers].mean() - (carriers.sum() - 1) / 2) / (~carriers).sum())


@pytest.fixture(scope="module")
def planted() -> tuple[Model, list[dict], torch.Tensor]:
    """The demo's model and two pictures of every pair that it was trained on."""
    model, rows = demo_model("cpu"), make_corpus(images_per_pair=2).to_pylist()
    pictures = [np.array(Image.open(io.BytesIO(row["image"]))) for row in rows]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return model, rows, model.encode_images(pixels.float() / 127.5 - 1)


@pytest.fixture(scope="module")
def drawn(
    planted: tuple[Model, list[dict], torch.Tensor],
) -> list[tuple[torch.Tensor, list[Point]]]:
    """Two pictures of every held-out pair and their paths: the same, whatever is asked about."""
    engine = Engine(planted[0], SHORT)
    found = []
    for object_name, studio in HELD_OUT:
        states, null = engine.states([caption(object_name, studio)] * 2)
        noise = [seeded_noise(0, key, engine.model.sample_shape) for key in ("q0", "q1")]
        found.append(
            generation_path(
                engine.model,
                torch.stack(noise),
                states,
                null,
                grid=engine.grid,
                timesteps=engine.timesteps,
                guidance=7.5,
            )
        )
    return found


@pytest.mark.parametrize(
    ("method", "least"),
    [
        ("dtrak", {"image": 0.8, "contrast": 0.95}),
        ("das", {"image": 0.8, "contrast": 0.95}),
        ("cfg", {"image": 0.6, "contrast": 0.65, "slider": 0.65}),
        ("dps", {"contrast": 0.58, "slider": 0.58}),
    ],
)
def test_carriers_of_a_concept_rank_above_the_rest(
    method: str,
    least: dict[str, float],
    planted: tuple[Model, list[dict], torch.Tensor],
    drawn: list[tuple[torch.Tensor, list[Point]]],
) -> None:
    model, rows, x_0 = planted
    engine = Engine(model, replace(SHORT, method=method))
    found = engine.rows(x_0, [r["caption"] for r in rows], [r["image_id"] for r in rows])
    curvature = dual_curvature(found.features)
    separations: dict[str, list[float]] = {query: [] for query in least}
    for (object_name, studio), (x, path) in zip(HELD_OUT, drawn, strict=True):
        prompts, keys = [caption(object_name, studio)] * 2, ["q0", "q1"]
        for column, value, lacking in (
            ("object", object_name, object_contrast(studio)),
            ("studio", studio, studio_contrast(object_name)),
        ):
            carriers = np.array([row[column] == value for row in rows])
            for query in least:
                if query == "image":
                    asked = image_rows(engine, x, prompts, keys)
                elif query == "contrast":
                    asked = contrast_rows(engine, x, prompts, [lacking] * 2, keys)
                else:
                    asked = slider_rows(engine, path, [lacking] * 2)
                solved = curvature.precondition(asked.mean(0)[None], 3.0)[0]
                scores = (found.features.double() @ solved).numpy() * found.weights.numpy()
                separations[query].append(separation(scores, carriers))
    means = {query: float(np.mean(values)) for query, values in separations.items()}
    for query, mean in means.items():
        assert mean >= least[query], means
        assert 1 - mean < 0.5, means  # what the flipped sign would give


def test_separation_is_one_for_a_perfect_ranking_and_zero_for_its_reverse() -> None:
    carriers = np.array([True, False, True, False])
    assert separation(np.array([4.0, 1, 3, 2]), carriers) == 1
    assert separation(np.array([1.0, 4, 2, 3]), carriers) == 0
