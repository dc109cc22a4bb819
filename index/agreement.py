"""Whether the files of an index agree with each other, each of them being whole."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .manifest import Manifest, part_files


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


def _told(error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"its columns do not fit those of the other parts: {reason}"
