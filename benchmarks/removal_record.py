"""The record of counterfactual removals: a table, Markdown and a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headwater.benchmarks.measure import BASELINES
from headwater.benchmarks.methods import METHODS_TABLE
from headwater.benchmarks.record import told
from headwater.benchmarks.runs import Run
from headwater.benchmarks.summary import interval, resampled

CARRIERS = "random carriers"
ASKED_FIRST = "random carriers, asked captions first"
_EFFECTS = ("drop", "loss_rise")  # on the concept itself
MEASURES = ("drop", "collateral", "loss_rise", "loss_collateral")
SCHEMA = pa.schema(
    [
        ("replicate", pa.int64()),  # seed of the trainings
        ("method", pa.string()),
        ("concept", pa.string()),  # its kind
        ("picture", pa.string()),  # its label
        ("fraction", pa.float64()),  # of the corpus, removed
        ("removed", pa.int64()),
        ("carriers_removed", pa.float64()),  # share of the concept's pictures that were removed
        ("presence", pa.float64()),  # what is left of the concept
        *((name, pa.float64()) for name in MEASURES),
    ]
)
_INTRO = """
Models retrained without the pictures that a method ranks first for a concept: the drop of the
concept in what they draw (probability by a classifier of real pictures, right on {accuracy} of
unseen ones), of all other concepts (collateral), and how much their denoising losses rise. Means
over concepts and seeds with 95 % bootstrap intervals. "random carriers" takes labels; so does
"asked captions first", which removes the carriers under the captions that the methods are asked
with before the others, as a method may that takes the asked company for the concept's. Each of ours
is set against the best other method first.
"""


def write(run: Run, table: pa.Table, accuracy: Mapping[str, float]) -> None:
    """Leave the table as Parquet, Markdown and a plot in the run's folder."""
    out = run.out
    pq.write_table(table, out / "counterfactual.parquet")
    rows = table.to_pylist()
    intro = _INTRO.format(accuracy=" and ".join(f"{v:.3f} ({k})" for k, v in accuracy.items()))
    lines = ["# counterfactual", intro, told(run.config), "", *_ratios(rows), *_tables(rows)]
    lines.append("![drop](counterfactual-drop.png)")
    (out / "counterfactual.md").write_text("\n".join(lines) + "\n")
    _plot(rows, out / "counterfactual-drop.png")


def ratio(
    rows: Sequence[Mapping[str, Any]], ours: str, rival: str, measure: str = "drop"
) -> tuple[float, float, float]:
    """Our mean effect divided by a rival's, with a 95 % interval.

    Seeds and concepts are drawn again, the same for both. Against a rival without an
    effect the ratio is infinite, or minus infinity where we have none either.
    """
    effects = {
        (r["method"], r["replicate"], r["concept"], r["picture"]): float(r[measure]) for r in rows
    }
    mine = [key for key in effects if key[0] == ours]
    cells = [(seed, (kind, label)) for _, seed, kind, label in mine]
    pairs = [(effects[key], effects[rival, *key[1:]]) for key in mine]
    found, means = resampled(cells, pairs), np.mean(pairs, axis=0)
    low, high = np.percentile([_over(*of) for of in found], [2.5, 97.5], method="nearest")
    return _over(*means), float(low), float(high)


def _over(ours: float, rival: float) -> float:
    if rival > 0:
        return float(ours / rival)
    return np.inf if ours > 0 else -np.inf


def _ratios(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our drops and loss rises against the best other method's and the controls'."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ours = _ours(methods)
    rivals = [m for m in methods if m not in (*ours, CARRIERS, ASKED_FIRST, *BASELINES)]
    controls = [m for m in methods if m in (CARRIERS, ASKED_FIRST, *BASELINES)]
    lines = []
    for fraction in sorted({row["fraction"] for row in rows}):
        here = [row for row in rows if row["fraction"] == fraction]
        for measure in _EFFECTS:
            effects = {method: _mean(here, method, measure) for method in rivals}
            best = sorted(effects, key=effects.__getitem__, reverse=True)[:1]
            name = measure.replace("_", " ")
            for mine in ours:
                ratios = []
                for method in (*best, *controls):
                    value, low, high = ratio(here, mine, method, measure)
                    ratios.append(f"{value:.2f} times ({low:.2f} to {high:.2f}) that of {method}")
                told_of = f"the {name} by {mine} is {', '.join(ratios)}"
                lines.append(f"- {fraction:.0%} removed: {told_of}.")
    return [*lines, ""]


def _ours(methods: Iterable[str]) -> list[str]:
    return [m for m in methods if m in METHODS_TABLE and METHODS_TABLE[m].source == "ours"]


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for fraction in sorted({row["fraction"] for row in rows}):
        here = [row for row in rows if row["fraction"] == fraction]
        methods = dict.fromkeys(row["method"] for row in here)
        lines += [
            f"## {fraction:.0%} of the corpus removed",
            "",
            "| method | carriers removed | drop | 95 % | collateral | loss rise | 95 % | others' |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in sorted(methods, key=lambda m: -_mean(here, m, "drop")):
            mine = [row for row in here if row["method"] == method]
            low, high = interval(mine, "drop")
            below, above = interval(mine, "loss_rise")
            lines.append(
                f"| {method} | {_mean(here, method, 'carriers_removed'):.2f} "
                f"| {_mean(here, method, 'drop'):.3f} | {low:.3f} to {high:.3f} "
                f"| {_mean(here, method, 'collateral'):.3f} "
                f"| {_mean(here, method, 'loss_rise'):.4f} | {below:.4f} to {above:.4f} "
                f"| {_mean(here, method, 'loss_collateral'):.4f} |"
            )
        lines += ["", *_kinds(here)]
    return lines


def _kinds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our effects over the stronger control's, for each kind of concept alone."""
    methods = dict.fromkeys(row["method"] for row in rows)
    kinds = list(dict.fromkeys(row["concept"] for row in rows))
    if ASKED_FIRST not in methods or len(kinds) < 2:
        return []
    titles = [f"{kind}, {measure.replace('_', ' ')}" for kind in kinds for measure in _EFFECTS]
    lines = [
        f'Times the effect of "{ASKED_FIRST}", by kind of concept:',
        "",
        f"| method | {' | '.join(titles)} |",
        "|---" * (1 + len(titles)) + "|",
    ]
    for method in _ours(methods):
        cells = []
        for kind in kinds:
            here = [row for row in rows if row["concept"] == kind]
            for measure in _EFFECTS:
                value, low, high = ratio(here, method, ASKED_FIRST, measure)
                cells.append(f"{value:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _mean(rows: Sequence[Mapping[str, Any]], method: str, measure: str) -> float:
    return float(np.mean([row[measure] for row in rows if row["method"] == method]))


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """What each method's removal does to the concept, with 95 % intervals: the strongest on top."""
    from matplotlib.figure import Figure

    methods = sorted({row["method"] for row in rows}, key=lambda m: _mean(rows, m, "drop"))
    fractions = sorted({row["fraction"] for row in rows})
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(methods)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = ("drop of its presence", "rise of its loss")
    for axis, measure, title in zip(axes, _EFFECTS, titles, strict=True):
        for number, fraction in enumerate(fractions):
            here = [row for row in rows if row["fraction"] == fraction]
            places = np.arange(len(methods)) + 0.2 * (number - (len(fractions) - 1) / 2)
            for place, method in zip(places, methods, strict=True):
                mine = [row for row in here if row["method"] == method]
                axis.plot(interval(mine, measure), [place] * 2, "-", color=f"C{number}")
            means = [_mean(here, method, measure) for method in methods]
            axis.plot(means, places, "o", color=f"C{number}", label=f"{fraction:.0%} removed")
        axis.axvline(0, linewidth=0.8, color="grey")
        axis.set_title(title)
    axes[0].set_yticks(range(len(methods)), methods, fontsize=8)
    axes[1].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
