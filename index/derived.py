"""Files under `faiss/` that can be made again, used only as this user wrote them.

They are no part of the index (the manifest does not list them): deleting the folder costs time and
changes no answer, and so does an index folder that cannot be written to.

FAISS trusts the files it maps, and an index may come from elsewhere. So the checksum of a cache
stands not beside it but in the user's own cache folder ($XDG_CACHE_HOME/headwater, by default
~/.cache/headwater), under the place of the index. What was built by another user, on another
machine, or before the index was copied or moved is not read but built again, once.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .files import sha256_of, write_atomically

FOLDER = "faiss"
_log = logging.getLogger(__name__)


def keep(root: Path, path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write `path`, in the index folder `root`, and its checksum.

    Raises OSError when either folder does not take them, or a link stands in the way.
    """
    check_own(root, path)
    digest = write_atomically(path, write)
    write_atomically(checksum(root, path), lambda file: file.write(digest.encode()))


def whole(root: Path, path: Path) -> bool:
    """Say whether `path` is there as this user wrote it; damage gives a warning.

    Raises OSError when it is no file of the index folder `root`.
    """
    check_own(root, path)
    if not path.is_file() or not checksum(root, path).exists():
        return False
    try:
        if sha256_of(path) == digest(root, path):
            return True
        reason = "its bytes do not match its checksum"
    except (OSError, ValueError) as error:
        reason = str(error)
    tell_damaged(path, reason)
    return False


def tell_damaged(path: Path, reason: object) -> None:
    """Warn that `path` is made again."""
    _log.warning("%s is damaged (%s); it is made again", path, reason)


def remove(root: Path, path: Path) -> None:
    """Remove `path` and its checksum, as far as they are there; OSError for a link in the way."""
    check_own(root, path)
    path.unlink(missing_ok=True)
    checksum(root, path).unlink(missing_ok=True)


def digest(root: Path, path: Path) -> str:
    """Return the sha256 that `path` had when it was kept."""
    return checksum(root, path).read_text()


def checksum(root: Path, path: Path) -> Path:
    """Return where the sha256 of `path`, a file of the index in `root`, stands.

    Raises OSError for a user without a home.
    """
    place = f"{root.resolve()}\n{path.relative_to(root).as_posix()}"
    name = hashlib.sha256(os.fsencode(place)).hexdigest()
    # A relative folder counts as unset, by the XDG base directory specification.
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not caches.is_absolute():
        try:
            caches = Path("~/.cache").expanduser()
        except RuntimeError as error:
            raise OSError(f"{error}; set XDG_CACHE_HOME") from error
    return caches / "headwater" / name


def check_own(root: Path, path: Path) -> None:
    """Raise OSError when `path`, or a folder between it and the index `root`, is a link.

    An index may come from elsewhere: what is written under its faiss/ must stay there.
    """
    for step in (path, *path.parents):
        if step == root:
            return
        if step.is_symlink():
            raise OSError(errno.ELOOP, "is a link, which no cache may be; remove it", str(step))
