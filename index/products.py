"""Inner products of stored half-precision rows with queries, by FAISS: the one kernel of scores.

FAISS widens a row inside the registers in which it multiplies it: 15 GB of rows a second and core,
where converting a block first and handing it to BLAS reaches 2. A product depends on its row and
its query alone, not on the block, its neighbours or the thread that computes it.
"""

from __future__ import annotations

from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from .rows import Float16, Float32

faiss: Any = _faiss  # its stubs lack half of what is used here
_EVERYTHING = -float(np.finfo(np.float32).max)  # below it lie minus infinity and NaN only


class Kernel:
    """Products with rows of one width; for one thread at a time."""

    def __init__(self, dim: int) -> None:
        """Make the scanner for rows [n, dim]."""
        self._quantizer = faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        self._centre = faiss.IndexFlatIP(dim)  # asked for by FAISS, used for residuals only
        self._scanner = self._quantizer.select_InvertedListScanner(
            faiss.METRIC_INNER_PRODUCT, self._centre, False, None, False
        )
        self._scanner.set_list(0, 0.0)
        self._numbers = np.empty(0, np.int64)

    def __call__(self, units: Float16, queries: Float32) -> Float32:
        """Return <row, query> for rows [n, dim] and queries [Q, dim], both contiguous: [Q, n].

        A product that single precision cannot hold is NaN.
        """
        n = len(units)
        if len(self._numbers) < n:
            self._numbers = np.arange(n, dtype=np.int64)
        codes = units.view(np.uint8)
        products: Float32 = np.empty((len(queries), n), np.float32)
        for query, target in zip(queries, products, strict=True):
            self._scanner.set_query(faiss.swig_ptr(query))
            result = faiss.RangeSearchResult(1)
            partial = faiss.RangeSearchPartialResult(result)
            self._scanner.scan_codes_range(
                n,
                faiss.swig_ptr(codes),
                faiss.swig_ptr(self._numbers),
                _EVERYTHING,
                partial.new_result(0),
            )
            partial.finalize()
            found: npt.NDArray[np.float32] = faiss.rev_swig_ptr(
                result.distances, int(faiss.rev_swig_ptr(result.lims, 2)[1])
            )
            if len(found) == n:
                target[:] = found
            else:  # what overflowed was not reported
                target.fill(np.nan)
        return products


def selector(chosen: npt.NDArray[np.bool_]) -> Any:
    """What lets a FAISS search look at the rows where `chosen` [n] is true."""
    return faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little"))
