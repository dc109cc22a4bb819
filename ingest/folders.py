"""Image folders: with a `.txt` beside each image, or with `metadata.jsonl` or `metadata.csv`."""

from __future__ import annotations

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv

from .columns import ColumnNames, find_columns, is_text
from .errors import SourceError
from .listing import Listing, required_image

_log = logging.getLogger(__name__)


def image_folder_listing(root: Path, images: list[Path], asked: ColumnNames) -> Listing:
    """List images that may have a caption in a text file of the same name."""
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


def metadata_listing(
    root: Path, files: list[Path], images: list[Path], asked: ColumnNames
) -> Listing:
    """List the images that stand in metadata files, the Hugging Face imagefolder layout."""
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
    image = required_image(names, table.schema, root)
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
    image = required_image(names, table.schema, root)

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
