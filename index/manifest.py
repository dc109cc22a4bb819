"""`manifest.json`: what an index holds and the recipe it was made with.

Written last and replaced atomically: what the manifest does not list does not exist.
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
SCHEMA_VERSION = 1
_SHARD_NAME = re.compile(r"part-\d{5,}")


@dataclass(frozen=True)
class Shard:
    """One committed part: the same rows, in the same order, in items and features."""

    name: str  # "part-00000": the stem of its files under items/, features/ and thumbs/
    items: int  # rows, quarantined ones included
    quarantined: int
    files: Mapping[str, str]  # path relative to the index -> sha256


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`. Row i of an index is row i of its shards, end to end."""

    feature_space_id: str  # two indexes can be searched with one query only if this agrees
    recipe: Mapping[str, Any]  # everything the id is a hash of, so that a difference can be named
    dim: int
    complete: bool = False  # False until the ingest that writes the index has finished
    rows: int = 0
    quarantined: int = 0
    shards: tuple[Shard, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # files of no shard, e.g. curvature
    schema_version: int = SCHEMA_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest of `folder` atomically."""
    text = json.dumps(asdict(manifest), indent=2, sort_keys=True, allow_nan=False)
    write_atomically(folder / FILE_NAME, lambda file: file.write(text.encode() + b"\n"))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of `folder`.

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
        raise IndexStoreError(
            f"{folder} holds no {FILE_NAME}, so it is no index; "
            "give the folder that `headwater ingest --out` wrote"
        ) from None
    except ValueError as error:
        raise IndexStoreError(f"{path} is not valid JSON ({error}); ingest again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise IndexStoreError(
            f"{path} has schema version {version}, this Headwater reads up to {SCHEMA_VERSION}; "
            "install a newer Headwater"
        )
    try:
        manifest = Manifest(
            **{**content, "shards": tuple(Shard(**shard) for shard in content["shards"])}
        )
    except (TypeError, KeyError) as error:
        raise IndexStoreError(
            f"{path} is no Headwater manifest of schema version {SCHEMA_VERSION} ({error}); "
            "ingest again"
        ) from error
    _check(path, manifest)
    return manifest


def _check(path: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        # Names become paths, and an index may come from a stranger.
        if not _SHARD_NAME.fullmatch(shard.name):
            raise IndexStoreError(
                f"{path} lists a shard named {shard.name!r}, not part-NNNNN; ingest again"
            )
    for name in ("rows", "quarantined"):
        stated = getattr(manifest, name)
        counted = sum(s.items if name == "rows" else s.quarantined for s in manifest.shards)
        if stated != counted:
            raise IndexStoreError(
                f"{path} states {name} = {stated}, its shards add up to {counted}; ingest again"
            )
