"""Files under `faiss/` that can be made again: each beside its checksum, used only when whole.

They are no part of the index (the manifest does not list them): deleting the folder costs time and
changes no answer, and so does an index folder that cannot be written to.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .files import sha256_of, write_atomically

FOLDER = "faiss"
_log = logging.getLogger(__name__)


def keep(root: Path, path: Path, write: Callable[[BinaryIO], object]) -> bool:
    """Write `path`, in the index folder `root`, and its checksum.

    False, with a warning, when the folder does not take them.
    """
    try:
        check_own(root, path)
        digest = write_atomically(path, write)
        write_atomically(checksum(path), lambda file: file.write(digest.encode()))
    except OSError as error:
        _log.warning("%s could not be kept and is made again next time: %s", path, error)
        return False
    return True


def check_own(root: Path, path: Path) -> None:
    """Raise OSError when `path`, or a folder between it and the index `root`, is a link.

    An index may come from elsewhere: what is written under its faiss/ must stay there.
    """
    for step in (path, *path.parents):
        if step == root:
            return
        if step.is_symlink():
            raise OSError(errno.ELOOP, "is a link, which no cache may be; remove it", str(step))


def whole(root: Path, path: Path) -> bool:
    """Say whether `path` is there as it was written; damage gives a warning.

    Raises OSError when it is no file of the index folder `root`.
    """
    check_own(root, path)
    try:
        if not path.exists():
            return False
        if sha256_of(path) == checksum(path).read_text():
            return True
        reason = "its bytes do not match its checksum"
    except (OSError, ValueError) as error:
        reason = str(error)
    _log.warning("%s is damaged (%s); it is made again", path, reason)
    return False


def checksum(path: Path) -> Path:
    """Return where the sha256 of `path` stands."""
    return path.with_name(path.name + ".sha256")
