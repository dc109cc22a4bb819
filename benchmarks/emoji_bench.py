"""What the emoji benchmarks share: encoded corpus, generated held-out pictures, queries and truth.

For each held-out object x style pair: which training images taught the object (truth: the same
object in other styles, recall@min(10, n)) and which the style (truth: same style, precision@10).
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from headwater.attribution import (
    Engine,
    Model,
    Recipe,
    contrast_rows,
    generation_path,
    image_rows,
    seeded_noise,
    slider_rows,
)


def arguments(parser: argparse.ArgumentParser, *, rows: int, batch: int) -> None:
    """What every benchmark on this corpus is told."""
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=rows, help="0 for the whole corpus")
    parser.add_argument("--pairs", type=int, default=106)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=batch)


def load(args: argparse.Namespace, dtype: str) -> tuple[Bench, str]:
    """The bench that the arguments ask for and the name of the machine; no TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    table = pq.read_table(args.corpus / "train.parquet")
    if args.rows:
        chosen = np.random.default_rng(0).choice(len(table), args.rows, replace=False)
        table = table.take(np.sort(chosen))
    held_out = pq.read_table(args.corpus / "heldout.parquet").drop(["image"]).to_pylist()
    held_out = held_out[:: max(1, len(held_out) // args.pairs)][: args.pairs]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    model = Model.from_pretrained(args.model, device=device, dtype=dtype)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return Bench(model, table, held_out, args.seeds, args.batch), machine


def unit_rows(
    engine: Engine, x_0: Tensor, prompts: list[str], lacking: list[str], keys: list[str]
) -> Tensor:
    """The contrast with each noise level's difference, not each side, scaled to unit norm."""
    states, _ = engine.states(lacking)
    rows = torch.zeros(len(x_0), engine.projector.dim, device=x_0.device)
    for point in engine.points(x_0, prompts, keys):
        with_it, _, _ = engine.raw_gradient(point, engine.method.cotangent)
        without, _, _ = engine.raw_gradient(replace(point, states=states), engine.method.cotangent)
        rows += torch.nn.functional.normalize(with_it - without, dim=1)
    return rows


class Bench:
    """Encoded corpus, generated held-out pictures and the truth."""

    def __init__(
        self, model: Model, table: Any, held_out: list[dict[str, str]], seeds: int, batch: int
    ) -> None:
        self.model, self.batch = model, batch
        self.captions = table["caption"].to_pylist()
        self.keys = table["image_id"].to_pylist()
        name, style = np.array(table["name"].to_pylist()), np.array(table["style"].to_pylist())
        images = [
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            for data in table["image"].to_pylist()
        ]
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        self.x_0 = torch.cat(
            [model.encode_images(part.float() / 127.5 - 1) for part in pixels.split(512)]
        )
        # For each pair, which rows show its object and which its style.
        self.truth = [(name == pair["name"], style == pair["style"]) for pair in held_out]
        self.prompts = [pair["caption"] for pair in held_out for _ in range(seeds)]
        self.lacking = (  # object, style
            [f"an emoji in {pair['style']} style" for pair in held_out for _ in range(seeds)],
            [f"a {pair['name']} emoji" for pair in held_out for _ in range(seeds)],
        )
        self.query_keys = [f"{p['image_id']}#{s}" for p in held_out for s in range(seeds)]
        self.seeds = seeds
        noise = torch.stack(
            [seeded_noise(0, f"generate/{key}", model.sample_shape) for key in self.query_keys]
        )
        engine = Engine(model, Recipe())
        parts = []
        for start in range(0, len(noise), batch):
            states, null = engine.states(self.prompts[start : start + batch])
            part, _ = generation_path(
                model,
                noise[start : start + batch].to(model.device),
                states,
                null,
                grid=engine.grid,
                timesteps=engine.timesteps,
                guidance=7.5,
            )
            parts.append(part)
        self.noise, self.generated = noise, torch.cat(parts)

    def ingest(self, engine: Engine) -> tuple[Tensor, Tensor, float]:
        """Features [N, dim], weights [N] and images per second."""
        rows, weights = [], []
        engine.rows(self.x_0[: self.batch], self.captions[: self.batch], self.keys[: self.batch])
        started = time.perf_counter()
        for start in range(0, len(self.x_0), self.batch):
            part = slice(start, start + self.batch)
            found = engine.rows(self.x_0[part], self.captions[part], self.keys[part])
            rows.append(found.features)
            weights.append(found.weights)
        features, weight = torch.cat(rows), torch.cat(weights)
        float(weight.sum())  # waits for the device
        return features, weight, len(features) / (time.perf_counter() - started)

    def queries(self, engine: Engine, kind: str) -> Tensor:
        """[2 P, dim]: the object and the style query of each pair, averaged over seeds."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, len(self.prompts), self.batch):
            part = slice(start, start + self.batch)
            prompts, keys = self.prompts[part], self.query_keys[part]
            points: list[Any] = []
            if kind == "slider":
                states, null = engine.states(prompts)
                _, points = generation_path(
                    engine.model,
                    self.noise[part].to(engine.model.device),
                    states,
                    null,
                    grid=engine.grid,
                    timesteps=engine.timesteps,
                    guidance=7.5,
                )
            for side in (0, 1):
                lacking = self.lacking[side][part]
                if kind == "image":
                    rows = image_rows(engine, self.generated[part], prompts, keys)
                elif kind == "contrast":
                    rows = contrast_rows(engine, self.generated[part], prompts, lacking, keys)
                elif kind == "unit":
                    rows = unit_rows(engine, self.generated[part], prompts, lacking, keys)
                else:
                    rows = slider_rows(engine, points, lacking)
                found[side].append(rows)
        sides = [torch.cat(rows).view(-1, self.seeds, rows[0].shape[1]).mean(1) for rows in found]
        return torch.stack(sides, 1).flatten(0, 1)

    def measure(self, top: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Object recall [P], nan where the corpus has none, and style precision [P], of [10, 2 P].

        Columns of `top` are the rows found for the queries, in the order of `queries`.
        """
        recall = [
            same[top[:, 2 * i]].sum() / min(10, same.sum()) if same.any() else np.nan
            for i, (same, _) in enumerate(self.truth)
        ]
        precision = [same[top[:, 2 * i + 1]].mean() for i, (_, same) in enumerate(self.truth)]
        return np.array(recall), np.array(precision)
