"""Items whose gradient norm stands apart from the rest of an index: reported, never removed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# Iglewicz and Hoaglin (1993) flag 3.5 in small samples. At 5 a normal distribution has one row in
# 1.7 million beyond, so what a large corpus reports is not merely its tail.
THRESHOLD = 5.0
# The median absolute deviation of fewer rows says little about what is usual.
FEWEST_ROWS = 20
_NORMAL = 0.6745  # median absolute deviation of a standard normal variable


@dataclass(frozen=True)
class Outlier:
    """An item far from the others; it stays searchable."""

    item_id: str
    gradient_norm: float
    z: float  # robust z-score of log(gradient_norm); positive: a longer gradient than usual


def norm_outliers(items: pa.Table) -> list[Outlier]:
    """Return the 'ok' items whose log gradient norm has |z| > THRESHOLD, furthest first.

    z = 0.6745 (log n - median) / MAD: one broken row moves neither the median nor the MAD, as it
    would mean and standard deviation. Empty for fewer than FEWEST_ROWS rows, when more than half
    of the norms are equal, and for an index without the column `gradient_norm`.
    """
    if "gradient_norm" not in items.column_names:
        return []
    norms = items["gradient_norm"].to_numpy().astype(np.float64)
    ok = np.array([status == "ok" for status in items["status"].to_pylist()], np.bool_)
    positions = np.flatnonzero(ok & (norms > 0) & np.isfinite(norms))
    if len(positions) < FEWEST_ROWS:
        return []
    logs = np.log(norms[positions])
    centred = logs - np.median(logs)
    deviation = np.median(np.abs(centred))
    if deviation == 0:
        return []
    # Norms that all but agree make a trifle look far: less than a thousandth is no spread.
    z = _NORMAL * centred / max(deviation, 1e-3)
    far = np.flatnonzero(np.abs(z) > THRESHOLD)
    order = far[np.argsort(-np.abs(z[far]), kind="stable")]
    ids = items["item_id"].take(pa.array(positions[order])).to_pylist()
    return [
        Outlier(item_id, float(norms[positions[i]]), float(z[i]))
        for item_id, i in zip(ids, order.tolist(), strict=True)
    ]
