"""What a table of rankings says: means per method and concept, with intervals, by choice of lambda.

Four choices of lambda, of which the first alone is a claim: *label-free*, as the method chooses
it unasked; *disjoint*, one lambda that does best on the questions of the other half of the
pictures; *best*, one lambda that does best on these questions; *oracle*, the best lambda of each
question, which is what the published code reports.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headwater.benchmarks.errors import BenchmarkError

DRAWS = 2000


@dataclass(frozen=True)
class Cell:
    """A method's mean over the questions of one concept."""

    method: str
    concept: str
    label_free: float
    low: float  # 95 % bootstrap interval of label_free
    high: float
    disjoint: float | None  # None where there is no lambda
    best: float | None
    oracle: float | None
    damping: float | None  # median of the label-free ones over replicates
    best_damping: float | None
    effective: float | None  # median likewise; None, too, where no row tells it


def summarise(table: pa.Table, metrics: Mapping[str, str]) -> list[Cell]:
    """A cell for each method and concept, in the order of the table.

    Args:
        table: as `measure` gives it, of one study or of several replicates together.
        metrics: concept -> the column that measures it.
    """
    rows = table.to_pylist()
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        disjoint = _disjoint(mine, metrics)
        best_damping = _best(mine, metrics)
        for concept, metric in metrics.items():
            of = [row for row in mine if row["concept"] == concept]
            if not of:
                continue
            free = {_question(row): row for row in of if row["label_free"]}
            if len(free) < sum(row["label_free"] for row in of):
                raise BenchmarkError(
                    f"{method}, {concept}: two studies have one replicate and number their "
                    "questions alike; give each its own replicate"
                )
            values = {key: row[metric] for key, row in free.items()}
            low, high = interval(list(free.values()), metric)
            swept = [row for row in of if row["damping"] is not None]
            # Records of before have no such column.
            shares = (row.get("effective") for row in free.values())
            told = [share for share in shares if share is not None]
            grid: dict[tuple[int, int], dict[float, float]] = {}
            for row in swept:
                grid.setdefault(_question(row), {})[row["damping"]] = row[metric]
            cells.append(
                Cell(
                    method,
                    concept,
                    _mean(values.values()),
                    low,
                    high,
                    _mean(grid[k][disjoint[k]] for k in grid) if grid else None,
                    _mean(grid[k][best_damping] for k in grid)
                    if grid and best_damping is not None
                    else None,
                    _mean(max(v.values()) for v in grid.values()) if grid else None,
                    float(np.median([r["damping"] for r in free.values()])) if grid else None,
                    best_damping if grid else None,
                    float(np.median(told)) if told else None,
                )
            )
    return cells


def interval(
    rows: Sequence[Mapping[str, Any]], metric: str, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean, by `resampled`; values that are nan do not count."""
    known = [row for row in rows if not np.isnan(float(row[metric]))]
    if not known:
        return np.nan, np.nan
    cells = [(int(row["replicate"]), str(row["picture"])) for row in known]
    means = resampled(cells, [[float(row[metric])] for row in known], draws)[:, 0]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def resampled(
    cells: Sequence[tuple[Hashable, Hashable]],
    values: Sequence[Sequence[float]],
    draws: int = DRAWS,
) -> npt.NDArray[np.float64]:
    """Means of values [n, k], [draws, k], with replicates and pictures drawn again, independently.

    `cells` names the replicate and the picture of each value; values of one cell go together.
    """
    # A picture of one name is one thing to all replicates: they share its prompt and its noise,
    # and a retrained or unseen picture altogether. So it is drawn once for all of them; drawn
    # anew in each, what a picture is like would be averaged out as if it were a model's chance.
    # Where replicates share little of it, intervals are too wide rather than too narrow.
    columns = zip(*cells, strict=True)
    replicates, pictures = ({name: i for i, name in enumerate(dict.fromkeys(c))} for c in columns)
    sums = np.zeros((1 + len(values[0]), len(replicates), len(pictures)))
    for (replicate, picture), row in zip(cells, values, strict=True):
        sums[:, replicates[replicate], pictures[picture]] += (1.0, *row)
    generator = np.random.default_rng(0)
    of_picture, of_replicate = (
        generator.multinomial(count, np.full(count, 1 / count), size=draws)
        for count in (len(pictures), len(replicates))
    )
    counts, *totals = ((of_replicate @ each * of_picture).sum(1) for each in sums)
    drawn = counts > 0  # of pictures that not all replicates have, none may be drawn
    means: npt.NDArray[np.float64] = np.stack(totals, 1)[drawn] / counts[drawn, None]
    return means


def curves(
    table: pa.Table, metrics: Mapping[str, str]
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Mean of each method and concept at every lambda of the grid: (damping, mean) ascending."""
    sums: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in table.to_pylist():
        if row["damping"] is None or row["concept"] not in metrics:
            continue
        at = sums.setdefault((row["method"], row["concept"]), {})
        at.setdefault(row["damping"], []).append(row[metrics[row["concept"]]])
    found = {}
    for key, at in sums.items():
        most = max(len(values) for values in at.values())
        # Label-free lambdas of single replicates are not on the grid that all of them have.
        found[key] = [(d, _mean(v)) for d, v in sorted(at.items()) if len(v) == most]
    return found


def _question(row: Mapping[str, Any]) -> tuple[int, int]:
    return int(row["replicate"]), int(row["question"])


def _mean(values: Iterable[float]) -> float:
    listed = np.array(list(values), float)
    listed = listed[~np.isnan(listed)]
    return float(listed.mean()) if len(listed) else np.nan


def _best(rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]) -> float | None:
    """The lambda of the common grid with the best mean over concepts."""
    by_damping: dict[float, dict[str, list[float]]] = {}
    for row in rows:
        if row["damping"] is not None and row["concept"] in metrics:
            value = row[metrics[str(row["concept"])]]
            of = by_damping.setdefault(float(row["damping"]), {})
            of.setdefault(str(row["concept"]), []).append(float(value))
    if not by_damping:
        return None
    most = max(sum(map(len, of.values())) for of in by_damping.values())
    common = {d: of for d, of in by_damping.items() if sum(map(len, of.values())) == most}
    return max(common, key=lambda d: _mean(_mean(values) for values in common[d].values()))


def _disjoint(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, str]
) -> dict[tuple[int, int], float]:
    """For each question the lambda that does best on the other half of the pictures."""
    swept = [row for row in rows if row["damping"] is not None]
    pictures = sorted({str(row["picture"]) for row in swept})
    half = {picture: place % 2 for place, picture in enumerate(pictures)}
    best = [
        _best([row for row in swept if half[str(row["picture"])] != side], metrics)
        for side in (0, 1)
    ]
    if len(pictures) < 2:  # nothing is disjoint
        best = [_best(swept, metrics)] * 2
    return {
        _question(row): value
        for row in swept
        if (value := best[half[str(row["picture"])]]) is not None
    }
