"""Which score a search ranks by, reduced to score_i = scale_i <unit row i, query>.

K = Phi^T Phi is the curvature of the rows phi_i = norm_i unit_i, K_lambda = K + lambda I, w_i the
row weight of the method. Eight names, one scale per row and one vector per query:

similarity  preconditioning  score                                      scale_i        query
ip          none             w <q, phi>                                 w norm         q
ip          query            w <K_lambda^-1 q, phi>                     w norm         K_lambda^-1 q
ip          both             w <K_lambda^-1/2 q, K_lambda^-1/2 phi>     w norm         K_lambda^-1 q
cosine      none             w cos(q, phi)                              w              q, length 1
cosine      query            w cos(K_lambda^-1 q, phi)                  w              K_lambda^-1 q, length 1
cosine      both             w cos(K_lambda^-1/2 q, K_lambda^-1/2 phi)  w / |unit|_K   K_lambda^-1 q / |q|_K
relative    query            w <K_lambda^-1 q, phi> / |K_lambda^-1 phi| w / |unit|_KK  K_lambda^-1 q
standard    query            w <K_lambda^-1 q, phi> / deviation(phi)    w / |unit|_S   K_lambda^-1 q

with |x|_K = sqrt(x^T K_lambda^-1 x), |x|_KK = |K_lambda^-1 x| and |x|_S = deviation(x) below;
elsewhere the length of a row is its norm as it was before rounding to half precision.

`both` multiplies either side by the symmetric inverse root (TrackStar, Chang et al. 2024, with K in
the place of its second-moment matrix), so that its inner product is that of `query`: K^-1/2 is
symmetric and <K^-1/2 q, K^-1/2 phi> = <K^-1 q, phi>. Its cosine is not: it takes out the length of
a row as the curvature sees it.

`relative` is Relative-IF (Barshan et al. 2020), the influence for a step in weights of unit length;
Renorm-IF (Hammoudeh and Lowd 2022), <K_lambda^-1 q, phi> / |phi|, is the cosine of `query` up to
one factor per query.

`standard` counts a score in standard deviations of the row's own scores. Over queries of mean zero
whose second moment is that of the rows, K / rows, <K_lambda^-1 q, phi> has the standard deviation
deviation(phi) = sqrt(phi^T K_lambda^-1 K K_lambda^-1 phi / rows). A row that scores high for any
question of the corpus's kind (a hub) gains nothing from it. Queries without a preferred direction
would give `relative`, up to one factor, and queries of second moment K_lambda the cosine of `both`.

lambda is `damping` times the mean squared length of a row, trace(K) / rows.
"""  # noqa: E501

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from . import derived
from .errors import IndexStoreError
from .reader import StoredIndex
from .rows import Float32

Float64 = npt.NDArray[np.float64]
_log = logging.getLogger(__name__)
SIMILARITIES = ("ip", "cosine", "relative", "standard")
PRECONDITIONING = ("none", "query", "both")
_DIVIDED = ("relative", "standard")  # a preconditioned score, by the length of the row
# The square of such a length is the sum of a row's squared components along the eigenvectors, each
# times this factor of its eigenvalue s, of lambda and of the number of rows.
_FACTORS: dict[str, Callable[[Float64, float, int], Float64]] = {
    "cosine": lambda s, lam, rows: 1 / (s + lam),  # |x|_K
    "relative": lambda s, lam, rows: 1 / (s + lam) ** 2,  # |x|_KK
    "standard": lambda s, lam, rows: s / (s + lam) ** 2 / rows,  # |x|_S
}
_STORED_AS = {"cosine": "1", "relative": "2", "standard": "standard"}  # in the names of files
_ROUNDING = 1e-12  # of a row's squared length: less of it in the eigenvectors is rounding
_BLOCK_ROWS = 2048
_TOLD_FROM = 100_000  # rows: their lengths take seconds, once


@dataclass(frozen=True)
class Metric:
    """What a search ranks by; the default is the inner product of rows and queries as they are."""

    similarity: str = "ip"
    preconditioning: str = "none"
    damping: float = 10.0  # lambda / mean squared length of a row; unused without preconditioning

    def __post_init__(self) -> None:
        """Refuse a name that is none and a damping that has no inverse."""
        for value, names, what in (
            (self.similarity, SIMILARITIES, "similarity"),
            (self.preconditioning, PRECONDITIONING, "preconditioning"),
        ):
            if value not in names:
                raise IndexStoreError(f"{what} {value!r} is unknown; choose {', '.join(names)}")
        if self.similarity in _DIVIDED and self.preconditioning != "query":
            raise IndexStoreError(
                f"similarity {self.similarity!r} divides a preconditioned score, and "
                f"preconditioning is {self.preconditioning!r}; "
                "choose preconditioning 'query', or similarity 'cosine'"
            )
        if not 0 < self.damping < np.inf:
            raise IndexStoreError(f"damping is {self.damping}; it must be positive and finite")


def prepare(
    index: StoredIndex, queries: npt.NDArray[np.floating], metric: Metric
) -> tuple[Float64, Float32]:
    """Return the vectors [Q, dim] and the scale of every row [rows] that give `metric`'s scores.

    Raises IndexStoreError for a query that is all zero under a cosine, and for preconditioning an
    index that was written without its curvature.
    """
    vectors = np.asarray(queries, np.float64)
    solved = vectors
    if metric.preconditioning != "none":
        solved = Curvature.of(index).solve(vectors, metric.damping)
    if metric.similarity == "cosine":
        other = vectors if metric.preconditioning == "both" else solved
        lengths = np.sqrt(np.einsum("qd,qd->q", other, solved))
        if not (lengths > 0).all():
            raise IndexStoreError("a query is all zero, so it has no cosine; ask something else")
        solved = solved / lengths[:, None]
    return solved, row_scale(index, metric)


def row_scale(index: StoredIndex, metric: Metric) -> Float32:
    """Return scale_i for every position (float32 [rows]); 0 where a row is all zero."""
    if metric.similarity == "ip":
        return index.norms * index.weights
    if metric.similarity == "cosine" and metric.preconditioning != "both":
        return index.weights
    lengths = _curved_lengths(index, metric)
    safe = np.where(lengths > 0, lengths, np.inf)
    return (index.weights / safe).astype(np.float32)


@dataclass(frozen=True)
class Curvature:
    """Eigenpairs of K as the index stores them."""

    eigenvalues: Float64  # [r] descending
    eigenvectors: Float64  # [dim, r]
    rows: int

    @classmethod
    def of(cls, index: StoredIndex) -> Curvature:
        """Read them; IndexStoreError when the index has none."""
        arrays = index.curvature()
        if not {"eigenvalues", "eigenvectors", "rows"} <= arrays.keys():
            raise IndexStoreError(
                f"{index.folder} holds no curvature to precondition with; ingest again, "
                "or ask without preconditioning"
            )
        values, vectors = (np.asarray(arrays[n]) for n in ("eigenvalues", "eigenvectors"))
        return cls(values, vectors, int(arrays["rows"]))

    def damped(self, damping: float) -> tuple[float, Float64]:
        """Return lambda, and s + lambda for every eigenvalue s."""
        lam = damping * float(self.eigenvalues.sum()) / self.rows
        return lam, self.eigenvalues + lam

    def solve(self, vectors: Float64, damping: float) -> Float64:
        """Return K_lambda^-1 x for vectors x [Q, dim], outside of the eigenvectors x / lambda."""
        lam, damped = self.damped(damping)
        shrink = self.eigenvalues / damped
        solved: Float64 = (
            vectors - ((vectors @ self.eigenvectors) * shrink) @ self.eigenvectors.T
        ) / lam
        return solved

    def lengths(self, units: npt.NDArray[np.float16], damping: float, similarity: str) -> Float64:
        """Return the lengths by which a similarity divides: of rows x [n, dim], float64 [n].

        |x|_K for `cosine`, |x|_KK for `relative`, |x|_S for `standard`, which is 0 for a row
        outside of the eigenvectors: its scores for such queries are all 0.
        """
        rows = units.astype(np.float64)
        along = rows @ self.eigenvectors  # [n, r]
        np.square(along, out=along)
        inside, squares = along.sum(axis=1), np.einsum("nd,nd->n", rows, rows)
        along[inside <= _ROUNDING * squares] = 0
        # Of what lies outside of the eigenvectors the eigenvalue is 0.
        values = np.append(self.eigenvalues, 0.0)
        outside = np.maximum(squares - inside, 0)
        lam = self.damped(damping)[0]
        factors = _FACTORS[similarity](values, lam, self.rows)
        lengths: Float64 = np.sqrt(along @ factors[:-1] + outside * factors[-1])
        return lengths


def _curved_lengths(index: StoredIndex, metric: Metric) -> Float64:
    """`Curvature.lengths` of all unit rows, kept beside the accelerators, as each costs dim^2."""
    damping, kind = metric.damping, _STORED_AS[metric.similarity]
    key = hashlib.sha256(f"curved lengths {kind} {damping!r}".encode())
    for name, digest in sorted(index.manifest.files.items()):
        key.update(f"{name} {digest}\n".encode())
    for shard in index.manifest.shards:
        key.update(shard.files[f"features/{shard.name}.npy"].encode())
    folder, known = index.folder / derived.FOLDER / index.caches, f"lengths-{kind}-{damping!r}"
    path = folder / f"{known}-{key.hexdigest()[:16]}.npy"
    try:
        if derived.whole(index.folder, path):
            stored: Float64 = np.load(path, allow_pickle=False)
            if stored.shape == (index.manifest.rows,) and stored.dtype == np.float64:
                return stored
            derived.tell_damaged(path, f"it holds {stored.dtype} {stored.shape}")
    except (OSError, ValueError) as error:
        _log.warning("lengths of rows are computed again: %s", error)
    curvature = Curvature.of(index)
    if index.manifest.rows >= _TOLD_FROM:
        _log.warning("%s: computing the lengths of all rows that %r divides by, once", index.folder,
                     metric.similarity)  # fmt: skip
    everything = np.arange(index.manifest.rows, dtype=np.int64)
    pieces = [
        curvature.lengths(units, damping, metric.similarity)
        for _, units in index.unit_blocks(everything, _BLOCK_ROWS)
    ]
    lengths = np.concatenate(pieces)
    try:
        derived.keep(index.folder, path, partial(np.save, arr=lengths, allow_pickle=False))
        former = (index.folder / derived.FOLDER).glob("lengths-*.npy")  # no code reads these now
        for other in (*folder.glob(f"{known}-*.npy"), *former):
            if other != path:  # of the rows as they were
                derived.remove(index.folder, other)
    except OSError as error:
        _log.warning("%s could not be kept and is made again next time: %s", path, error)
    return lengths
