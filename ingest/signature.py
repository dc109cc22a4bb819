"""What a source is, small enough to keep: files, records and selection as hashes.

A job that goes on later, or elsewhere, compares: the same source gives the same rows.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from stat import S_ISREG
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .columns import is_bytes
from .listing import Listing, image_path
from .places import Place, RemotePath, readable

Signature = dict[str, Any]
_ROWS_AT_ONCE = 4096
_READERS = 4


def signature(
    listing: Listing, positions: npt.NDArray[np.int64], known: Signature | None = None
) -> Signature:
    """Return what the records at `positions` and their files are, as JSON can hold it.

    Names of files are relative to the corpus, but for absolute paths that records themselves give.
    Every file that holds selected records, or is the image of one, is read and hashed (SHA-256);
    of a remote one the store's own mark is taken (its ETag, else its time of change) and nothing
    read, unless the store has none. With `known`, an earlier signature, files of the same size and
    time of change keep its hash and are not read. Takes 8 microseconds a record and the time to
    read and hash the files: about 2 GB a second from a fast disk.
    """
    earlier: Mapping[str, Any] = known["files"] if known is not None else {}
    evidence: dict[str, Any] = {}
    files = iter(dict(_files(listing, positions)).items())
    with ThreadPoolExecutor(_READERS) as pool:
        # By the thousand: a million tasks waiting would take a gigabyte.
        while chunk := list(islice(files, 1000)):
            found = pool.map(lambda file: _evidence(file[1], earlier.get(file[0])), chunk)
            evidence.update(zip((name for name, _ in chunk), found, strict=True))
    return {
        "roles": asdict(listing.names),
        "columns": {field.name: str(field.type) for field in listing.schema},
        "files": evidence,
        "count": len(positions),
        "selection": hashlib.sha256(positions.astype("<i8").tobytes()).hexdigest(),
        "records": _records_hash(listing.table, positions),
    }


def difference(before: Signature, now: Signature) -> str | None:
    """Return in one line what differs between two signatures of a source, None if nothing does."""
    if reason := _files_difference(before["files"], now["files"]):
        return reason
    if before["columns"] != now["columns"]:
        names = dict(before["columns"].items() ^ now["columns"].items())
        return f"other columns or types: {', '.join(sorted(names))}"
    if before["roles"] != now["roles"]:
        roles = sorted(role for role, name in now["roles"].items() if name != before["roles"][role])
        said = (
            f"{now['roles'][role]!r} as {role}, not {before['roles'][role]!r}" for role in roles
        )
        return f"other columns are used: {', '.join(said)}"
    if before["count"] != now["count"]:
        return f"{now['count']} records are selected, not {before['count']}"
    if before["selection"] != now["selection"]:
        return f"other records are selected, {now['count']} as before"
    if before["records"] != now["records"]:
        return "captions or other columns of the selected records have changed"
    return None


def _files_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if gone := sorted(before.keys() - now.keys()):
        return f"{_counted(gone)} no longer used by the selection"
    if come := sorted(now.keys() - before.keys()):
        return f"{_counted(come)} not used before"
    for name, old in before.items():
        new = now[name]
        if old is None or new is None:
            if old is not new:
                return f"{name} {'is missing' if new is None else 'was missing and is there now'}"
        elif old["size"] != new["size"]:
            return f"{name} has {new['size']} bytes, not {old['size']}"
        elif old["content"] != new["content"]:
            return f"{name} has other content of the same size"
    return None


def _counted(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files ({names[0]}, ...)"


def _files(listing: Listing, positions: npt.NDArray[np.int64]) -> Iterator[tuple[str, Place]]:
    """Yield (name, path) of every file that the images of the records come from."""
    for shard in listing.shards:
        low, high = np.searchsorted(positions, [shard.first, shard.stop])
        if low < high:
            yield shard.name, shard.path
    image = listing.names.image
    if image is not None and is_bytes(listing.schema.field(image).type):
        return
    cells = listing.cells(positions)
    for position, cell in zip(positions.tolist(), cells, strict=True):
        path = image_path(cell, listing.base(position))
        if path is None:
            continue
        uri = listing.uri(position)
        if not listing.keyed_by_uri:  # the row's place in a table file, which the path starts from
            name = cell["path"] if isinstance(cell, dict) else cell
            uri = posixpath.join(posixpath.dirname(uri), name)
        yield uri, path


def _evidence(path: Place, earlier: dict[str, Any] | None) -> dict[str, Any] | None:
    """Size, time of change and content hash of a file; None if there is none."""
    if isinstance(path, RemotePath):
        with readable(path):
            return path.evidence()
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            return None
        told = {"size": stat.st_size, "changed_ns": stat.st_mtime_ns}
        if earlier is not None and told.items() <= earlier.items():
            return earlier
        with path.open("rb") as file:
            return told | {"content": hashlib.file_digest(file, "sha256").hexdigest()}
    except (OSError, ValueError):  # ValueError: a null character in the path
        return None


def _records_hash(table: pa.Table, positions: npt.NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(positions) if table.num_columns else 0, _ROWS_AT_ONCE):
        taken = table.take(pa.array(positions[first : first + _ROWS_AT_ONCE]))
        # As Python values: Arrow's buffers hold anything beneath a null.
        digest.update(repr(taken.to_pylist()).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
