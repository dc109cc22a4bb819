"""Measures what the precision of the denoiser's passes does to rows and answers, on emoji.

    python benchmarks/emoji_precision.py --corpus CORPUS_DIR --model MODEL_DIR --rows 3000 \\
        --pairs 53 --seeds 4 --batch 256 --out emoji-precision.md

The same images, pictures, noise and projection in float32, bfloat16 and float16; the queried
pictures are those that the float32 model drew.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from headwater.attribution import Engine, Model, Recipe
from headwater.benchmarks.emoji_bench import arguments, load
from headwater.benchmarks.emoji_projections import ask


def main() -> None:
    """Rows and queries in every precision, against float32."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments(parser, rows=3000, batch=256)
    parser.add_argument("--methods", nargs="+", default=["dtrak", "das", "cfg", "dps"])
    args = parser.parse_args()
    bench, machine = load(args, "float32")
    lines = [
        f"{machine}, torch {torch.__version__}, {args.rows:,} rows, {args.pairs} pairs, "
        f"{args.seeds} seeds\n",
        "| method | precision | img/s | cosine with float32: mean, lowest | object | style |",
        "|---|---|---|---|---|---|",
    ]
    exact: dict[str, torch.Tensor] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        bench.model = Model.from_pretrained(args.model, device=str(bench.model.device), dtype=dtype)
        for method in args.methods:
            engine = Engine(bench.model, Recipe(method=method))
            features, _, rate = bench.ingest(engine)
            reference = exact.setdefault(method, features)
            cosine = torch.cosine_similarity(features, reference)
            answers = " | | "
            if method == "dtrak":
                recall, precision = ask(bench, features, bench.queries(engine, "contrast"))
                answers = f" {np.nanmean(recall):.3f} | {precision.mean():.3f} "
            lines.append(
                f"| {method} | {dtype} | {rate:.0f} "
                f"| {float(cosine.mean()):.5f}, {float(cosine.min()):.5f} |{answers}|"
            )
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
