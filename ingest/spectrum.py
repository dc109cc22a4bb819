"""The curvature of an index after a change of its rows: updated where that is exact, else anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headwater.attribution import Gram, dual_curvature
from headwater.index import StoredIndex

Int64 = npt.NDArray[np.int64]
# Subtracting leaves the rounding of what was there before: 1e-16 of it. With less than this share
# of the largest trace since the sum was made, that is too much of what remains.
_LEAST_LEFT = 1e-6


def curvature_arrays(
    after: StoredIndex, before: StoredIndex | None = None
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `curvature/` for the searchable rows of `after`; none without a row.

    Args:
        after: the index as it will be.
        before: the same index as it was: `after` has its rows at the same positions, some of them
            deleted, and may have further ones. Its Gram matrix is then changed by those rows.

    Sums run in the order of the parts, so that the same rows give the same bytes. With fewer rows
    than dimensions the N x N form is smaller, and the rows fit in memory.
    """
    dim, count = after.manifest.dim, len(after.ok_positions)
    if not count:
        return {}
    if count < dim:
        rows = [block for _, block in after.blocks(weighted=False)]
        return dual_curvature(torch.from_numpy(np.concatenate(rows))).arrays()
    updated = _updated(after, before) if before is not None else None
    if updated is not None:
        gram, peak = updated
    else:
        gram = Gram(dim)
        _add(gram, after, after.ok_positions)
        peak = _trace(gram)
    kept = {"gram": gram.matrix.numpy(), "gram_peak": np.array(peak)}
    return kept | gram.curvature().arrays()


def _updated(after: StoredIndex, before: StoredIndex) -> tuple[Gram, float] | None:
    """The Gram matrix by the difference of two states, and the largest trace that it had since it
    was summed from rows; None where that is not exact enough, or not known.
    """
    stored = before.curvature()
    if "gram_peak" not in stored or "gram" not in stored:
        return None
    gram = Gram(after.manifest.dim)
    gram.matrix = torch.from_numpy(np.array(stored["gram"]))
    gram.rows = len(before.ok_positions)
    added = np.setdiff1d(after.ok_positions, before.ok_positions)
    peak = max(float(stored["gram_peak"]), _trace(gram) + _squares(after, added))
    if _squares(after, after.ok_positions) < _LEAST_LEFT * peak:
        return None
    _add(gram, after, added)
    removed = np.setdiff1d(before.ok_positions, after.ok_positions)
    for _, block in before.blocks(positions=removed, weighted=False):
        gram.remove(torch.from_numpy(block))
    return gram, peak


def _trace(gram: Gram) -> float:
    return float(gram.matrix.trace())


def _add(gram: Gram, index: StoredIndex, positions: Int64) -> None:
    for _, block in index.blocks(positions=positions, weighted=False):
        gram.add(torch.from_numpy(block))


def _squares(index: StoredIndex, positions: Int64) -> float:
    norms = index.norms[positions].astype(np.float64)
    return float(norms @ norms)
