"""One writer at a time: a lock on the folder of an index, which ends with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from .errors import IndexStoreError

FILE_NAME = "lock"


class WriteLock:
    """Held from its making to `release`; a process that dies lets go of it."""

    def __init__(self, folder: Path) -> None:
        """Take the lock of `folder`, which must exist.

        Raises IndexStoreError when somebody else has it (named, as far as known), or when the
        folder cannot be written to.
        """
        self._path = folder / FILE_NAME
        self._descriptor = -1
        while self._descriptor < 0:
            try:
                descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            except OSError as error:
                raise IndexStoreError(
                    f"{folder} cannot be written to ({error.strerror}); "
                    "choose a folder and a disk that can"
                ) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0)
                os.close(descriptor)
                raise IndexStoreError(
                    f"{folder} is being written by {_told(holder)}; wait until that has ended"
                ) from None
            if self._is_the_file(descriptor):
                self._descriptor = descriptor
            else:
                os.close(descriptor)  # its last holder removed the file in between
        text = json.dumps(
            {
                "process": os.getpid(),
                "host": socket.gethostname(),
                "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        with suppress(OSError):  # a courtesy to the second writer, no more
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, text.encode(), 0)

    def release(self, *, remove: bool = False) -> None:
        """Let go; `remove` takes the file away too, from a folder in which no index was begun."""
        if self._descriptor < 0:
            return
        if remove:
            self._path.unlink(missing_ok=True)
        else:
            # Who held it says nothing about the index: two alike should have the same bytes.
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)
        self._descriptor = -1

    def __del__(self) -> None:
        """Let go, for a writer that was dropped after an error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _is_the_file(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False


def _told(holder: bytes) -> str:
    try:
        known = json.loads(holder)
        return (
            f"process {known['process']} on {known['host']} "
            f"({known['command']}, since {known['since']})"
        )
    except (ValueError, KeyError, TypeError):
        return "another process"
