"""What lies at a path: a table of records, and for each record its image or the image's path.

Read here: Parquet files, folders of them, image folders with `.txt` captions, and image folders
with `metadata.jsonl` or `metadata.csv` (the Hugging Face imagefolder layout).
"""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from .columns import ColumnNames, find_columns, flag, holds_binary, is_text
from .errors import SourceError

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico", ".qoi"),
    }
)
_METADATA = ("metadata.jsonl", "metadata.csv")
_BATCH_ROWS = 32  # image cells read at once: full-size photographs stay below a few hundred MiB
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A file that holds records of a corpus, their images in it."""

    name: str  # relative to the corpus
    path: Path
    first: int  # position of its first record
    stop: int  # one past its last


@dataclass(frozen=True)
class Listing:
    """The records of a corpus before selection; positions count its records from 0."""

    rows: int
    schema: pa.Schema  # every column, the image's too
    table: pa.Table  # every column without bytes, in the user's names
    names: ColumnNames
    base: Callable[[int], Path]  # the folder that a record's relative image path starts from
    uri: Callable[[int], str]  # where a record lies, relative to the corpus
    # Yields the image cell (bytes, {bytes, path}, path or None) at each ascending position.
    cells: Callable[[npt.NDArray[np.int64]], Iterator[Any]]
    keyed_by_uri: bool  # records without an id column are identified by their uri
    uris_repeat: bool = False  # one image may stand in several records
    shards: tuple[Shard, ...] = ()  # files with records in them; none where each image is a file
    errors: Mapping[int, str] = field(default_factory=dict)  # position -> why it cannot be used


def read_listing(path: Path, asked: ColumnNames) -> Listing:
    """List the corpus at `path`; SourceError when it is none."""
    if not path.exists():
        raise SourceError(f"{path} does not exist; give a Parquet file or a folder")
    if path.is_file():
        if not _is_parquet(path):
            raise SourceError(
                f"{path} is no Parquet file; give a Parquet file, a folder of them, "
                "or a folder of images"
            )
        return _parquet_listing(path, [path], asked)
    files = list(_walk(path))
    if parquet := [file for file in files if file.suffix.lower() == ".parquet"]:
        return _parquet_listing(path, parquet, asked)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if metadata := [file for file in files if file.name in _METADATA]:
        return _metadata_listing(path, metadata, images, asked)
    if not images:
        raise SourceError(
            f"{path} holds no Parquet file, no metadata.jsonl or .csv and no image; "
            "give a folder that does"
        )
    return _image_folder_listing(path, images, asked)


def image_path(cell: Any, base: Path) -> Path | None:
    """Return where the image of a cell lies, if the cell is a path."""
    if isinstance(cell, dict):  # the Hugging Face Image feature
        cell = None if cell.get("bytes") is not None else cell.get("path")
    return base / cell if isinstance(cell, str) and cell else None


def load(cell: Any, base: Path) -> tuple[bytes | None, str | None]:
    """Return (image bytes of a cell, None) or (None, why there are none)."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return content, None
    path = image_path(cell, base)
    if path is None:
        return None, "no image in this record"
    name = cell["path"] if isinstance(cell, dict) else cell
    try:
        if not path.is_file():
            return None, f"no such image file: {name}"
        return path.read_bytes(), None
    except OSError as error:
        return None, f"image file cannot be read ({error.strerror}): {name}"


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files under `folder` in a fixed order, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


# Parquet ------------------------------------------------------------------------------------------


def _parquet_listing(root: Path, paths: list[Path], asked: ColumnNames) -> Listing:
    try:
        # Mapped and not pre-buffered: a row group of images is never in memory as a whole.
        files = [pq.ParquetFile(path, memory_map=True, pre_buffer=False) for path in paths]
    except (OSError, pa.ArrowException) as error:
        unreadable = next(path for path in paths if not _opens(path))
        raise _damaged(unreadable, error) from error
    try:
        schema = pa.unify_schemas(
            [file.schema_arrow for file in files], promote_options="permissive"
        )
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"the Parquet files in {root} do not fit together ({reason})") from error
    if len(set(schema.names)) != len(schema.names):
        raise SourceError(f"{root} has two columns of one name: {', '.join(schema.names)}")
    names = find_columns(schema, asked, str(root))
    image = _required_image(names, schema, root)
    textual = [f.name for f in schema if not holds_binary(f.type)]
    table = pa.concat_tables(
        [_read_columns(path, file, textual) for path, file in zip(paths, files, strict=True)],
        promote_options="permissive",
    )
    table = table.select([name for name in textual if name in table.column_names])
    starts = np.cumsum([0, *(file.metadata.num_rows for file in files)])

    shards = tuple(
        Shard(path.name if path == root else path.relative_to(root).as_posix(), path, first, stop)
        for path, (first, stop) in zip(paths, pairwise(starts.tolist()), strict=True)
    )

    def locate(position: int) -> Shard:
        return shards[int(np.searchsorted(starts, position, side="right")) - 1]

    def uri(position: int) -> str:
        shard = locate(position)
        return f"{shard.name}#{position - shard.first}"

    def cells(positions: npt.NDArray[np.int64]) -> Iterator[Any]:
        for shard, file in zip(shards, files, strict=True):
            low, high = np.searchsorted(positions, [shard.first, shard.stop])
            try:
                yield from _parquet_cells(file, image, positions[low:high] - shard.first)
            except (OSError, pa.ArrowException) as error:
                raise _damaged(shard.path, error) from error

    return Listing(
        rows=int(starts[-1]),
        schema=schema,
        table=table,
        names=names,
        base=lambda position: locate(position).path.parent,
        uri=uri,
        cells=cells,
        keyed_by_uri=False,
        shards=shards,
    )


def _opens(path: Path) -> bool:
    try:
        pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException):
        return False
    return True


def _read_columns(path: Path, file: pq.ParquetFile, columns: list[str]) -> pa.Table:
    present = [name for name in columns if name in file.schema_arrow.names]
    try:
        return file.read(columns=present)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SourceError:
    reason = str(error).splitlines()[0]
    return SourceError(f"{path} cannot be read as Parquet ({reason}); replace the damaged file")


def _parquet_cells(
    file: pq.ParquetFile, column: str, wanted: npt.NDArray[np.int64]
) -> Iterator[Any]:
    """Yield one column's values at ascending rows of a file, reading only their row groups."""
    if column not in file.schema_arrow.names:
        yield from (None for _ in wanted)
        return
    start = 0
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        low, high = np.searchsorted(wanted, [start, end])
        remaining = wanted[low:high]
        first = start
        if len(remaining):
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[column]):
                count = int(np.searchsorted(remaining, first + batch.num_rows))
                for row in remaining[:count].tolist():
                    yield batch.column(0)[row - first].as_py()
                remaining = remaining[count:]
                first += batch.num_rows
                if not len(remaining):
                    break
        start = end


# Folders ------------------------------------------------------------------------------------------


def _image_folder_listing(root: Path, images: list[Path], asked: ColumnNames) -> Listing:
    captions: list[str | None] = []
    errors: dict[int, str] = {}
    for position, image in enumerate(images):
        try:
            captions.append(image.with_suffix(".txt").read_text(encoding="utf-8-sig").strip())
        except FileNotFoundError:
            captions.append(None)
        except (OSError, UnicodeDecodeError) as error:
            captions.append(None)
            reason = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            errors[position] = f"caption file {image.with_suffix('.txt').name} {reason}"
    paths = [image.relative_to(root).as_posix() for image in images]
    columns: dict[str, Any] = {"file_name": paths}
    if errors or any(caption is not None for caption in captions):
        columns["caption"] = pa.array(captions, pa.string())
    table = pa.table(columns)
    names = find_columns(table.schema, asked, str(root))
    return _path_listing(root, table, [root] * len(images), names, errors)


def _metadata_listing(
    root: Path, files: list[Path], images: list[Path], asked: ColumnNames
) -> Listing:
    folders = [file.parent for file in files]
    if doubled := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise SourceError(f"{doubled} holds metadata.jsonl and metadata.csv; keep one of them")
    read = {".jsonl": _read_jsonl, ".csv": _read_csv}
    tables = [read[file.suffix](file, asked) for file in files]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"the metadata files in {root} do not fit together ({reason})") from error
    names = find_columns(table.schema, asked, str(root))
    image = _required_image(names, table.schema, root)
    if not is_text(table.schema.field(image).type):
        raise SourceError(
            f"column {image!r} of {files[0]} holds no paths; name the right one with --image-column"
        )
    bases = [
        file.parent for file, part in zip(files, tables, strict=True) for _ in range(part.num_rows)
    ]
    listing = replace(_path_listing(root, table, bases, names, {}), uris_repeat=True)
    listed = {
        os.path.normpath(base / name)
        for base, name in zip(bases, table[image].to_pylist(), strict=True)
        if name
    }
    unlisted = sum(os.path.normpath(path) not in listed for path in images)
    if unlisted:
        _log.warning("%d images in %s stand in no metadata file and are left out", unlisted, root)
    return listing


def _path_listing(
    root: Path,
    table: pa.Table,
    bases: list[Path],
    names: ColumnNames,
    errors: Mapping[int, str],
) -> Listing:
    """A listing whose image column holds paths relative to `bases`."""
    image = _required_image(names, table.schema, root)

    def uri(position: int) -> str:
        folder = bases[position].relative_to(root).as_posix()
        name = str(table[image][position].as_py() or f"#{position}")
        return name if folder == "." or Path(name).is_absolute() else f"{folder}/{name}"

    def cells(positions: npt.NDArray[np.int64]) -> Iterator[Any]:
        return (table[image][position].as_py() for position in positions.tolist())

    return Listing(
        rows=table.num_rows,
        schema=table.schema,
        table=table,
        names=names,
        base=bases.__getitem__,
        uri=uri,
        cells=cells,
        keyed_by_uri=True,
        errors=errors,
    )


def _read_jsonl(path: Path, asked: ColumnNames) -> pa.Table:
    records: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not UTF-8 ({error.reason})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise SourceError(f"{path}, line {number}: not a JSON object")
        records.append(record)
    names = dict.fromkeys(name for record in records for name in record)
    columns: dict[str, pa.Array] = {}
    for name in names:
        try:
            columns[name] = pa.array([record.get(name) for record in records])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise SourceError(
                f"{path}: the values of {name!r} have no common type ({error})"
            ) from error
    return pa.table(columns)


def _read_csv(path: Path, asked: ColumnNames) -> pa.Table:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
        if len(set(header)) != len(header):
            raise SourceError(f"{path} has two columns of one name: {', '.join(header)}")
        as_text = pa.schema([(name, pa.string()) for name in header])
        # Types are guessed for the other columns only: an id "007" must not become 7.
        taken = find_columns(as_text, asked, str(path)).taken()
        return pa_csv.read_csv(
            path,
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(
                column_types={name: pa.string() for name in taken}
            ),
        )
    except (UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read as CSV ({str(error).splitlines()[0]})") from error


def _required_image(names: ColumnNames, schema: pa.Schema, root: Path) -> str:
    if names.image is None:
        raise SourceError(
            f"no column of {root} holds images; name it with {flag('image')}; "
            f"its columns: {', '.join(schema.names)}"
        )
    return names.image
