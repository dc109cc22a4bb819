"""One part on disk: items, features and previews of the same rows, checked before they are kept."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .errors import IndexStoreError
from .files import write_atomically
from .manifest import Shard, part_files
from .rows import Float16, Float32, encode_rows

REQUIRED_COLUMNS = ("item_id", "status", "error")
THUMB_COLUMNS = ["item_id", "image"]


@dataclass(frozen=True)
class EncodedRows:
    """Checked items, with the columns `row_norm` and `row_weight`, and their stored unit rows."""

    items: pa.Table
    units: Float16  # [n, dim]; zero where quarantined


def encode_items(
    name: str, items: pa.Table, rows: npt.NDArray[np.float32], dim: int
) -> EncodedRows:
    """Check items and their raw rows [n, dim] and bring them into the form that is stored.

    Args:
        name: what they belong to, for messages.
        items: one row per item: `item_id`, `status` ('ok' or 'quarantined'), `error` (the reason,
            null when ok), optionally `row_weight` (default 1), and any other columns.
        rows: raw features; ignored where the item is quarantined.
        dim: the width of the index.

    Raises:
        IndexStoreError: an 'ok' row is not finite or all zero, or a required column is wrong.
    """
    ok = _checked_items(name, items)
    rows = _checked_rows(name, items, rows, ok, dim)
    units, norms = encode_rows(rows)
    if not np.isfinite(norms).all() or (norms[ok] == 0).any():
        raise IndexStoreError(
            f"{name}: a feature row is too long or too short for single precision; "
            "quarantine the item before it is stored"
        )
    weights = np.ones(len(rows), np.float32)
    if "row_weight" in items.column_names:
        weights = items["row_weight"].to_numpy().astype(np.float32)
        items = items.drop_columns(["row_weight"])
        if not np.isfinite(weights[ok]).all():
            raise IndexStoreError(f"{name}: row_weight is missing or not finite")
        weights[~ok] = 1.0
    if "row_norm" in items.column_names:
        items = items.drop_columns(["row_norm"])
    items = items.append_column("row_norm", pa.array(norms))
    items = items.append_column("row_weight", pa.array(weights))
    return EncodedRows(items, units)


def write_part(folder: Path, name: str, encoded: EncodedRows, thumbs: pa.Table) -> Shard:
    """Write the files of a part and return its record; only a manifest makes it count.

    `thumbs` has the columns `item_id` and `image` (WebP bytes), for any of the items.
    """
    if thumbs.column_names != THUMB_COLUMNS:
        raise IndexStoreError(
            f"{name}: previews have columns {thumbs.column_names}, need {THUMB_COLUMNS}"
        )
    features, items, previews = part_files(name)
    writes: dict[str, Callable[[BinaryIO], None]] = {
        features: partial(np.save, arr=encoded.units, allow_pickle=False),
        items: partial(save_table, encoded.items),
        previews: partial(save_table, thumbs),
    }
    files = {path: write_atomically(folder / path, write) for path, write in writes.items()}
    status = encoded.items["status"].to_pylist()
    return Shard(name, len(status), status.count("quarantined"), files)


def merged_schema(name: str, earlier: pa.Schema | None, schema: pa.Schema) -> pa.Schema:
    """Return the common schema of the items so far and of `name`: readers lay them end to end.

    Raises:
        IndexStoreError: a column has two types, and not every value of one is one of the other.
    """
    schema = schema.remove_metadata()
    if earlier is None:
        return schema
    try:
        merged = pa.unify_schemas([earlier, schema], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        merged = None
    spelled = {known.lower(): known for known in earlier.names}
    for field in schema:
        if field.name not in earlier.names:
            if known := spelled.get(field.name.lower()):
                raise IndexStoreError(
                    f"{name}: its column {field.name!r} differs from {known!r} of earlier shards "
                    "only in case, which DuckDB does not tell apart; rename it"
                )
            continue
        kinds = (earlier.field(field.name).type, field.type)
        if kinds[0] == kinds[1]:
            continue
        if merged is None or not all(_widens(k, merged.field(field.name).type) for k in kinds):
            raise IndexStoreError(
                f"{name}: its items do not fit those of earlier shards (column {field.name!r} "
                f"holds {kinds[1]} here and {kinds[0]} there); store it as {kinds[0]}, "
                "or under another name"
            )
    return merged


def _widens(narrow: pa.DataType, wide: pa.DataType) -> bool:
    """Whether every value of one type is one of the other: a reader converts without looking."""
    if narrow == wide or pa.types.is_null(narrow):
        return True
    for kind in (
        *(pa.types.is_signed_integer, pa.types.is_unsigned_integer, pa.types.is_floating),
        lambda found: pa.types.is_string(found) or pa.types.is_large_string(found),
    ):
        if kind(narrow) and kind(wide):
            return True  # what both were unified to is the wider one
    parts = {field.name: field.type for field in _parts(wide)}
    return (
        narrow.id == wide.id
        and bool(parts)
        and all(
            field.name in parts and _widens(field.type, parts[field.name])
            for field in _parts(narrow)
        )
    )


def _parts(kind: pa.DataType) -> list[pa.Field]:
    """The fields of a struct, list or map."""
    return [kind.field(number) for number in range(kind.num_fields)]


def stored_size(table: pa.Table) -> int:
    """Return the bytes that a table of items or previews takes on disk."""
    file = io.BytesIO()
    save_table(table, file)
    return file.getbuffer().nbytes


def save_table(table: pa.Table, file: BinaryIO) -> None:
    """Write a table as every items and thumbs file is written."""
    # Schema metadata (pandas' for instance) may differ between equal tables: leave it out.
    # One chunk for each column: how a table was put together would show in the bytes.
    table = table.replace_schema_metadata(None).combine_chunks()
    pq.write_table(table, file, compression="zstd")


def _checked_items(name: str, items: pa.Table) -> npt.NDArray[np.bool_]:
    """Return which items are 'ok', after checking the columns every index needs."""
    missing = [column for column in REQUIRED_COLUMNS if column not in items.column_names]
    if missing:
        raise IndexStoreError(f"{name}: items have no column {', '.join(missing)}")
    if items.num_rows == 0:
        raise IndexStoreError(f"{name}: a shard needs at least one item")
    ids = items["item_id"].to_pylist()
    if not all(isinstance(item_id, str) and item_id for item_id in ids):
        raise IndexStoreError(f"{name}: an item_id is missing or no text; every item needs one")
    status = items["status"].to_pylist()
    errors = items["error"].to_pylist()
    for item_id, state, error in zip(ids, status, errors, strict=True):
        if state not in ("ok", "quarantined"):
            raise IndexStoreError(
                f"{name}: item {item_id!r} has status {state!r}, not 'ok' or 'quarantined'"
            )
        if (state == "ok") != (error is None):
            raise IndexStoreError(
                f"{name}: item {item_id!r} has status {state!r} and error {error!r}; "
                "a quarantined item states its reason, an ok item none"
            )
    return np.array([state == "ok" for state in status], dtype=np.bool_)


def _checked_rows(
    name: str,
    items: pa.Table,
    rows: npt.NDArray[np.float32],
    ok: npt.NDArray[np.bool_],
    dim: int,
) -> Float32:
    expected = (items.num_rows, dim)
    if rows.shape != expected:
        raise IndexStoreError(f"{name}: rows have shape {rows.shape}, need {expected}")
    rows = np.where(ok[:, None], rows, 0).astype(np.float32)
    finite: npt.NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
    for position in np.flatnonzero(ok & ~(finite & rows.any(axis=1))).tolist():
        problem = "not finite" if not finite[position] else "all zero"
        raise IndexStoreError(
            f"{name}: the feature row of item {items['item_id'][position].as_py()!r} is "
            f"{problem}; quarantine the item before it is stored"
        )
    return rows
