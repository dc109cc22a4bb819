"""`headwater bench query`: seconds of one question, local and global, on a model of real size.

The whole of `Index.query` is timed, from the text or picture to the hits with their previews:
drawing, gradients, preconditioning, search in an index that is made here and the ledger's line.
The index is small; what search adds for a large one is `headwater bench index`'s matter.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from headwater.attribution import Model, ModelError, Recipe
from headwater.attribution.model import usable_device
from headwater.benchmarks import sizes
from headwater.benchmarks.runs import machine
from headwater.benchmarks.study import Say
from headwater.ingest import build_index
from headwater.queries import Asking, Concept, Index

PROMPT, CONTRAST = "a photo of the red house", "a photo of the house"


def run(
    out: Path | None,
    *,
    size: str = "sd-1.4",
    images: int = 64,
    seeds: int = 16,
    repeats: int = 3,
    device: str = "cuda",
    say: Say,
) -> pa.Table:
    """Time a local question (a given picture) and a global one (`seeds` drawn pictures).

    Args:
        out: write this path with .md added; None: say the table only.
        size: a model of `sizes.PIPELINES`, with random weights.
        images: random pictures in the index.
        seeds: pictures of the global question; the local one keeps its default of noise draws.
        repeats: of each question, after one that is not counted.
        device: where it runs.
        say: hears each line.

    Raises:
        ModelError: a size that there is not, or an unusable device.
    """
    if size not in sizes.PIPELINES:
        raise ModelError(
            f"no model of real size is called {size!r}; choose of {', '.join(sizes.PIPELINES)}"
        )
    where = usable_device(device)
    dtype = "bfloat16" if where.type == "cuda" else "float32"
    pipeline = sizes.build(size, where, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    model = Model.from_pipeline(pipeline, device=device, dtype=dtype)
    questions = {
        "local, a given picture": (Asking(), True),
        f"global, {seeds} pictures drawn": (Asking(seeds=seeds), False),
    }
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) / "pictures"
        pictures.mkdir()
        generator = np.random.default_rng(0)
        for number in range(images):
            pixels = generator.integers(0, 256, (*model.image_size, 3), np.uint8)
            Image.fromarray(pixels).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(PROMPT)
        folder = Path(scratch) / "index"
        build_index(pictures, model, folder, recipe=Recipe(dtype=dtype), batch_size=16)
        index = Index(folder)
        for name, (asking, given) in questions.items():
            concept = Concept(PROMPT, CONTRAST, pictures / "0.png" if given else None)
            seconds = []
            for repeat in range(repeats + 1):
                started = time.perf_counter()
                result = index.query(concept, model, asking=asking)
                result.thumbnails([hit.item_id for hit in result.hits])
                if repeat:  # the first starts what the others find started
                    seconds.append(time.perf_counter() - started)
            records.append(
                {
                    "model": size,
                    "question": name,
                    "seconds": statistics.median(seconds),
                    "slowest": max(seconds),
                    "forwards": forwards(asking, model_draws=not given),
                }
            )
            say(f"{size}: {name}: {records[-1]['seconds']:.2f} s")
    table = pa.Table.from_pylist(records)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.with_name(f"{out.name}.md").write_text(report(table, machine(str(where)), repeats))
    return table


def forwards(asking: Asking, *, model_draws: bool, timesteps: int = 10) -> int:
    """Forward passes that a contrast amounts to; a backward pass counts as one.

    Drawing takes two a step (guidance), each noise level a forward and a backward for both sides.
    """
    drawing = 2 * asking.steps if model_draws else 0
    return asking.seeds * (drawing + 4 * timesteps)


def report(table: pa.Table, where: dict[str, str], repeats: int) -> str:
    """The table in Markdown, with command, machine and date."""
    lines = [
        "# Seconds of a question",
        "",
        f"`{where['command']}` on {where['machine']}, torch {where['torch']}, {where['date']}; "
        f"random weights, seed 0, median and slowest of {repeats} after one that is not counted.",
        "",
        "| model | question | seconds | slowest | forward passes that it amounts to |",
        "|---|---|---|---|---|",
    ]
    for row in table.to_pylist():
        lines.append(
            f"| {row['model']} | {row['question']} | {row['seconds']:.2f} | "
            f"{row['slowest']:.2f} | {row['forwards']} |"
        )
    return "\n".join(lines) + "\n"
