"""The record of a benchmark: every ranking, the table and the pictures.

`write` leaves beside the `config.json` of a run NAME.parquet, a line for each method, question and
lambda; NAME.md; and NAME-lambda.png and NAME-cost.png.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from headwater.benchmarks.runs import Run
from headwater.benchmarks.study import Study
from headwater.benchmarks.summary import Cell, curves, summarise
from headwater.queries.gradients import to_images

CELL, GAP, LABEL = 96, 6, 30
_READING = """
Columns: *label-free* is the lambda that a query has unasked, with a 95 % bootstrap interval (over
training seeds where there are several, and over pictures, which seeds share); *disjoint* the one
lambda that does best on the other half of the pictures; *best* the one that does best on these;
*oracle* the best of each question, as the published code reports; *effective* the effective
dimension trace K (K + lambda)^-1 at the label-free lambda, as a share of min(rows, width). lambda
is in units of the rows' mean squared length. Label-free are a quarter of the root of all images, at
most 20, for a contrast, 10 for a slider, and for a whole picture the half decade whose effective
dimension is nearest to a quarter, the same for all methods and benchmarks; they were settled by
looking at records of `emoji`, `faces` and `lds` (docs/damping.md), so the blind column is the
disjoint one.
"""


def write(
    run: Run,
    table: pa.Table,
    metrics: Mapping[str, str],
    *,
    intro: str,
    chance: Mapping[str, float] | None = None,
) -> list[Cell]:
    """Write the record of one run, all but its `config.json`, and return its cells.

    Args:
        run: as `begin` gave it.
        table: by `measure.SCHEMA`, of all replicates.
        metrics: concept -> column that measures it.
        intro: what was asked of what, in Markdown.
        chance: concept -> what a ranking at random is worth.
    """
    run.out.mkdir(parents=True, exist_ok=True)
    name = run.config["benchmark"]
    pq.write_table(table, run.out / f"{name}.parquet")
    shown = [f"![lambda]({name}-lambda.png)", "", f"![cost]({name}-cost.png)"]
    cells = _page(run, table, metrics, intro, chance, shown)
    plot_lambda(table, cells, metrics, run.out / f"{name}-lambda.png")
    plot_cost(table, cells, run.out / f"{name}-cost.png")
    return cells


def follow(
    run: Run,
    metrics: Mapping[str, str],
    *,
    intro: str,
    chance: Mapping[str, float] | None = None,
) -> None:
    """Have the table of what is there written whenever a method is measured, until `write`."""
    unfinished = f"**The run has not ended: these are the methods so far.**\n\n{intro.strip()}"
    run.parts.watch(lambda table: _page(run, table, metrics, unfinished, chance, ()))


def _page(
    run: Run,
    table: pa.Table,
    metrics: Mapping[str, str],
    intro: str,
    chance: Mapping[str, float] | None,
    shown: Sequence[str],
) -> list[Cell]:
    name, cells = run.config["benchmark"], summarise(table, metrics)
    lines = [f"# {name}", "", intro.strip(), "", told(run.config), ""]
    lines += markdown(cells, metrics, chance or {})
    (run.out / f"{name}.md").write_text("\n".join([*lines, _READING, *shown]) + "\n")
    return cells


def told(config: Mapping[str, Any]) -> str:
    """One sentence of `config.json`: command, settings, machine and date."""
    settings = ", ".join(f"{key} {value}" for key, value in config["settings"].items())
    return (
        f"`{config['command']}` ({settings}) on {config['machine']}, torch {config['torch']}, "
        f"{config['date']}."
    )


def markdown(
    cells: Sequence[Cell], metrics: Mapping[str, str], chance: Mapping[str, float]
) -> list[str]:
    """A table for each concept, best label-free mean first, under what chance is worth."""
    lines = []
    for concept, metric in metrics.items():
        of = sorted((c for c in cells if c.concept == concept), key=lambda c: -c.label_free)
        lines += [
            f"## {concept}: {metric.replace('_at_', '@').replace('_', ' ')}",
            "",
            *([f"A ranking at random: {chance[concept]:.3f}.", ""] if concept in chance else ()),
            "| method | label-free | 95 % | disjoint | best | oracle | lambda, label-free | best "
            "| effective |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for cell in of:
            numbers = [_shown(cell.disjoint), _shown(cell.best), _shown(cell.oracle)]
            numbers += [_shown(cell.damping, "g"), _shown(cell.best_damping, "g")]
            numbers += [_shown(cell.effective)]
            lines.append(
                f"| {cell.method} | {cell.label_free:.3f} | {cell.low:.3f} to {cell.high:.3f} | "
                + " | ".join(numbers)
                + " |"
            )
        lines.append("")
    return lines


def _shown(value: float | None, form: str = ".3f") -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if form == "g" else format(value, form)


def plot_lambda(
    table: pa.Table, cells: Sequence[Cell], metrics: Mapping[str, str], path: Path
) -> None:
    """The mean of each method against lambda; a dot marks the label-free one."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(metrics), 4.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(metrics), sharey=True))
    lines = curves(table, metrics)
    for axis in axes:
        axis.set_prop_cycle(color=[colormaps["tab20"](i) for i in range(20)])  # usual are ten
    for axis, (concept, metric) in zip(axes, metrics.items(), strict=True):
        for cell in (c for c in cells if c.concept == concept):
            if (points := lines.get((cell.method, concept))) is None:
                axis.axhline(cell.label_free, linestyle=":", linewidth=1, color="grey")
                axis.annotate(cell.method, (0.01, cell.label_free), fontsize=7, color="grey",
                              xycoords=("axes fraction", "data"))  # fmt: skip
                continue
            (drawn,) = axis.plot(*zip(*points, strict=True), label=cell.method)
            axis.plot([cell.damping], [cell.label_free], "o", color=drawn.get_color())
        axis.set(xscale="log", xlabel="lambda / mean squared length of a row", title=concept)
        axis.set_ylabel(metric.replace("_at_", "@").replace("_", " "))
    axes[-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)


def plot_cost(table: pa.Table, cells: Sequence[Cell], path: Path) -> None:
    """The mean over concepts, label-free, against the seconds that the corpus's rows took."""
    from matplotlib.figure import Figure

    seconds: dict[str, list[float]] = {}
    for row in table.select(["method", "ingest_seconds"]).to_pylist():
        seconds.setdefault(row["method"], []).append(row["ingest_seconds"] or 0.0)
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for method in dict.fromkeys(cell.method for cell in cells):
        mean = float(np.mean([c.label_free for c in cells if c.method == method]))
        cost = float(np.mean(seconds[method]))
        axis.plot([cost], [mean], "o")
        axis.annotate(method, (cost, mean), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axis.set(xscale="symlog", xlabel="seconds for the corpus's rows", ylabel="mean over concepts")
    figure.savefig(path, dpi=110)


Line = tuple[str, Image.Image, Sequence[tuple[Image.Image, bool]]]  # of a `grid`


def spread(table: pa.Table, method: str, count: int) -> list[dict[str, Any]]:
    """At most `count` of a method's label-free rankings, evenly spread over the questions."""
    found = [r for r in table.to_pylist() if r["method"] == method and r["label_free"]]
    step = max(1, (len(found) - 1) // max(1, count)) | 1  # odd: two concepts take turns
    return found[::step][:count]


def top_ten(
    study: Study, rows: Iterable[Mapping[str, Any]], image: Callable[[int], Image.Image]
) -> list[Line]:
    """For each ranking the first picture that was asked about, and what was found.

    `image` shows the corpus's image at a position.
    """
    place = {key: i for i, key in enumerate(study.corpus.keys)}
    lines: list[Line] = []
    for row in rows:
        question = study.questions[row["question"]]
        first = study.keys.index(f"{question.picture}#0")
        (asked,) = to_images(study.model, study.pictures[first : first + 1])
        hits = [(image(place[key]), bool(question.truth[place[key]])) for key in row["top"]]
        title = f"{row['method']}: {question.concept} of “{question.prompt}”"
        lines.append((f"{title} (against “{question.contrast}”)", asked, hits))
    return lines


def grid(rows: Sequence[Line], path: Path) -> None:
    """A line for each question: a title, its picture, then its hits, carriers framed green.

    No picture is written of no rows.
    """
    if not rows:
        return
    most = max(len(hits) for _, _, hits in rows)
    page = Image.new(
        "RGB", ((most + 1) * (CELL + GAP) + 4 * GAP, len(rows) * (CELL + LABEL + GAP)), "white"
    )
    draw = ImageDraw.Draw(page)
    for number, (title, picture, hits) in enumerate(rows):
        top = number * (CELL + LABEL + GAP)
        draw.text((GAP, top + 8), title, fill="black")
        cells = [(picture, "black"), *((hit, "green" if right else "red") for hit, right in hits)]
        for place, (shown, colour) in enumerate(cells):
            left = GAP + place * (CELL + GAP) + (2 * GAP if place else 0)
            sized = shown.convert("RGB").resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(sized, (left, top + LABEL))
            box = (left - 2, top + LABEL - 2, left + CELL + 1, top + LABEL + CELL + 1)
            draw.rectangle(box, outline=colour, width=3)
    page.save(path)
