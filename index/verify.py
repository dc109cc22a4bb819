"""`headwater verify`: whether an index is whole, by its hashes, counts and ledger."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from . import duplicates, ledger
from .agreement import disagreeing_curvature, disagreeing_types, repeated_ids
from .errors import IndexStoreError
from .files import sha256_of
from .lock import FILE_NAME as LOCK_FILE
from .manifest import (
    FILE_NAME,
    JOB_FILE,
    Manifest,
    NewerSchemaError,
    Shard,
    part_files,
    read_manifest,
)
from .reader import StoredIndex
from .rows import length_slack
from .settling import COMMIT_FILE

_ITEM_COLUMNS = ("item_id", "status", "error", "row_norm", "row_weight")
_ROWS_AT_ONCE = 256
_LEADS_OUT = "it is a link, or leads out of the index, which must hold its own files"
_PART_FILE = re.compile(r"(?:features|items|thumbs)/part-(\d{5,})\.(?:npy|parquet)")


@dataclass(frozen=True)
class Damage:
    """One file that is not as the index says."""

    file: str  # relative to the index
    problem: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    folder: str
    rows: int
    files: int  # checked
    bytes: int  # in them
    damaged: tuple[Damage, ...]  # in the order of the manifest, then the ledger
    leftovers: tuple[str, ...]  # files that belong to nothing: the next writer removes its own
    unfinished: bool  # an ingest runs or was cut short; its work is in job/
    ledger_lines: int
    ledger_head: str  # hash of the last line; noted elsewhere, it proves what was there by then

    @property
    def whole(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damaged

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        return {"whole": self.whole, **asdict(self)}


def verify(
    folder: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> Verification:
    """Read every file that the index in `folder` lists, and check it; change nothing.

    Hashes; rows, shapes and types against the manifest; rows of length 1 where an item is ok and 0
    where it is quarantined; unique item ids; column types; tombstones; duplicates against the items
    they name; the curvature against the lengths of the rows; the chain of the ledger and the
    manifest that its last commit names. Caches in faiss/ are not looked at: they can be made again.

    progress  called with (bytes checked, bytes in all) after each part

    Raises IndexStoreError when `folder` is no index, comes from a newer version, or changes while
    it is read.
    """
    folder = Path(folder)
    before = _digest(folder / FILE_NAME)
    found = _verify(folder, progress or (lambda done, total: None))
    if _digest(folder / FILE_NAME) != before:
        raise IndexStoreError(f"{folder} was changed while it was verified; verify again")
    return found


def _verify(folder: Path, progress: Callable[[int, int], None]) -> Verification:
    try:
        manifest = read_manifest(folder)
    except NewerSchemaError:
        raise
    except IndexStoreError as error:
        if not _was_index(folder):
            raise
        return _told(folder, None, [Damage(FILE_NAME, str(error))], 0, 0)
    total = sum(_size(folder / name) for name in manifest.all_files())
    damaged = _check_manifest(folder, manifest)
    files = read = 0

    def task(part: Shard | str) -> tuple[list[Damage], int, int]:
        if isinstance(part, str):
            return _check_other(folder, manifest, part)
        return _check_part(folder, manifest, part)

    # Hashing lets go of the interpreter's lock: a thread for each processor.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for problems, count, size in pool.map(task, [*manifest.shards, *sorted(manifest.files)]):
            damaged += problems
            files += count
            read += size
            progress(read, total)
    if not any(damage.file.startswith("items/") for damage in damaged):
        damaged += [Damage(*found) for found in disagreeing_types(folder, manifest)]
    if manifest.shards and not any(_matters_to_ids(damage.file) for damage in damaged):
        index = StoredIndex(folder, manifest)
        damaged += [Damage(*found) for found in repeated_ids(index)]
        damaged += _check_duplicates(index, damaged)
        if not any(damage.file.startswith("curvature/") for damage in damaged):
            damaged += [Damage(*found) for found in disagreeing_curvature(index)]
    return _told(folder, manifest, damaged, files, read)


def _told(
    folder: Path, manifest: Manifest | None, damaged: list[Damage], files: int, read: int
) -> Verification:
    """Add what stands beside the parts: the manifest itself, the ledger, leftovers."""
    chain = ledger.check(folder)
    damaged = [*damaged, *(Damage(ledger.FILE_NAME, problem) for problem in chain.problems)]
    beside = [name for name in (FILE_NAME, ledger.FILE_NAME) if (folder / name).is_file()]
    links = [name for name in beside if (folder / name).is_symlink()]
    damaged = [*(Damage(name, _LEADS_OUT) for name in links), *damaged]
    return Verification(
        folder=str(folder),
        rows=manifest.rows if manifest else 0,
        files=files + len(beside),
        bytes=read + sum(_size(folder / name) for name in beside),
        damaged=tuple(damaged),
        leftovers=tuple(_leftovers(folder, manifest)) if manifest else (),
        unfinished=(folder / JOB_FILE).exists(),
        ledger_lines=chain.lines,
        ledger_head=chain.head,
    )


def _was_index(folder: Path) -> bool:
    """Whether `folder` holds an index whose manifest is damaged or gone, not something else."""
    if (folder / FILE_NAME).exists():
        return True
    finished = (folder / ledger.FILE_NAME).exists()  # written after the first manifest
    return finished and not (folder / JOB_FILE).exists()


def _check_manifest(folder: Path, manifest: Manifest) -> list[Damage]:
    """Check the manifest against the line that its commit left in the ledger."""
    digests = {}
    for line in [*ledger.entries(folder), *_pending(folder, manifest)]:
        generation = line["details"].get("generation")
        if isinstance(generation, int) and "manifest_sha256" in line["details"]:
            digests[generation] = line["details"]["manifest_sha256"]
    if manifest.generation == 0 and not digests:
        return []  # written in version 1, whose ledger says nothing about it
    stated = digests.get(manifest.generation)
    if digests and max(digests) > manifest.generation:
        reason = f"{ledger.FILE_NAME} tells of a later generation, {max(digests)}"
    elif stated is None:
        reason = f"no line of {ledger.FILE_NAME} tells of generation {manifest.generation}"
    elif stated != _digest(folder / FILE_NAME):
        reason = f"its sha256 is not what {ledger.FILE_NAME} says of this generation"
    else:
        return []
    return [Damage(FILE_NAME, reason)]


def _pending(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The ledger's line of a commit that was killed before it stood there; the next writer adds it.

    None of it while the commit itself has not happened.
    """
    path = folder / COMMIT_FILE
    if not path.is_file():
        return []
    try:
        line = json.loads(path.read_bytes())
        return [line] if line["details"]["generation"] == manifest.generation else []
    except (KeyError, TypeError, ValueError):
        return []


def _check_part(folder: Path, manifest: Manifest, shard: Shard) -> tuple[list[Damage], int, int]:
    """Check the three files of a part: (damages, files read, bytes read)."""
    problems: dict[str, str] = {}
    read = 0
    for name, digest in shard.files.items():
        size, problem = _check_bytes(folder, name, digest)
        read += size
        if problem:
            problems[name] = problem
    features, items, thumbs = part_files(shard.name)
    table = None
    if items not in problems:
        table, problem = _guarded(_read_items, folder / items, shard)
        if problem:
            problems[items] = problem
    if table is not None:
        ok = pc.equal(table["status"], "ok").to_numpy()
        if features not in problems:
            shape = (shard.items, manifest.dim)
            _, problem = _guarded(_check_rows, folder / features, shape, ok)
            if problem:
                problems[features] = problem
        if thumbs not in problems:
            _, problem = _guarded(_check_thumbs, folder / thumbs, table["item_id"])
            if problem:
                problems[thumbs] = problem
    damaged = [Damage(name, problems[name]) for name in shard.files if name in problems]
    return damaged, len(shard.files), read


def _check_other(folder: Path, manifest: Manifest, name: str) -> tuple[list[Damage], int, int]:
    """Check a file of no part: (damages, files read, bytes read)."""
    size, problem = _check_bytes(folder, name, manifest.files[name])
    if not problem and name.endswith(".npy"):
        rows = (manifest.rows, manifest.deleted) if name.startswith("tombstones/") else None
        _, problem = _guarded(_check_numbers, folder / name, rows)
    return ([Damage(name, problem)] if problem else []), 1, size


def _check_bytes(folder: Path, name: str, digest: str) -> tuple[int, str]:
    """Hash a file: (bytes read, what is wrong with it or nothing)."""
    path = folder
    for step in PurePosixPath(name).parts:
        path = path / step
        if step == ".." or path.is_symlink():
            return 0, _LEADS_OUT
    if not path.is_file():
        return 0, "it is missing"
    try:
        found = _digest(path)
    except OSError as error:
        return 0, f"it cannot be read: {error.strerror}"
    return _size(path), "" if found == digest else "its sha256 is not what the manifest says"


class _Wrong(Exception):
    """What is wrong with the contents of a file."""


def _guarded(check: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """Run a check: (its value, "") or (None, what is wrong)."""
    try:
        return check(*arguments), ""
    except _Wrong as error:
        return None, str(error)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        return None, f"it cannot be read: {' '.join(str(error).split())}"


def _read_items(path: Path, shard: Shard) -> pa.Table:
    """Return the columns every index needs, checked against the manifest and each other."""
    table = pq.ParquetFile(path).read(columns=list(_ITEM_COLUMNS))
    if missing := [name for name in _ITEM_COLUMNS if name not in table.column_names]:
        raise _Wrong(f"it has no column {', '.join(missing)}")
    if table.num_rows != shard.items:
        raise _Wrong(f"it has {table.num_rows} items, the manifest says {shard.items}")
    ids, status, error = (table[name] for name in ("item_id", "status", "error"))
    if ids.null_count or not pc.all(pc.greater(pc.binary_length(ids), 0)).as_py():
        raise _Wrong("an item has no item_id")
    ok = pc.equal(status, "ok")
    if status.null_count or not pc.all(pc.or_(ok, pc.equal(status, "quarantined"))).as_py():
        raise _Wrong("a status is neither 'ok' nor 'quarantined'")
    quarantined = table.num_rows - pc.sum(ok).as_py()
    if quarantined != shard.quarantined:
        raise _Wrong(f"{quarantined} items are quarantined, the manifest says {shard.quarantined}")
    if not pc.all(pc.equal(ok, pc.is_null(error))).as_py():
        raise _Wrong("a quarantined item states no reason, or an ok one does")
    flags = ok.to_numpy()
    for name in ("row_norm", "row_weight"):
        values = table[name].to_numpy()
        if not np.isfinite(values[flags]).all():
            raise _Wrong(f"{name} of an ok item is not finite")
    norms = table["row_norm"].to_numpy()
    if (norms[flags] <= 0).any() or norms[~flags].any():
        raise _Wrong("row_norm is not above 0 where an item is ok, or not 0 where quarantined")
    return table


def _check_rows(path: Path, shape: tuple[int, int], ok: npt.NDArray[np.bool_]) -> None:
    """Check stored rows: unit length where ok, zero where quarantined."""
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.shape != shape or rows.dtype != np.float16:
        raise _Wrong(f"it holds {rows.dtype} {rows.shape}, the manifest says float16 {shape}")
    slack = length_slack(shape[1])
    for first in range(0, shape[0], _ROWS_AT_ONCE):
        block = rows[first : first + _ROWS_AT_ONCE].astype(np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
        wanted = ok[first : first + _ROWS_AT_ONCE].astype(np.float64)
        far = ~(np.abs(lengths - wanted) <= np.where(wanted > 0, slack, 0.0))
        if far.any():
            at = int(np.flatnonzero(far)[0])
            raise _Wrong(f"row {first + at} has length {lengths[at]:.6g}, not {wanted[at]:.0f}")


def _check_thumbs(path: Path, ids: pa.ChunkedArray) -> None:
    """Check that previews belong to items of the part, each to another."""
    known = pq.ParquetFile(path).read(columns=["item_id"])["item_id"]
    if not pc.all(pc.is_in(known, value_set=ids)).as_py() and len(known):
        raise _Wrong("a preview belongs to no item of its part")
    if pc.count_distinct(known).as_py() != len(known):
        raise _Wrong("an item has two previews")


def _check_numbers(path: Path, tombstones: tuple[int, int] | None) -> None:
    """Check an array of curvature, or of the positions of (rows, deleted) when given."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if tombstones is None:
        if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
            raise _Wrong(f"it holds {values.dtype} with entries that are no finite numbers")
        return
    rows, deleted = tombstones
    if values.dtype != np.int64 or values.shape != (deleted,):
        raise _Wrong(
            f"it holds {values.dtype} {values.shape}, the manifest says int64 {(deleted,)}"
        )
    if (np.diff(values, prepend=-1) <= 0).any() or (values >= rows).any():
        raise _Wrong(f"its positions are not ascending within 0 to {rows - 1}")


def _matters_to_ids(file: str) -> bool:
    return file.startswith(("items/", "tombstones/"))


def _check_duplicates(index: StoredIndex, damaged: list[Damage]) -> list[Damage]:
    """Check the file of duplicates against the items that it names."""
    path = index.duplicates_path
    name = "" if path is None else path.relative_to(index.folder).as_posix()
    if not name or any(damage.file == name for damage in damaged):
        return []
    found, unreadable = _guarded(duplicates.problem_of, index)
    problem = found or unreadable
    return [Damage(name, problem)] if problem else []


def _leftovers(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Files and links that neither the manifest lists nor an index has beside it."""
    job_is_open = (folder / JOB_FILE).exists()
    own = {FILE_NAME, LOCK_FILE, COMMIT_FILE, ledger.FILE_NAME, *manifest.all_files()}
    for parent, folders, files in os.walk(folder):
        here = Path(parent).relative_to(folder)
        if here == Path():
            folders[:] = [name for name in folders if name not in ("faiss", "job")]
        folders.sort()
        links = [name for name in folders if (folder / here / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = (here / name).as_posix()
            part = _PART_FILE.fullmatch(path)
            waits = job_is_open and part and int(part[1]) >= manifest.next_part
            if path not in own and not waits:
                yield path


def _digest(path: Path) -> str:
    return sha256_of(path) if path.is_file() else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
