"""A feature row as stored: a unit vector in half precision, and its length in single.

Raw per-sample gradients have lengths near 1e-6, which half precision cannot hold; unit vectors
always fit. The length (`row_norm`) and the method's weight (`row_weight`) are item columns.
"""

from __future__ import annotations

import math

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


def length_slack(dim: int) -> float:
    """How far from 1 half precision may take the length of a unit row of this width.

    Rounding moves each entry by at most 2^-11 of itself, or by 2^-25 where it is subnormal.
    """
    return 2.0**-11 + math.sqrt(dim) * 2.0**-25 + 1e-6


def decode_rows(units: Float16, scale: Float32) -> Float32:
    """Return the effective rows `scale * unit`: float32 [n, dim], a new array."""
    rows = units.astype(np.float32)
    rows *= scale[:, None]
    return rows
