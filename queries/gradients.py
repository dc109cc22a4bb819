"""From a concept to query rows: pictures, trajectories and gradients, seed by seed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from headwater.attribution import (
    Engine,
    ImageRejected,
    Model,
    Point,
    as_seen,
    contrast_rows,
    ddim_grid,
    decode,
    fit,
    generation_path,
    image_rows,
    journey_rows,
    kept,
    reward_rows,
    seeded_noise,
    slider_rows,
    stretch,
)

from .concept import Asking, Concept
from .errors import QueryError


def query_rows(
    engine: Engine, concept: Concept, asking: Asking
) -> tuple[Tensor, list[Image.Image]]:
    """One row per seed [S, dim] float32, and the pictures they are about: drawn, or the given."""
    model = engine.model
    if concept.alone and (reason := model.refuses("")):
        raise QueryError(f"{reason}, so it has no concept without the rest; leave out --alone")
    compared = asking.method in ("contrast", "slider")
    for text in [text for pair in concept.pairs for text in pair] if compared else [concept.prompt]:
        if reason := model.refuses(text):
            raise QueryError(f"{reason}; ask with what it was trained on")
    picture = None if concept.image is None else read_picture(concept.image)
    given = None  # [1, C, h, w]
    if picture is not None:
        given = model.encode_pictures(fit(picture, model.image_size)[None])
    rows: list[Tensor] = []
    pictures: list[Image.Image] = []
    for start in range(0, asking.seeds, asking.batch_size):
        stop = min(start + asking.batch_size, asking.seeds)
        keys = [f"query/{asking.seed + i}" for i in range(start, stop)]
        (prompts, contrasts), *further = (
            ([has] * len(keys), [lacks] * len(keys)) for has, lacks in concept.pairs
        )
        path: Iterable[Point] | None = None
        if given is None:
            x_0, path = generate(engine, prompts, keys, asking)
        else:
            x_0 = given.expand(len(keys), -1, -1, -1)
        if asking.method == "contrast":
            rows.append(contrast_rows(engine, x_0, prompts, contrasts, keys, further))
        elif asking.method == "image":
            rows.append(image_rows(engine, x_0, prompts, keys))
        else:
            path = engine.points(x_0, prompts, keys) if path is None else path
            if asking.method == "slider":
                rows.append(slider_rows(engine, path, contrasts))
            elif asking.method == "journey":
                rows.append(journey_rows(engine, path, keys, asking.guidance))
            else:
                assert concept.reward is not None  # concept.check
                rows.append(reward_rows(engine, path, concept.reward))
        if picture is None:
            pictures += to_images(model, x_0)
    return torch.cat(rows), pictures if picture is None else [picture]


def generate(
    engine: Engine, prompts: list[str], keys: list[str], asking: Asking
) -> tuple[Tensor, list[Point]]:
    """Pictures x_0 [S, C, h, w] for the prompts, and the points of their generation paths."""
    model = engine.model
    noise = torch.stack(
        [seeded_noise(engine.recipe.seed, f"generate/{key}", model.sample_shape) for key in keys]
    )
    states, null = engine.states(prompts)
    grid = ddim_grid(model, asking.steps)
    within = stretch(grid, engine.recipe.levels)
    return generation_path(
        model,
        noise.to(model.device),
        states,
        null,
        grid=grid,
        timesteps=kept(within, min(engine.recipe.timesteps, len(within))),
        guidance=asking.guidance,
    )


def read_picture(picture: str | Path | Image.Image) -> Image.Image:
    """A picture file or PIL image as a person sees it, in RGB.

    Raises:
        QueryError: a file that is missing or no picture.
    """
    try:
        if isinstance(picture, Image.Image):
            return as_seen(picture)
        return decode(Path(picture).read_bytes())
    except OSError as error:
        raise QueryError(f"image {picture}: {error.strerror}; check --image") from error
    except ImageRejected as error:
        raise QueryError(f"image {picture} cannot be used: {error}") from error


@torch.no_grad()
def to_images(model: Model, x_0: Tensor) -> list[Image.Image]:
    """Samples x_0 [S, C, h, w] as PIL images."""
    pixels = model.decode(x_0.to(model.device)).clamp(-1, 1)
    array = ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image.squeeze()) for image in array]
