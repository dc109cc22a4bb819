"""Whether the files of an index agree with each other, each of them being whole."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .duck import connect_items, position_name
from .manifest import FILE_NAME, Manifest, part_files
from .reader import StoredIndex
from .rows import length_slack

_CURVATURE = {"eigenvalues", "eigenvectors", "rows"}  # what a question is preconditioned with


def disagreeing_types(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Lay the items of all parts end to end, as a reader does: [(file, what is wrong with it)].

    One part at a time is in memory.
    """
    names = [part_files(shard.name)[1] for shard in manifest.shards]
    schemas: list[pa.Schema] = []
    for name in names:
        found = pq.read_schema(folder / name)
        if not any(found.equals(schema) for schema in schemas):
            schemas.append(found)
            try:
                common = pa.unify_schemas(schemas, promote_options="permissive")
            except pa.ArrowException as error:
                return [(name, _told(error))]
    problems = []
    for name in names if len(schemas) > 1 else ():
        table = pq.ParquetFile(folder / name).read()
        try:
            pa.concat_tables([common.empty_table(), table], promote_options="permissive")
        except pa.ArrowException as error:
            problems.append((name, _told(error)))
    return problems


def repeated_ids(index: StoredIndex) -> list[tuple[str, str]]:
    """An item id that two rows have, neither of them deleted: [(file, what is wrong with it)]."""
    position = position_name(index.item_schema.names)
    try:
        with connect_items(index, deleted=False) as connection:
            twice = connection.execute(
                f"SELECT item_id, min({position}), max({position}) FROM items "
                "GROUP BY item_id HAVING count(*) > 1 ORDER BY 3 LIMIT 1"
            ).fetchone()
    except duckdb.Error as error:
        return [("items", f"item ids cannot be compared: {' '.join(str(error).split())}")]
    if twice is None:
        return []
    item_id, first, second = twice
    end = 0
    for shard in index.manifest.shards:
        end += shard.items
        if second < end:
            reason = f"item_id {item_id!r} occurs twice, at positions {first} and {second}"
            return [(part_files(shard.name)[1], reason)]
    raise AssertionError("a position beyond the last part")


def disagreeing_curvature(index: StoredIndex) -> list[tuple[str, str]]:
    """Whether the curvature can be that of the searchable rows: [(file, what is wrong with it)].

    Their number is stated, and the trace of the Gram matrix is the sum of their squared lengths,
    but for what half precision changes of a length. All of its arrays must be listed where one is,
    and where rows are those of a model, as an ingest leaves no such index without. Nothing is said
    of curvature in another form.
    """
    files = {Path(name).stem: name for name in index.manifest.files if name[:10] == "curvature/"}
    arrays, positions = index.curvature(), index.ok_positions
    if not arrays.keys() & _CURVATURE and not (len(positions) and "model" in index.manifest.recipe):
        return []
    if missing := _CURVATURE - arrays.keys():
        return [(FILE_NAME, f"it lists no {' and no '.join(sorted(missing))} of the curvature")]
    problems = []
    shape = (index.manifest.dim, *arrays["eigenvalues"].shape)
    if arrays["eigenvectors"].shape != shape:
        found = arrays["eigenvectors"].shape
        problems.append((files["eigenvectors"], f"it has shape {found}, not {shape}"))
    if arrays["rows"].shape != () or arrays["rows"] != len(positions):
        problems.append(
            (files["rows"], f"it says {arrays['rows']}, the index has {len(positions)} usable rows")
        )
    norms = index.norms[positions].astype(np.float64)
    squares = float(norms @ norms)
    traces = {"eigenvalues": float(arrays["eigenvalues"].sum())}
    if "gram" in arrays:
        traces["gram"] = float(np.trace(arrays["gram"]))
    for name, trace in traces.items():
        if not abs(trace - squares) <= 2.01 * length_slack(index.manifest.dim) * squares:
            problem = f"its trace is {trace:.6g}, the squared lengths of the rows are {squares:.6g}"
            problems.append((files[name], problem))
    return problems


def _told(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"its columns do not fit those of the other parts: {reason}"
