"""An index of given rows, all of them searchable, with their curvature."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headwater.index import IndexWriter

Rows = npt.NDArray[np.float32]
SHARD = 500  # rows


def write_index(folder: Path, rows: Rows) -> None:
    dim = rows.shape[1]
    with IndexWriter.create(folder, feature_space_id="s", recipe={}, dim=dim) as writer:
        add(writer, rows, 0)
        values, vectors = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
        writer.write_curvature(
            {
                "eigenvalues": values[::-1],
                "eigenvectors": np.ascontiguousarray(vectors[:, ::-1]),
                "rows": np.array(len(rows)),
            }
        )
        writer.finish()


def add(writer: IndexWriter, rows: Rows, number: int) -> None:
    """Parts of SHARD rows; item ids count from `number`."""
    thumbs = pa.table({"item_id": pa.array([], pa.string()), "image": pa.array([], pa.binary())})
    for first in range(0, len(rows), SHARD):
        part = rows[first : first + SHARD]
        ids = [str(number + first + i) for i in range(len(part))]
        items = pa.table(
            {"item_id": ids, "status": ["ok"] * len(ids), "error": pa.nulls(len(ids), pa.string())}
        )
        writer.add_shard(items, part, thumbs)
