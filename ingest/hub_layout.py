"""What Hugging Face layouts say beside their rows: splits in file names, Arrow files in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from .errors import SourceError

_NUMBERED = re.compile(r"(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_SPLITS = frozenset({"train", "test", "validation", "valid", "val", "dev", "eval"})


def split_of(name: str) -> str | None:
    """Return the split that a data file belongs to by its path, `data/train-00000-of-00001.parquet`
    or `default/train/0000.parquet` for instance; None when it says none.
    """
    path = PurePosixPath(name)
    stem = path.name.split(".")[0]
    numbered = _NUMBERED.fullmatch(stem)
    if numbered and numbered[1] == "data" and path.suffix == ".arrow":  # by save_to_disk
        return path.parent.name or None
    if numbered and numbered[1] != "data":
        stem = numbered[1]
        last = stem.rpartition("-")[2]  # datasets' cache puts the data set's name before
        return last if last in _SPLITS else stem
    for word in (stem.rpartition("-")[2], *reversed(path.parent.parts)):
        if word in _SPLITS:
            return word
    return None


def with_splits(
    names: list[str], tables: list[pa.Table], schema: pa.Schema
) -> tuple[list[pa.Table], pa.Schema]:
    """Add a column `split` where every file's name tells its split and no column is called so."""
    splits = [split_of(name) for name in names]
    if None in splits or "split" in {name.lower() for name in schema.names}:
        return tables, schema
    added = [
        table.append_column("split", pa.array([split] * table.num_rows, pa.string()))
        for table, split in zip(tables, splits, strict=True)
    ]
    return added, schema.append(pa.field("split", pa.string()))


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` saved this folder with `save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of what `save_to_disk` wrote, one data set or one for each split."""
    if (folder / "dataset_dict.json").is_file():
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return [file for split in splits for file in saved_files(folder / str(split))]
    state = _json(folder / "state.json")
    # `datasets` wrote a selection as a list of row numbers until 2.0.
    if state.get("_indices_data_files"):
        raise SourceError(
            f"{folder} is a selection of rows saved without the rows' order; "
            "load it with `datasets`, call flatten_indices() and save it again"
        )
    if not state.get("_data_files"):
        raise SourceError(f"{folder / 'state.json'} names no Arrow file; give a saved data set")
    return [folder / str(file["filename"]) for file in state["_data_files"]]


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object")
    return content
