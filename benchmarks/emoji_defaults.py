"""Measures methods, queries and damping on the emoji corpus, to choose the defaults.

For each held-out object x style pair: which training images taught the object (truth: the same
object in other styles, recall@min(10, n)) and which the style (truth: same style, precision@10).

    python benchmarks/emoji_defaults.py --corpus CORPUS_DIR --model MODEL_DIR --out RESULTS.json
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
from collections.abc import Iterator, Sequence
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

DAMPINGS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


def main() -> None:
    """Run every configuration and write one JSON record each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=0, help="0 for the whole corpus")
    parser.add_argument("--pairs", type=int, default=106)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--only", default="", help="comma-separated configuration names")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    table = pq.read_table(args.corpus / "train.parquet")
    if args.rows:
        chosen = np.random.default_rng(0).choice(len(table), args.rows, replace=False)
        table = table.take(np.sort(chosen))
    held_out = pq.read_table(args.corpus / "heldout.parquet").drop(["image"]).to_pylist()
    held_out = held_out[:: max(1, len(held_out) // args.pairs)][: args.pairs]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    model = Model.from_pretrained(args.model, device=device)
    bench = Bench(model, table, held_out, args.seeds, args.batch)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    wanted = set(filter(None, args.only.split(",")))
    with args.out.open("w") as out:
        for name, recipe, kinds in configurations():
            if wanted and name not in wanted:
                continue
            for record in bench.run(recipe, kinds):
                record = {"name": name, "machine": machine, "rows": len(table)} | record
                out.write(json.dumps(record) + "\n")
                out.flush()
                best = max(record["scores"], key=lambda row: row[1] + row[2])
                print(
                    f"{name:16} {record['query']:9} ingest {record['rate']:6.0f}/s  "
                    + " ".join(f"{d:g}:{o:.2f}/{s:.2f}" for d, o, s in record["scores"])
                    + f"  best {best}",
                    flush=True,
                )


def configurations() -> Iterator[tuple[str, Recipe, Sequence[str]]]:
    """Name, recipe and the queries asked of it."""
    base = Recipe()
    yield "dtrak", base, ("image", "contrast", "unit", "slider")
    yield "cfg", replace(base, method="cfg"), ("contrast", "slider")
    yield "das", replace(base, method="das"), ("image", "contrast")
    yield "dsm", replace(base, method="dsm"), ("image", "contrast")
    yield "dtrak-1024", replace(base, dim=1024), ("contrast",)
    yield "dtrak-2048", replace(base, dim=2048), ("contrast",)
    yield "dtrak-16384", replace(base, dim=16384), ("contrast",)
    yield "dtrak-t5", replace(base, timesteps=5), ("contrast",)
    yield "dtrak-t20", replace(base, timesteps=20, steps=100), ("contrast",)
    yield "dtrak-bf16", replace(base, dtype="bfloat16"), ("contrast",)
    yield "dtrak-kv", replace(base, parameters=r"attn2\.to_[kv]"), ("contrast",)
    yield "dtrak-qo", replace(base, parameters=r"attn2\.to_(q|out)"), ("contrast",)
    yield "dps", replace(base, method="dps"), ("image", "contrast", "slider")


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

    def run(self, recipe: Recipe, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Ingest once, then ask in every way."""
        model = self.model
        if recipe.dtype == "bfloat16":
            model = replace(model, dtype=torch.bfloat16)
        model.denoiser.to(model.dtype)
        engine = Engine(model, recipe)
        features, weights, rate = self._ingest(engine)
        gram = features.double().mT @ features.double()
        for kind in kinds:
            started = time.perf_counter()
            queries = self._queries(engine, kind)
            seconds = time.perf_counter() - started
            scale = float(gram.trace()) / len(features)  # mean squared length of a row
            scores = []
            for damping in DAMPINGS:
                shifted = gram + damping * scale * torch.eye(len(gram), device=gram.device)
                factor = torch.linalg.cholesky(shifted)
                solved = torch.cholesky_solve(queries.double().mT, factor).float()
                rank = (features @ solved) * weights[:, None]
                top = rank.topk(10, dim=0).indices.cpu().numpy()  # [10, 2 Q]
                scores.append((damping, *self._measure(top)))
            yield {
                "query": kind,
                "recipe": recipe.__dict__,
                "rate": rate,
                "query_seconds": seconds / len(self.truth) / 2,
                "mean_squared_row": scale,
                "scores": scores,
            }
        model.denoiser.to(torch.float32)

    def _ingest(self, engine: Engine) -> tuple[Tensor, Tensor, float]:
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

    def _queries(self, engine: Engine, kind: str) -> Tensor:
        """[2 P, dim]: the object and the style query of each pair, averaged over seeds."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for start in range(0, len(self.prompts), self.batch):
            part = slice(start, start + self.batch)
            prompts, keys = self.prompts[part], self.query_keys[part]
            points = []
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

    def _measure(self, top: np.ndarray) -> tuple[float, float]:
        recall = [
            same[top[:, 2 * i]].sum() / min(10, same.sum())
            for i, (same, _) in enumerate(self.truth)
            if same.any()
        ]
        precision = [same[top[:, 2 * i + 1]].mean() for i, (_, same) in enumerate(self.truth)]
        return float(np.mean(recall)), float(np.mean(precision))


if __name__ == "__main__":
    main()
