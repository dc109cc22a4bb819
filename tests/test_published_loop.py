"""The engine computes what the published loop computes, on the same points and coordinates."""

from __future__ import annotations

import tiny
import torch

from headwater.attribution import Engine, Model, Recipe
from headwater.benchmarks import published_loop


def test_features_equal_the_published_loop() -> None:
    model = Model.from_pipeline(tiny.stable_diffusion(), device="cpu", dtype="float32")
    recipe = Recipe(method="dps", timesteps=3, steps=12, projection="identity", parameters="attn2")
    engine = Engine(model, recipe)
    x_0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    captions = ["a red cat", "the dog", "a fish by studio"]
    states, empty = engine.states(captions)
    assert states is not None
    assert empty is not None
    text, null = (s.tensors["encoder_hidden_states"] for s in (states, empty))
    kept = model.schedule.scheduler.alphas_cumprod
    points = published_loop.guided_inversion(
        model.denoiser, kept, x_0, text, null, engine.grid, engine.timesteps
    )
    coordinates = torch.randperm(engine.projector.dim)[:500]
    expected = published_loop.features(
        model.denoiser, kept, x_0, text, points, engine.timesteps, coordinates
    )
    rows = engine.rows(x_0, captions, ["a", "b", "c"]).features[:, coordinates]
    assert torch.cosine_similarity(rows, expected).min() > 0.9999
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-4)
