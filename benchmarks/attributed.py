"""Models trained on everything, wrapped as pipelines, and what each method answers about them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import nn

from headwater.attribution import Engine, Model, label_free_damping
from headwater.benchmarks.retraining import Training, pipeline_of, small_unet
from headwater.benchmarks.stacked import taken
from headwater.benchmarks.study import Answers, Configuration, Study, answer, query_rows


def saved_model(
    base: Model, stacked: nn.Module, place: int, training: Training, side: int, folder: Path
) -> Model:
    """Model `place` of a stack, saved as a standard pipeline and loaded from there in float32."""
    unet = taken(stacked, place, small_unet(base, training.widths, side, 0))
    pipeline_of(base, unet).save_pretrained(folder)
    return Model.from_pretrained(folder, device=str(base.device), dtype="float32")


def answers_of(study: Study, configurations: Iterable[Configuration]) -> Iterator[Answers]:
    """What each method says; rows that several methods share are made once, if they stand together.

    The seconds of shared rows are those of their making.
    """
    made: Answers | None = None
    for configuration in configurations:
        if made is None or made.configuration.recipe != configuration.recipe:
            made = answer(study, configuration)
            yield made
            continue
        rows, seconds = made.rows, made.query_seconds
        if configuration.query != made.configuration.query:
            began = time.perf_counter()
            rows = query_rows(study, Engine(study.model, configuration.recipe), configuration.query)
            float(rows.sum())  # waits for the device
            seconds = time.perf_counter() - began
        solves = configuration.preconditioning == "query"
        damping = label_free_damping(made.curvature, rows) if solves else 1.0
        made = replace(
            made, configuration=configuration, rows=rows, damping=damping, query_seconds=seconds
        )
        yield made
