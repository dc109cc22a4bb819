"""The curvature of an index after a change of its rows: updated where that is exact, else anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headwater.attribution import Gram, dual_curvature
from headwater.index import StoredIndex

Int64 = npt.NDArray[np.int64]
# Subtracting leaves the rounding of what was there before: 1e-16 of it. Beyond this share of it
# being gone, that is too much of what remains.
_MOST_REMOVED = 1 - 1e-6


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
    gram = _updated(after, before) if before is not None else None
    if gram is None:
        gram = Gram(dim)
        _add(gram, after, after.ok_positions)
    return {"gram": gram.matrix.numpy()} | gram.curvature().arrays()


def _updated(after: StoredIndex, before: StoredIndex) -> Gram | None:
    """The Gram matrix by the difference of two states; None where that is not exact enough."""
    stored = before.curvature().get("gram")
    if stored is None:
        return None
    removed = np.setdiff1d(before.ok_positions, after.ok_positions)
    if _squares(before, removed) > _MOST_REMOVED * _squares(before, before.ok_positions):
        return None
    gram = Gram(after.manifest.dim)
    gram.matrix = torch.from_numpy(np.array(stored))
    gram.rows = len(before.ok_positions)
    _add(gram, after, np.setdiff1d(after.ok_positions, before.ok_positions))
    for _, block in before.blocks(positions=removed, weighted=False):
        gram.remove(torch.from_numpy(block))
    return gram


def _add(gram: Gram, index: StoredIndex, positions: Int64) -> None:
    for _, block in index.blocks(positions=positions, weighted=False):
        gram.add(torch.from_numpy(block))


def _squares(index: StoredIndex, positions: Int64) -> float:
    norms = index.items()["row_norm"].to_numpy()[positions].astype(np.float64)
    return float(norms @ norms)
