"""Rank correlation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def spearman(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    """Rank correlation, equal values sharing their mean rank; 0 where all are equal."""
    ranks = [_ranks(values) for values in (left, right)]
    a, b = (rank - rank.mean() for rank in ranks)
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / lengths if lengths else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    means: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return means


def lds(
    scores: npt.NDArray[np.float64],
    halves: npt.NDArray[np.bool_],
    true: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Rank correlation per question, [Q], of the members' scores and what was measured.

    Args:
        scores: [N, Q].
        halves: [K, N] the members of each subset.
        true: [Q, K].
    """
    foreseen = halves.astype(np.float64) @ scores.astype(np.float64)
    return np.array([spearman(*pair) for pair in zip(foreseen.T, true, strict=True)])


def repeatability(measured: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """How well one seed's utility foresees the mean of the others': [Q] from [Q, K, seeds]."""
    seeds = measured.shape[2]
    found = []
    for of_question in measured:
        others = (of_question.sum(1, keepdims=True) - of_question) / (seeds - 1)
        found.append(np.mean([spearman(of_question[:, s], others[:, s]) for s in range(seeds)]))
    return np.array(found)
