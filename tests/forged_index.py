"""An index of two commits, how its files are forged, and what `verify` names of it."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headwater.index import (
    IndexWriter,
    StoredIndex,
    Verification,
    ledger,
    read_manifest,
    write_manifest,
)

DIM = 24
PARTS = ((0, 5), (5, 9), (9, 20))


def write_index(folder: Path) -> Path:
    """Two commits, the second with tombstones; then two queries in the ledger."""
    rng = np.random.default_rng(0)
    for first, parts in ((True, PARTS[:2]), (False, PARTS[2:])):
        writer = (
            IndexWriter.create(folder, feature_space_id="x", recipe={"a": 1}, dim=DIM)
            if first
            else IndexWriter.open(folder)
        )
        with writer:
            for start, stop in parts:
                scale = 10.0 ** rng.uniform(-9, 3, (stop - start, 1))
                rows = (rng.standard_t(2, (stop - start, DIM)) * scale).astype(np.float32)
                writer.add_shard(items(start, stop), rows, thumbs(start, stop))
            writer.write_curvature({"gram": np.eye(DIM), "trace": np.array(3.5)})
            if not first:
                writer.write_tombstones(np.array([0, 7, 19]))
            writer.finish()
    for prompt in ("a cat", "un café"):
        StoredIndex.open(folder).append_ledger("query", {"prompt": prompt})
    return folder


def items(start: int, stop: int) -> pa.Table:
    bad = [n % 6 == 1 for n in range(start, stop)]
    return pa.table(
        {
            "item_id": [f"id{n}" for n in range(start, stop)],
            "caption": [f"caption {n}" for n in range(start, stop)],
            "status": ["quarantined" if b else "ok" for b in bad],
            "error": pa.array(["broken" if b else None for b in bad], pa.string()),
        }
    )


def thumbs(start: int, stop: int) -> pa.Table:
    return pa.table(
        {"item_id": [f"id{n}" for n in range(start, stop, 2)],
         "image": [bytes([n]) * 9 for n in range(start, stop, 2)]}
    )  # fmt: skip


def named(found: Verification) -> list[str]:
    return [damage.file for damage in found.damaged]


def files(folder: Path) -> list[str]:
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name != "lock")


def forge(folder: Path, name: str, content: bytes, **changes: Any) -> None:
    """Replace a file and list its new hash, in a manifest that no ledger speaks of."""
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    manifest = read_manifest(folder)
    shards = tuple(
        replace(shard, files={k: digest if k == name else v for k, v in shard.files.items()})
        for shard in manifest.shards
    )
    others = {k: digest if k == name else v for k, v in manifest.files.items()}
    changes = {"shards": shards, "files": others, "generation": 0} | changes
    write_manifest(folder, replace(manifest, **changes))
    (folder / "ledger.jsonl").unlink()
    ledger.append(folder, "ingest", {})


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def with_column(table: pa.Table, name: str, place: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[place] = value
    return table.set_column(
        table.column_names.index(name), name, pa.array(values, table.schema.field(name).type)
    )
