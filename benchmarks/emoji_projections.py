"""Measures retrieval against the projection's kind and width on the emoji corpus.

    python benchmarks/emoji_projections.py --corpus CORPUS_DIR --model MODEL_DIR --rows 3000 \
        --pairs 53 --seeds 4 --out emoji-projections.jsonl

One pass keeps the unprojected rows and queries on the device (5.5 MB each); every projection is
then applied to those same gradients, parameter by parameter, as an ingest does it. So rows differ
by their projection alone, and differences to `unprojected` are paired. Writes a record a line, and
a table beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.attribution import Engine, Model, Recipe
from headwater.attribution.layers import Slot
from headwater.attribution.projection import KINDS, Projector, make_projector
from headwater.benchmarks.emoji import make_study, read
from headwater.benchmarks.measure import ranking_metrics
from headwater.benchmarks.runs import machine
from headwater.benchmarks.study import Study, corpus_rows, query_rows

DAMPING = 3.0  # in mean squared lengths of a row: the default of queries
RESAMPLES = 4000
SAMPLES = 64  # gradients projected at a time
Measured = tuple[np.ndarray, np.ndarray]  # object recall [P] and style precision [P]


def main() -> None:
    """Project, ask and compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    arguments(parser, batch=64)
    parser.add_argument("--dtype", default="auto", help="precision of the denoiser's passes")
    parser.add_argument("--kinds", nargs="+", default=[k for k in KINDS if k != "identity"])
    parser.add_argument("--widths", nargs="+", type=int, default=[2**i for i in range(9, 16)])
    parser.add_argument("--draws", type=int, default=3, help="projection seeds to average over")
    args = parser.parse_args()
    study, machine = study_of(args, args.dtype)
    if not any(q.truth.any() for q in study.questions if q.concept == "object"):
        parser.error("no held-out object is among the rows; raise --rows or --pairs")
    engine = Engine(study.model, Recipe(projection="identity"))
    slots = engine.selection.slots
    for kind in args.kinds:  # what cannot be made says so before the long part
        make_projector(kind, slots=slots, dim=args.widths[0], seed=0)
    features, _ = corpus_rows(engine, study.corpus, study.batch)
    queries = query_rows(study, engine, "contrast").mean(1)
    print(f"{len(features)} rows of {features.shape[1]}", flush=True)
    common = {
        "machine": machine,
        "rows": len(features),
        "pairs": len(study.asked),
        "seeds": args.seeds,
    }
    exact = ask(study, features, queries)
    records = [
        record("unprojected", features.shape[1], [exact], exact, 0.0) | {"asked": 0, "draws": 1}
    ]
    for kind in args.kinds:
        for width in args.widths:
            found, seconds = [], []
            for seed in range(args.draws):
                projector = make_projector(kind, slots=slots, dim=width, seed=seed)
                project(projector, slots, features[:SAMPLES])  # compiles and draws
                rows, taken = project(projector, slots, features)
                seconds.append(taken)
                found.append(ask(study, rows, project(projector, slots, queries)[0]))
            cost = min(seconds) / len(features) * 1000
            records.append(
                record(kind, projector.dim, found, exact, cost)
                | {"asked": width, "draws": args.draws}
            )
            print(json.dumps(records[-1]), flush=True)
    args.out.write_text("".join(json.dumps(common | each) + "\n" for each in records))
    table = markdown(records)
    args.out.with_suffix(".md").write_text(table)
    print(table)


def arguments(parser: argparse.ArgumentParser, *, batch: int) -> None:
    """What a measurement on this corpus is told."""
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3000, help="0 for the whole corpus")
    parser.add_argument("--pairs", type=int, default=106)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--batch", type=int, default=batch)


def study_of(args: argparse.Namespace, dtype: str) -> tuple[Study, str]:
    """The study that the arguments ask for, and the name of the machine; no TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = Model.from_pretrained(args.model, dtype=dtype)
    art, pairs = read(args.corpus, args.rows, args.pairs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    study = make_study(model, art, pairs, seeds=args.seeds, batch=args.batch)
    return study, machine(str(model.device))["machine"]


def project(projector: Projector, slots: Sequence[Slot], gradients: Tensor) -> tuple[Tensor, float]:
    """Rows [N, dim] of gradients [N, size], and the seconds taken."""
    rows = torch.zeros(len(gradients), projector.dim, device=gradients.device)
    square = torch.zeros(len(gradients), device=gradients.device)
    float(square.sum())  # waits for the device
    started = time.perf_counter()
    for start in range(0, len(gradients), SAMPLES):
        part = slice(start, start + SAMPLES)
        for slot in slots:
            piece = gradients[part, slot.offset : slot.offset + slot.size]
            projector.add(rows[part], square[part], piece, slot)
    float(square.sum())
    return rows, time.perf_counter() - started


def ask(study: Study, rows: Tensor, queries: Tensor) -> Measured:
    """What the queries find, by the dual form Phi (K + lambda)^-1 q = (G + lambda)^-1 Phi q."""
    count = len(rows)
    gram = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    matched = torch.zeros(count, len(queries), dtype=torch.float64, device=rows.device)
    for some, asked in zip(rows.split(1 << 16, 1), queries.split(1 << 16, 1), strict=True):
        block = some.double()
        gram.addmm_(block, block.mT)
        matched.addmm_(block, asked.double().mT)
    gram.diagonal().add_(DAMPING * float(gram.trace()) / count)
    scores = torch.cholesky_solve(matched, torch.linalg.cholesky(gram))
    order = scores.argsort(dim=0, descending=True, stable=True).cpu().numpy()
    found = [
        ranking_metrics(question.truth[order[:, i]]) for i, question in enumerate(study.questions)
    ]
    recall = [metrics[1] for metrics in found[::2]]
    precision = [metrics[0] for metrics in found[1::2]]
    return np.array(recall), np.array(precision)


def record(
    kind: str, dim: int, found: Sequence[Measured], exact: Measured, cost: float
) -> dict[str, Any]:
    """Means over pairs and draws; 95 % intervals over pairs, the draws held."""
    recall, precision = (np.mean([each[side] for each in found], axis=0) for side in (0, 1))
    picked = np.random.default_rng(0).integers(len(recall), size=(RESAMPLES, len(recall)))

    def mean(pair: Measured, rows: np.ndarray | slice) -> Any:
        return (np.nanmean(pair[0][rows], axis=-1) + pair[1][rows].mean(-1)) / 2

    def interval(values: np.ndarray) -> list[float]:
        return [float(edge) for edge in np.nanquantile(values, [0.025, 0.975])]

    averaged = (recall, precision)
    every = slice(None)
    return {
        "projection": kind,
        "dim": dim,
        "bytes": 2 * dim,  # an index stores float16
        "object": float(np.nanmean(recall)),
        "style": float(precision.mean()),
        "mean": float(mean(averaged, every)),
        "interval": interval(mean(averaged, picked)),
        "of_draws": [float(mean(each, every)) for each in found],
        "difference": float(mean(averaged, every) - mean(exact, every)),
        "difference_interval": interval(mean(averaged, picked) - mean(exact, picked)),
        "seconds_per_1000": cost,
    }


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """The table of a report."""
    lines = [
        "| projection | k | bytes per image | object | style | mean (95 % over pairs) "
        "| against unprojected | of draws | s per 1000 gradients |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in records:
        low, high = each["interval"]
        under, over = each["difference_interval"]
        lines.append(
            f"| {each['projection']} | {each['dim']:,} | {each['bytes']:,} "
            f"| {each['object']:.3f} | {each['style']:.3f} "
            f"| {each['mean']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {each['difference']:+.3f} ({under:+.3f} to {over:+.3f}) "
            f"| {min(each['of_draws']):.3f} to {max(each['of_draws']):.3f} "
            f"| {each['seconds_per_1000']:.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
