"""What a batch becomes on disk: item columns, previews, and what is quarantined for its row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .devices import BatchRows
from .errors import SourceError
from .prepare import PreparedBatch

_BEFORE_EXTRA = [
    *(pa.field(name, pa.string()) for name in ("item_id", "sha256", "phash", "uri", "caption")),
    *(pa.field(name, pa.string()) for name in ("licence", "rights_holder", "source", "opt_out")),
    *(pa.field(name, pa.int32()) for name in ("width", "height")),
]
_AFTER_EXTRA = [
    *(pa.field(name, pa.string()) for name in ("status", "error")),
    *(pa.field(name, pa.float32()) for name in ("row_weight", "gradient_norm")),
]


def joined(
    batch: PreparedBatch, found: BatchRows
) -> tuple[npt.NDArray[np.float32], list[dict[str, Any]]]:
    """Rows [items of the batch, dim] and item columns; a row of no use is quarantined with why."""
    rows = np.zeros((len(batch.columns), found.features.shape[1]), np.float32)
    columns = list(batch.columns)
    for place, position in enumerate(batch.usable):
        row = found.features[place]
        weight, norm = float(found.weights[place]), float(found.norms[place])
        if reason := _unusable(row, weight, norm):
            known: dict[str, Any] = {"status": "quarantined", "error": reason}
        else:
            rows[position] = row
            known = {"row_weight": weight, "gradient_norm": norm}
        columns[position] = columns[position] | known
    return rows, columns


def _unusable(row: npt.NDArray[np.float32], weight: float, norm: float) -> str | None:
    # A norm may overflow where the row, which is divided by it, does not.
    if not (np.isfinite(row).all() and np.isfinite([weight, norm]).all()):
        return "gradient is not finite (NaN or infinity)"
    if not row.any():
        return "gradient is zero (with cfg and dtrak-text: an item without caption)"
    return None


def items_schema(extra: pa.Schema) -> pa.Schema:
    """The columns of items, of which the user's are `extra`."""
    return pa.schema([*_BEFORE_EXTRA, *extra, *_AFTER_EXTRA])


def items_table(items: Sequence[dict[str, Any]], extra: pa.Schema) -> pa.Table:
    """The items of a shard, user columns in the types that the source gave them."""
    schema = items_schema(extra)
    arrays = []
    for field in schema:
        try:
            arrays.append(pa.array([item[field.name] for item in items], field.type))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(
                f"column {field.name!r} ({field.type}) cannot be carried along: {reason}; "
                "leave it out of the source or store it as text"
            ) from error
    return pa.table(arrays, schema=schema)


def previews_table(ids: Sequence[str], previews: Sequence[bytes | None]) -> pa.Table:
    """The previews of a shard, of the items that have one."""
    pairs = zip(ids, previews, strict=True)
    shown = [(name, preview) for name, preview in pairs if preview is not None]
    return pa.table(
        {
            "item_id": pa.array([name for name, _ in shown], pa.string()),
            "image": pa.array([image for _, image in shown], pa.binary()),
        }
    )
