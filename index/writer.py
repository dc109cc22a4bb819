"""Changes to an index: new files are written beside the old ones, one commit makes them count.

A crash at any instant leaves the state before or after a commit. What a killed writer left behind
is finished or removed by the next one, under the lock.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from . import ledger
from .duplicates import find_duplicates
from .errors import IndexStoreError
from .files import make_folder, write_atomically
from .lock import FILE_NAME as LOCK_FILE
from .lock import WriteLock
from .manifest import (
    FILE_NAME,
    JOB_FILE,
    Manifest,
    Shard,
    encoded,
    part_files,
    part_name,
    read_manifest,
    write_manifest,
)
from .parts import encode_items, merged_schema, save_table, write_part
from .reader import StoredIndex
from .rows import Float32, decode_rows
from .settling import COMMIT_FILE, first_part, job_is_open, settle

_DISCARDED = b'{"first_part": -1}'
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_]+")


class IndexWriter:
    """The one writer of an index, made by `create` or `open`; it holds the lock until its end.

    >>> with IndexWriter.create("idx", feature_space_id="...", recipe={...}, dim=4096) as writer:
    ...     effective = writer.add_shard(items, rows, thumbs)  # as often as wanted
    ...     writer.write_curvature({"gram": gram})
    ...     writer.finish()
    """

    def __init__(
        self, folder: Path, manifest: Manifest, lock: WriteLock, *, new: bool, made: bool = False
    ) -> None:
        """Use `IndexWriter.create` or `IndexWriter.open`, which take the lock."""
        self.folder = folder
        self.new = new  # nothing was ever committed
        self._lock = lock
        self._made = made  # the folder is of our making
        self._committed = manifest
        self._manifest = manifest
        self._schema: pa.Schema | None = None
        self._item_ids: set[str] | None = None

    @property
    def manifest(self) -> Manifest:
        """The manifest as it would be committed now."""
        return self._manifest

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        feature_space_id: str,
        recipe: Mapping[str, Any],
        dim: int,
    ) -> IndexWriter:
        """Start an index in `folder`: absent, empty, or with an ingest that was cut short.

        `recipe` must be JSON; `dim` is the length of a feature row. Until `finish` there is no
        manifest, and readers refuse the folder.

        Raises:
            IndexStoreError: the folder holds an index or something else, cannot be written to, or
                is being written by somebody else.
        """
        folder = Path(folder)
        _check_new_folder(folder)
        existed = folder.exists()
        try:
            make_folder(folder)
        except OSError as error:
            raise IndexStoreError(
                f"{folder} cannot be made ({error.strerror}); choose another --out"
            ) from error
        lock = WriteLock(folder)
        try:
            _check_new_folder(folder)  # another writer may have finished meanwhile
            plain = json.loads(json.dumps(dict(recipe), allow_nan=False))
            manifest = Manifest(feature_space_id=feature_space_id, recipe=plain, dim=dim)
            settle(folder, None)
        except BaseException:
            lock.release(remove=not existed)
            raise
        return cls(folder, manifest, lock, new=True, made=not existed)

    @classmethod
    def open(cls, folder: str | Path) -> IndexWriter:
        """Open the index in `folder` for a change; finish or remove what a killed writer left.

        Raises:
            IndexStoreError: no index, one that is damaged or too new, a folder that cannot be
                written to, or somebody else is writing.
        """
        folder = Path(folder)
        read_manifest(folder)  # before a lock file is made in a folder that is no index
        lock = WriteLock(folder)
        try:
            manifest = read_manifest(folder)
            settle(folder, manifest)
        except BaseException:
            lock.release()
            raise
        return cls(folder, manifest, lock, new=False)

    def __enter__(self) -> IndexWriter:
        """The writer itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the lock; what was not committed is as if it had never been."""
        self.close()

    def close(self) -> None:
        """Let go of the lock, and of a folder in which nothing was begun."""
        untouched = self.new and _only_lock(self.folder)
        self._lock.release(remove=untouched)
        if untouched and self._made:
            with suppress(OSError):  # somebody else begins there now
                self.folder.rmdir()

    def unfinished_job(self) -> bool:
        """Whether an ingest into this index was cut short; its parts wait for its end."""
        return job_is_open(self.folder, self._committed)

    def discard_job(self) -> None:
        """Forget an unfinished ingest and everything that it wrote."""
        path = self.folder / JOB_FILE
        if path.exists():  # from here on it is over, even if the rest is left to the next writer
            write_atomically(path, lambda file: file.write(_DISCARDED))
        settle(self.folder, None if self.new else self._committed)

    def add_shard(
        self, items: pa.Table, rows: npt.NDArray[np.float32], thumbs: pa.Table
    ) -> Float32:
        """Write the next part and return its rows as they will be read back.

        items   one row per item: `item_id` (unique in the index), `status` ('ok' or
                'quarantined'), `error` (the reason, null when ok), optionally `row_weight`
                (default 1), and any other columns; `row_norm` is computed here
        rows    float32 [n, dim] raw features; ignored where the item is quarantined
        thumbs  `item_id` and `image` (WebP bytes), for any of the items

        Returns float32 [n, dim] = row_norm * stored unit row, zero where quarantined and without
        `row_weight`: what the curvature must be accumulated from. Raises IndexStoreError when an
        'ok' row is not finite or all zero; quarantine such an item first. Or an ingest is
        unfinished, which has the numbers of the next parts.
        """
        if self.unfinished_job():
            raise IndexStoreError(
                f"an ingest into {self.folder} is unfinished, and its parts would be overwritten; "
                "run it again to its end, or discard it, then add rows"
            )
        name = part_name(self._manifest.next_part)
        encoded = encode_items(name, items, rows, self._manifest.dim)
        known, fresh = self._known_ids(), set[str]()
        for item_id in items["item_id"].to_pylist():
            if item_id in known or item_id in fresh:
                raise IndexStoreError(
                    f"{name}: item_id {item_id!r} occurs twice; ids must be unique in an index"
                )
            fresh.add(item_id)
        self._schema = merged_schema(name, self._schema, encoded.items.schema)
        self.add_parts(
            [write_part(self.folder, name, encoded, thumbs)], self.manifest.next_part + 1
        )
        known |= fresh
        norms = encoded.items["row_norm"].to_numpy()
        return decode_rows(encoded.units, norms)

    def add_parts(self, shards: Sequence[Shard], next_part: int) -> None:
        """Let parts that lie written in the folder count from the commit on, in this order."""
        self._manifest = replace(
            self._with_shards((*self._manifest.shards, *shards)), next_part=next_part
        )

    def replace_parts(self, rewritten: Mapping[str, Shard | None], next_part: int) -> None:
        """Put new parts in the places of old ones, or nothing; no tombstone remains.

        `rewritten` gives for every part with a deleted row what takes its place.
        """
        shards = (rewritten.get(shard.name, shard) for shard in self._manifest.shards)
        kept = tuple(shard for shard in shards if shard is not None)
        self._manifest = replace(
            self._with_shards(kept),
            next_part=next_part,
            deleted=0,
            files=_without(self._manifest.files, "tombstones"),
        )

    def write_tombstones(self, positions: npt.NDArray[np.int64]) -> None:
        """State the positions of all deleted rows of the index, ascending and each once."""
        if not len(positions):
            return
        path = f"tombstones/{self._next_generation()}.npy"
        digest = write_atomically(
            self.folder / path, partial(np.save, arr=positions, allow_pickle=False)
        )
        files = _without(self._manifest.files, "tombstones") | {path: digest}
        self._manifest = replace(self._manifest, files=files, deleted=len(positions))

    def write_curvature(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write a new generation of curvature; nothing of the one before remains in it."""
        if wrong := next((name for name in arrays if not _ARRAY_NAME.fullmatch(name)), None):
            raise IndexStoreError(f"curvature array {wrong!r}: use letters, digits and _ only")
        files = _without(self._manifest.files, "curvature")
        for name, array in arrays.items():
            path = f"curvature/{self._next_generation()}/{name}.npy"
            files[path] = write_atomically(
                self.folder / path, partial(np.save, arr=array, allow_pickle=False)
            )
        self._manifest = replace(self._manifest, files=files)

    def write_duplicates(self) -> None:
        """Look for duplicates among all items as they would be committed now, and write them."""
        files = _without(self._manifest.files, "duplicates")
        found = find_duplicates(StoredIndex(self.folder, self._manifest))
        if found is not None:
            path = f"duplicates/{self._next_generation()}.parquet"
            files[path] = write_atomically(self.folder / path, partial(save_table, found))
        self._manifest = replace(self._manifest, files=files)

    def finish(self, details: Mapping[str, Any] | None = None, *, event: str = "ingest") -> None:
        """Commit: from now on the index is what was written. Lets go of the lock.

        `details` (JSON) is noted in the ledger beside the counts: how the change was made, which
        says nothing about what the rows are and so stands in no other file.
        """
        manifest = replace(self._manifest, generation=self._committed.generation + 1)
        line = {
            "event": event,
            "details": {
                **ledger.encodable(details or {}),  # before the commit: it cannot fail after it
                "feature_space_id": manifest.feature_space_id,
                "generation": manifest.generation,
                "rows": manifest.rows - manifest.deleted,
                "quarantined": manifest.quarantined,
                # Ties manifest and ledger together: neither can be changed without the other.
                "manifest_sha256": hashlib.sha256(encoded(manifest)).hexdigest(),
            },
        }
        text = json.dumps(line, allow_nan=False).encode()
        write_atomically(self.folder / COMMIT_FILE, lambda file: file.write(text))
        write_manifest(self.folder, manifest)
        self._committed = self._manifest = manifest
        self.new = False
        settle(self.folder, manifest)
        self.close()

    def note(self, event: str, details: Mapping[str, Any]) -> None:
        """Write a line to the ledger about something that changed nothing else."""
        ledger.append(self.folder, event, details)

    def _next_generation(self) -> str:
        return f"{self._committed.generation + 1:05d}"

    def _with_shards(self, shards: tuple[Shard, ...]) -> Manifest:
        return replace(
            self._manifest,
            shards=shards,
            rows=sum(shard.items for shard in shards),
            quarantined=sum(shard.quarantined for shard in shards),
        )

    def _known_ids(self) -> set[str]:
        if self._item_ids is None:
            self._item_ids = set()
            for shard in self._manifest.shards:
                table = pq.read_table(self.folder / part_files(shard.name)[1])
                self._schema = merged_schema(shard.name, self._schema, table.schema)
                self._item_ids.update(table["item_id"].to_pylist())
        return self._item_ids


def _check_new_folder(folder: Path) -> None:
    """Raise IndexStoreError unless an index can be started in `folder`."""
    if (folder / FILE_NAME).exists():
        raise IndexStoreError(
            f"{folder} already holds an index; choose another --out or delete that folder first"
        )
    if folder.exists() and not folder.is_dir():
        raise IndexStoreError(f"{folder} is a file, not a folder; choose another --out")
    if folder.exists() and not _only_lock(folder) and not _holds_job(folder):
        raise IndexStoreError(
            f"{folder} exists, is not empty and is no index; choose a new or empty folder as --out"
        )


def _only_lock(folder: Path) -> bool:
    return all(path.name == LOCK_FILE for path in folder.iterdir())


def _holds_job(folder: Path) -> bool:
    """Whether an ingest of ours was begun here; a folder named `job` may be anybody's."""
    if (folder / JOB_FILE).exists():
        return first_part(folder) is not None
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    begun = {file for file in files if re.fullmatch(rf"{re.escape(JOB_FILE)}\..*writing", file)}
    return files <= {LOCK_FILE, "job", *begun}


def _without(files: Mapping[str, str], top: str) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith(f"{top}/")}
