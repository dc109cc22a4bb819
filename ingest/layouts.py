"""Which kind of corpus lies at a path, a URL or a pattern, and its listing."""

from __future__ import annotations

from pathlib import Path

from .arrow_files import arrow_listing
from .columns import ColumnNames
from .errors import SourceError
from .folders import image_folder_listing, metadata_listing
from .hub_layout import is_saved, saved_files
from .listing import Listing
from .parquet_files import parquet_listing
from .places import Place, places, readable, walk
from .tar_shards import IMAGE_EXTENSIONS, tar_listing

_METADATA = ("metadata.jsonl", "metadata.csv")


def read_listing(text: str | Path, asked: ColumnNames) -> Listing:
    """List the corpus that `text` names; SourceError when it is none."""
    root, given = places(text)
    if len(given) > 1 or given[0] != root or given[0].is_file():
        return _files_listing(root, given, asked)
    return _folder_listing(root, asked)


def _files_listing(root: Place, files: list[Place], asked: ColumnNames) -> Listing:
    kinds = {file.suffix.lower() for file in files}
    if kinds == {".tar"}:
        return tar_listing(root, files, asked)
    if kinds == {".arrow"} and isinstance(root, Path):
        return arrow_listing(root, [file for file in files if isinstance(file, Path)], asked)
    for file in files:
        if not _is_parquet(file):
            raise SourceError(
                f"{file} is no Parquet file; give Parquet files, uncompressed tar shards, "
                "or a folder of either or of images"
            )
    return parquet_listing(root, files, asked)


def _folder_listing(root: Place, asked: ColumnNames) -> Listing:
    if isinstance(root, Path) and is_saved(root):
        return arrow_listing(root, saved_files(root), asked)
    files = list(walk(root))
    tars = [file for file in files if file.suffix.lower() == ".tar"]
    parquet = [file for file in files if file.suffix.lower() == ".parquet"]
    if tars:
        beside = {tar.with_suffix(".parquet") for tar in tars}
        if strange := [file for file in parquet if file not in beside]:
            raise SourceError(
                f"{root} holds tar shards, and Parquet files that belong to none of them "
                f"({strange[0].name}); name one kind by a pattern: {root}/{{00000..00009}}.tar"
            )
        return tar_listing(root, tars, asked)
    if parquet:
        return parquet_listing(root, parquet, asked)
    if not isinstance(root, Path):
        raise SourceError(
            f"{root} holds no Parquet file and no tar shard, which are what is read from a URL; "
            "copy other layouts to a disk"
        )
    local = [file for file in files if isinstance(file, Path)]
    arrow = [file for file in local if file.suffix == ".arrow"]
    # In its cache `datasets` keeps results of its own beside the data.
    if arrow := [file for file in arrow if not file.name.startswith("cache-")]:
        return arrow_listing(root, arrow, asked)
    images = [file for file in local if file.suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS]
    if metadata := [file for file in local if file.name in _METADATA]:
        return metadata_listing(root, metadata, images, asked)
    if not images:
        raise SourceError(
            f"{root} holds no Parquet file, no tar shard, no Arrow file, no metadata.jsonl or .csv "
            "and no image; give a folder that does"
        )
    return image_folder_listing(root, images, asked)


def _is_parquet(path: Place) -> bool:
    with readable(path), path.open("rb") as file:
        return file.read(4) == b"PAR1"
