"""A feature row as stored: a unit vector in half precision, and its length in single.

Raw per-sample gradients have lengths near 1e-6, which half precision cannot hold; unit vectors
always fit. The length (`row_norm`) and the method's weight (`row_weight`) are item columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float16 = npt.NDArray[np.float16]
Float32 = npt.NDArray[np.float32]


def encode_rows(rows: npt.NDArray[np.floating]) -> tuple[Float16, Float32]:
    """Split rows [n, dim] into unit rows (float16 [n, dim]) and lengths (float32 [n]).

    An all-zero row stays all zero with length 0; a length beyond single precision is infinite.
    Rows must be finite.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    divisors = np.where(lengths > 0, lengths, 1.0)
    units = (rows / divisors[:, None]).astype(np.float16)
    with np.errstate(over="ignore"):  # too long for single precision: infinite, for the caller
        return units, lengths.astype(np.float32)


def decode_rows(units: Float16, scale: Float32) -> Float32:
    """Return the effective rows `scale * unit`: float32 [n, dim], a new array."""
    rows = units.astype(np.float32)
    rows *= scale[:, None]
    return rows
