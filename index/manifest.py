"""`manifest.json`: what an index holds and the recipe it was made with.

Replaced atomically, and nothing else makes a change visible: what the manifest does not list does
not exist.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import IndexStoreError
from .files import write_atomically

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 2
JOB_FILE = "job/job.json"  # of an ingest that runs or was cut short
_SHARD_NAME = re.compile(r"part-(\d{5,})")
_OTHER_FILE = re.compile(
    r"curvature/(\d{5,}/)?[A-Za-z0-9_]+\.npy|tombstones/\d{5,}\.npy|duplicates/\d{5,}\.parquet"
)


class NewerSchemaError(IndexStoreError):
    """The index was written by a newer Headwater, which may be whole but is not understood."""


@dataclass(frozen=True)
class Shard:
    """One committed part: the same rows, in the same order, in items and features."""

    name: str  # "part-00000": the stem of its files under items/, features/ and thumbs/
    items: int  # rows, quarantined ones included
    quarantined: int
    files: Mapping[str, str]  # path relative to the index -> sha256

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.name.removeprefix("part-"))


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`. Row i of an index is row i of its shards, end to end."""

    feature_space_id: str  # two indexes can be searched with one query only if this agrees
    recipe: Mapping[str, Any]  # everything the id is a hash of, so that a difference can be named
    dim: int
    generation: int = 0  # how often the index was changed; names curvature, tombstones, duplicates
    next_part: int = 0  # part numbers are never used again
    rows: int = 0  # deleted ones included, until `compact`
    quarantined: int = 0
    deleted: int = 0  # rows with a tombstone: no answer shows them
    shards: tuple[Shard, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # files of no shard, e.g. curvature
    schema_version: int = SCHEMA_VERSION

    def all_files(self) -> dict[str, str]:
        """Every file that counts: path relative to the index -> sha256."""
        listed = dict(self.files)
        for shard in self.shards:
            listed.update(shard.files)
        return listed


def part_name(number: int) -> str:
    """`part-00007` of 7."""
    return f"part-{number:05d}"


def part_files(name: str) -> tuple[str, str, str]:
    """The paths of a part's features, items and previews, relative to the index."""
    return f"features/{name}.npy", f"items/{name}.parquet", f"thumbs/{name}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of `folder` atomically."""
    write_atomically(folder / FILE_NAME, lambda file: file.write(encoded(manifest)))


def encoded(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True, allow_nan=False)
    return text.encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of `folder`; one of an older schema comes as of this one.

    Raises IndexStoreError when `folder` is no folder, holds no manifest, or one that this version
    cannot read.
    """
    if not folder.is_dir():
        raise IndexStoreError(
            f"{folder} is not a folder; give the folder that `headwater ingest --out` wrote"
        )
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if (folder / JOB_FILE).exists():
            raise IndexStoreError(
                f"the ingest into {folder} is not finished; run it again, it goes on where it was"
            ) from None
        raise IndexStoreError(
            f"{folder} holds no {FILE_NAME}, so it is no index; "
            "give the folder that `headwater ingest --out` wrote"
        ) from None
    except ValueError as error:
        raise IndexStoreError(f"{path} is not valid JSON ({error}); ingest again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{path} has schema version {version}, this Headwater reads up to {SCHEMA_VERSION}; "
            "install a newer Headwater"
        )
    try:
        if version == 1:
            content = _from_version_1(folder, content)
        manifest = Manifest(
            **{**content, "shards": tuple(Shard(**shard) for shard in content["shards"])}
        )
        _check(path, manifest)
    except (AttributeError, TypeError, KeyError) as error:
        raise IndexStoreError(
            f"{path} is no Headwater manifest of schema version {SCHEMA_VERSION} ({error}); "
            "ingest again"
        ) from error
    return manifest


def _from_version_1(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had no tombstones, and a manifest while the index was still being written."""
    content = dict(content)
    if not content.pop("complete"):
        raise IndexStoreError(
            f"the ingest that wrote {folder} did not finish; delete the folder and ingest again"
        )
    return content | {"schema_version": SCHEMA_VERSION, "next_part": len(content["shards"])}


def _check(path: Path, manifest: Manifest) -> None:
    # Names become paths, and an index may come from a stranger.
    seen: set[str] = set()
    for shard in manifest.shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise IndexStoreError(
                f"{path} lists a shard named {shard.name!r}, not part-NNNNN; ingest again"
            )
        if shard.name in seen or shard.number >= manifest.next_part:
            raise IndexStoreError(
                f"{path} lists {shard.name} twice or beyond next_part; ingest again"
            )
        seen.add(shard.name)
        if set(shard.files) != set(part_files(shard.name)):
            raise IndexStoreError(
                f"{path}: {shard.name} has other files than its own; ingest again"
            )
    for name in manifest.files:
        if not _OTHER_FILE.fullmatch(name):
            raise IndexStoreError(
                f"{path} lists {name!r}, no file of curvature/, tombstones/ or duplicates/; "
                "ingest again"
            )
    for name in ("rows", "quarantined"):
        stated = getattr(manifest, name)
        counted = sum(s.items if name == "rows" else s.quarantined for s in manifest.shards)
        if stated != counted:
            raise IndexStoreError(
                f"{path} states {name} = {stated}, its shards add up to {counted}; ingest again"
            )
