"""Measures what the precision of the denoiser's passes does to rows and answers, on emoji.

    python benchmarks/emoji_precision.py --corpus CORPUS_DIR --model MODEL_DIR --rows 3000 \\
        --pairs 53 --seeds 4 --batch 256 --out emoji-precision.md

The same images, pictures, noise and projection in float32, bfloat16 and float16; the queried
pictures are those that the float32 model drew.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from headwater.attribution import Engine, Model, Recipe
from headwater.benchmarks.emoji_projections import arguments, ask, study_of
from headwater.benchmarks.study import ingested, query_rows


def main() -> None:
    """Rows and queries in every precision, against float32."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    arguments(parser, batch=256)
    parser.add_argument("--methods", nargs="+", default=["dtrak", "das", "cfg", "dps"])
    args = parser.parse_args()
    study, machine = study_of(args, "float32")
    study.drawn()
    lines = [
        f"{machine}, torch {torch.__version__}, {args.rows:,} rows, {args.pairs} pairs, "
        f"{args.seeds} seeds\n",
        "| method | precision | img/s | cosine with float32: mean, lowest | object | style |",
        "|---|---|---|---|---|---|",
    ]
    exact: dict[str, torch.Tensor] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        device = str(study.model.device)
        model = Model.from_pretrained(args.model, device=device, dtype=dtype)
        same = replace(study, model=model)  # with the pictures that are drawn already
        for method in args.methods:
            engine = Engine(model, Recipe(method=method))
            found = ingested(engine, same.corpus, same.batch)
            reference = exact.setdefault(method, found.features)
            cosine = torch.cosine_similarity(found.features, reference)
            answers = " | | "
            if method == "dtrak":
                queries = query_rows(same, engine, "contrast").mean(1)
                recall, precision = ask(same, found.features, queries)
                answers = f" {np.nanmean(recall):.3f} | {precision.mean():.3f} "
            lines.append(
                f"| {method} | {dtype} | {len(cosine) / found.seconds:.0f} "
                f"| {float(cosine.mean()):.5f}, {float(cosine.min()):.5f} |{answers}|"
            )
            print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
