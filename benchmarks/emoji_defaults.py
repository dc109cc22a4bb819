"""Measures methods, queries and damping on the emoji corpus, to choose the defaults.

python benchmarks/emoji_defaults.py --corpus CORPUS_DIR --model MODEL_DIR --out RESULTS.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from headwater.attribution import Engine, Recipe
from headwater.benchmarks.emoji_bench import Bench, arguments, load

DAMPINGS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)


def main() -> None:
    """Run every configuration and write one JSON record each."""
    parser = argparse.ArgumentParser(description=__doc__)
    arguments(parser, rows=0, batch=256)
    parser.add_argument("--dtype", default="auto", help="precision of the denoiser's passes")
    parser.add_argument("--only", default="", help="comma-separated configuration names")
    args = parser.parse_args()
    bench, machine = load(args, args.dtype)
    wanted = set(filter(None, args.only.split(",")))
    with args.out.open("w") as out:
        for name, recipe, kinds in configurations():
            if wanted and name not in wanted:
                continue
            for record in run(bench, recipe, kinds):
                record = {"name": name, "machine": machine, "rows": len(bench.keys)} | record
                out.write(json.dumps(record) + "\n")
                out.flush()
                scores: Any = record["scores"]
                best = max(scores, key=lambda row: row[1] + row[2])
                print(
                    f"{name:16} {record['query']:9} ingest {record['rate']:6.0f}/s  "
                    + " ".join(f"{d:g}:{o:.2f}/{s:.2f}" for d, o, s in scores)
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


def run(bench: Bench, recipe: Recipe, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Ingest once, then ask in every way."""
    model = bench.model
    if recipe.dtype == "bfloat16":
        model = replace(model, dtype=torch.bfloat16)
    model.denoiser.to(model.dtype)
    engine = Engine(model, recipe)
    features, weights, rate = bench.ingest(engine)
    gram = features.double().mT @ features.double()
    for kind in kinds:
        started = time.perf_counter()
        queries = bench.queries(engine, kind)
        seconds = time.perf_counter() - started
        scale = float(gram.trace()) / len(features)  # mean squared length of a row
        scores = []
        for damping in DAMPINGS:
            shifted = gram + damping * scale * torch.eye(len(gram), device=gram.device)
            factor = torch.linalg.cholesky(shifted)
            solved = torch.cholesky_solve(queries.double().mT, factor).float()
            rank = (features @ solved) * weights[:, None]
            top = rank.topk(10, dim=0).indices.cpu().numpy()  # [10, 2 Q]
            scores.append((damping, *(float(np.nanmean(each)) for each in bench.measure(top))))
        yield {
            "query": kind,
            "recipe": recipe.__dict__,
            "rate": rate,
            "query_seconds": seconds / len(bench.truth) / 2,
            "mean_squared_row": scale,
            "scores": scores,
        }
    model.denoiser.to(torch.float32)


if __name__ == "__main__":
    main()
