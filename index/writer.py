"""A new index, shard by shard: items, features, previews, curvature, the manifest last."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from . import ledger
from .errors import IndexStoreError
from .files import write_atomically
from .manifest import FILE_NAME, Manifest, Shard, write_manifest
from .rows import Float32, decode_rows, encode_rows

REQUIRED_COLUMNS = ("item_id", "status", "error")
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_]+")


class IndexWriter:
    """Writes one index from the start to the end; made by `IndexWriter.create`.

    >>> writer = IndexWriter.create("idx", feature_space_id="...", recipe={...}, dim=4096)
    >>> effective = writer.add_shard(items, rows, thumbs)   # as often as there are batches
    >>> writer.write_curvature({"gram": gram})
    >>> writer.finish()
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Use `IndexWriter.create`, which checks the folder."""
        self._folder = folder
        self._manifest = manifest
        self._schema: pa.Schema | None = None
        self._item_ids: set[str] = set()

    @property
    def manifest(self) -> Manifest:
        """The manifest as last written."""
        return self._manifest

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        feature_space_id: str,
        recipe: Mapping[str, Any],
        dim: int,
    ) -> IndexWriter:
        """Start an index in `folder`, which must not exist yet or be empty.

        `recipe` must be JSON; `dim` is the length of a feature row. Until `finish`, the manifest
        says `complete: false` and readers refuse the index.
        """
        folder = Path(folder)
        _check_new_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(dict(recipe), allow_nan=False))
        manifest = Manifest(feature_space_id=feature_space_id, recipe=plain, dim=dim)
        write_manifest(folder, manifest)
        return cls(folder, manifest)

    def add_shard(
        self, items: pa.Table, rows: npt.NDArray[np.float32], thumbs: pa.Table
    ) -> Float32:
        """Commit one shard and return its rows as they will be read back.

        items   one row per item: `item_id` (unique in the index), `status` ('ok' or
                'quarantined'), `error` (the reason, null when ok), optionally `row_weight`
                (default 1), and any other columns; `row_norm` is computed here
        rows    float32 [n, dim] raw features; ignored where the item is quarantined
        thumbs  `item_id` and `image` (WebP bytes), for any of the items

        Returns float32 [n, dim] = row_norm * stored unit row, zero where quarantined and without
        `row_weight`: what the curvature must be accumulated from. Raises IndexStoreError when an
        'ok' row is not finite or all zero; quarantine such an item first.
        """
        name = f"part-{len(self._manifest.shards):05d}"
        ok = self._check_items(name, items)
        rows = self._check_rows(name, items, rows, ok)
        if thumbs.column_names != ["item_id", "image"]:
            raise IndexStoreError(
                f"{name}: previews have columns {thumbs.column_names}, need ['item_id', 'image']"
            )
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
        schema = self._merged_schema(name, items.schema)

        # Features before items before previews; the manifest, which makes them count, at the end.
        writes: dict[str, Callable[[BinaryIO], None]] = {
            f"features/{name}.npy": partial(np.save, arr=units, allow_pickle=False),
            f"items/{name}.parquet": partial(_save_table, items),
            f"thumbs/{name}.parquet": partial(_save_table, thumbs),
        }
        files = {
            path: write_atomically(self._folder / path, write) for path, write in writes.items()
        }
        shard = Shard(name, items.num_rows, int((~ok).sum()), files)
        self._commit(
            replace(
                self._manifest,
                shards=(*self._manifest.shards, shard),
                rows=self._manifest.rows + shard.items,
                quarantined=self._manifest.quarantined + shard.quarantined,
            )
        )
        self._schema = schema
        self._item_ids.update(items["item_id"].to_pylist())
        return decode_rows(units, norms)

    def write_curvature(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write each array to `curvature/NAME.npy`; a name written before is replaced."""
        files = dict(self._manifest.files)
        for name, array in arrays.items():
            if not _ARRAY_NAME.fullmatch(name):
                raise IndexStoreError(f"curvature array {name!r}: use letters, digits and _ only")
            path = f"curvature/{name}.npy"
            files[path] = write_atomically(
                self._folder / path, partial(np.save, arr=array, allow_pickle=False)
            )
        self._commit(replace(self._manifest, files=files))

    def finish(self, details: Mapping[str, Any] | None = None) -> None:
        """Mark the index complete: from now on it can be opened for reading.

        `details` (JSON) is noted in the ledger beside the counts: how the ingest was run, which
        says nothing about what the rows are and so stands in no other file.
        """
        self._commit(replace(self._manifest, complete=True))
        ledger.append(
            self._folder,
            "ingest",
            {
                **(details or {}),
                "feature_space_id": self._manifest.feature_space_id,
                "rows": self._manifest.rows,
                "quarantined": self._manifest.quarantined,
            },
        )

    def _commit(self, manifest: Manifest) -> None:
        write_manifest(self._folder, manifest)
        self._manifest = manifest

    def _check_items(self, name: str, items: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which items are 'ok', after checking the columns every index needs."""
        missing = [column for column in REQUIRED_COLUMNS if column not in items.column_names]
        if missing:
            raise IndexStoreError(f"{name}: items have no column {', '.join(missing)}")
        if items.num_rows == 0:
            raise IndexStoreError(f"{name}: a shard needs at least one item")
        ids = items["item_id"].to_pylist()
        if not all(isinstance(item_id, str) and item_id for item_id in ids):
            raise IndexStoreError(f"{name}: an item_id is missing or no text; every item needs one")
        seen = set(self._item_ids)
        for item_id in ids:
            if item_id in seen:
                raise IndexStoreError(
                    f"{name}: item_id {item_id!r} occurs twice; ids must be unique in an index"
                )
            seen.add(item_id)
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

    def _check_rows(
        self,
        name: str,
        items: pa.Table,
        rows: npt.NDArray[np.float32],
        ok: npt.NDArray[np.bool_],
    ) -> Float32:
        expected = (items.num_rows, self._manifest.dim)
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

    def _merged_schema(self, name: str, schema: pa.Schema) -> pa.Schema:
        """Return the common schema of the shards so far: readers lay them end to end."""
        if self._schema is None:
            return schema
        try:
            return pa.unify_schemas([self._schema, schema], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            reason = str(error).splitlines()[0]
            raise IndexStoreError(
                f"{name}: its items do not fit those of earlier shards ({reason}); "
                "give each column one type throughout the source"
            ) from error


def _check_new_folder(folder: Path) -> None:
    """Raise IndexStoreError unless an index can be started in `folder`: absent or empty."""
    if (folder / FILE_NAME).exists():
        raise IndexStoreError(
            f"{folder} already holds an index; choose another --out or delete that folder first"
        )
    if folder.exists() and not folder.is_dir():
        raise IndexStoreError(f"{folder} is a file, not a folder; choose another --out")
    if folder.exists() and any(folder.iterdir()):
        raise IndexStoreError(
            f"{folder} exists, is not empty and is no index; choose a new or empty folder as --out"
        )


def stored_size(table: pa.Table) -> int:
    """Return the bytes that a table of items or previews takes on disk."""
    file = io.BytesIO()
    _save_table(table, file)
    return file.getbuffer().nbytes


def _save_table(table: pa.Table, file: BinaryIO) -> None:
    # Schema metadata (pandas' for instance) may differ between equal tables: leave it out.
    pq.write_table(table.replace_schema_metadata(None), file, compression="zstd")
