"""How well a method's scores foresee measured utilities: a row for each question and lambda."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headwater.benchmarks.measure import BASELINES, answerable, wanted
from headwater.benchmarks.parts import NOWHERE, Parts
from headwater.benchmarks.ranks import lds, repeatability
from headwater.benchmarks.retraining import Say
from headwater.benchmarks.study import Configuration, Study, answer

SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("replicate", pa.int64()),
        ("method", pa.string()),
        ("question", pa.int64()),
        ("concept", pa.string()),  # the utility and which pictures
        ("picture", pa.string()),
        ("damping", pa.float64()),  # null: the method has none
        ("effective", pa.float64()),  # dimension at it / min(rows, width); null: it has none
        ("label_free", pa.bool_()),
        ("lds", pa.float64()),
        ("ingest_seconds", pa.float64()),
    ]
)


def scored(
    study: Study,
    measured: npt.NDArray[np.float64],
    halves: npt.NDArray[np.bool_],
    methods: Sequence[Configuration],
    say: Say,
    parts: Parts = NOWHERE,
) -> pa.Table:
    """A row for each method, question and damping, by `SCHEMA`.

    `measured` are the utilities [Q, K, seeds]. A method that is in `parts` is taken from there;
    others are kept there.
    """
    true = measured.mean(2)
    tables = []

    def rows(found: npt.NDArray[np.float64], **facts: Any) -> Iterator[dict[str, Any]]:
        for number, question in enumerate(study.questions):
            yield {
                "study": study.name,
                "replicate": study.replicate,
                "question": number,
                "concept": question.concept,
                "picture": question.picture,
                "lds": float(found[number]),
                "label_free": True,
                **facts,
            }

    def of_baseline(name: str) -> Iterator[dict[str, Any]]:
        return rows(lds(BASELINES[name](study), halves, true))

    def of_method(configuration: Configuration) -> Iterator[dict[str, Any]]:
        answers = answer(study, configuration)
        for damping in wanted(answers):
            scores = answers.scores(damping).double().cpu().numpy()
            yield from rows(
                lds(scores, halves, true),
                damping=damping,
                effective=None if damping is None else answers.curvature.share(damping),
                label_free=damping in (None, answers.damping),
                ingest_seconds=answers.ingest_seconds,
            )

    def add(method: str, make: Callable[[], Iterator[dict[str, Any]]]) -> None:
        def table() -> pa.Table:
            listed = [{"method": method, **row} for row in make()]
            return pa.Table.from_pylist(listed, schema=SCHEMA)

        tables.append(parts.once(table, study.name, study.replicate, method))
        say(_line(study, method, tables[-1].filter(tables[-1]["label_free"]).to_pylist()))

    if measured.shape[2] > 1:
        add("another training", lambda: rows(repeatability(measured)))
    for name in BASELINES:
        if not name.startswith("ceiling"):
            add(name, partial(of_baseline, name))
    for configuration in answerable(study, methods, say):
        add(configuration.name, partial(of_method, configuration))
    return pa.concat_tables(tables)


def _line(study: Study, method: str, records: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for concept in dict.fromkeys(str(r["concept"]) for r in records):
        mean = np.mean([r["lds"] for r in records if r["concept"] == concept])
        parts.append(f"{concept} {mean:.3f}")
    return f"{study.name} {study.replicate} {method}: {'; '.join(parts)}"
