"""Where a corpus lies: paths of this machine, fsspec URLs, and brace patterns of either."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from .errors import SourceError

_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{},]*(?:,[^{},]*)+))\}")
_MOST_FILES = 1_000_000
# What object stores call a mark of a file's content, then what tells of its last change.
_MARKS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "checksum"),
    *("xet_hash", "lfs", "blob_id"),  # the Hugging Face hub's
)
_TIMES = (
    *("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "modified", "created"),
)
_PAUSES = (0.5, 2.0)  # seconds; a store that does not answer is asked again
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind an fsspec URL: the part of `pathlib.Path` that sources use.

    Whatever goes wrong in the file system's own ways is raised as OSError.
    """

    filesystem: Any  # fsspec.AbstractFileSystem
    path: str

    def __str__(self) -> str:
        """Return the URL."""
        return str(self.filesystem.unstrip_protocol(self.path))

    def __truediv__(self, name: str | PurePosixPath) -> RemotePath:
        """Return the path of `name` below this folder."""
        joined = posixpath.join(self.path, str(name))
        return RemotePath(self.filesystem, posixpath.normpath(joined) if ".." in joined else joined)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """The name's extension with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder this lies in."""
        return RemotePath(self.filesystem, posixpath.dirname(self.path))

    def with_suffix(self, suffix: str) -> RemotePath:
        """Return the file beside this one that has another extension."""
        stem = self.path[: len(self.path) - len(self.suffix)]
        return RemotePath(self.filesystem, stem + suffix)

    def relative_to(self, root: Place) -> PurePosixPath:
        """Return the path below `root`."""
        start = root.path if isinstance(root, RemotePath) else str(root)
        return PurePosixPath(posixpath.relpath(self.path or "/", start or "/"))

    def exists(self) -> bool:
        """Return whether there is a file or folder here."""
        with _as_os_errors():
            return bool(self.filesystem.exists(self.path))

    def is_file(self) -> bool:
        """Return whether there is a file here; an error of the store is not taken for a no."""
        info = self._info()
        return info is not None and info.get("type") == "file"

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Open the file for reading; it can seek."""
        with _as_os_errors():
            file: IO[bytes] = self.filesystem.open(self.path, mode)
            return file

    def read_bytes(self) -> bytes:
        """Return the content of the file."""
        return bytes(_asked(self.filesystem.cat_file, self.path))

    def files(self) -> list[RemotePath]:
        """Return every file below this folder, in no order."""
        with _as_os_errors():
            return [RemotePath(self.filesystem, path) for path in self.filesystem.find(self.path)]

    def evidence(self) -> dict[str, Any] | None:
        """Return the size and what the store says of the content, None if there is no file.

        Of a store that says nothing the content is read and hashed.
        """
        info = self._info()
        if info is None or info.get("type") == "directory":
            return None
        said = [f"{name}={info[name]}" for name in (*_MARKS, *_TIMES) if info.get(name)]
        return {"size": info.get("size"), "content": said[0] if said else _asked(self._sha256)}

    def _info(self) -> dict[str, Any] | None:
        try:
            return dict(_asked(self.filesystem.info, self.path))
        except FileNotFoundError:
            return None

    def _sha256(self) -> str:
        digest = hashlib.sha256()
        with self.open() as file:
            while block := file.read(1 << 22):
                digest.update(block)
        return f"sha256={digest.hexdigest()}"


Place = Path | RemotePath


def places(text: str | Path) -> tuple[Place, list[Place]]:
    """Return (root, the files or the one folder or file) that a path, URL or pattern names.

    A pattern has braces, `shards/{00000..00041}.tar` or `{train,more}.parquet`, and every file of
    it must exist. The names of records are relative to the root.
    """
    text = str(text)
    braces = _BRACES.search(text)
    if braces is not None and ("://" in text or not Path(text).exists()):
        found = [_place(one) for one in _expanded(text)]
        for path in found:
            with readable(path):
                if not path.is_file():
                    raise SourceError(f"{path}, of the pattern {text}, does not exist")
        return _place(text[: braces.start()].rpartition("/")[0] or "."), found
    path = _place(text)
    with readable(path):
        if not path.exists():
            raise SourceError(
                f"{path} does not exist; give a Parquet file, tar shards, or a folder"
            )
    return path, [path]


def walk(folder: Place) -> Iterator[Place]:
    """Yield the files under `folder` in a fixed order, without hidden ones."""
    if isinstance(folder, RemotePath):
        with readable(folder):
            found = [(path.relative_to(folder).parts, path) for path in folder.files()]
        shown = [(parts, path) for parts, path in found if not any(p[0] == "." for p in parts)]
        # As below: the files of a folder, then its folders.
        yield from (path for _, path in sorted(shown, key=lambda pair: _file_first(pair[0])))
        return
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(parent, name)


def relative_name(path: Place, root: Place) -> str:
    """Return a file's name in its corpus; a corpus of one file has just the file's name."""
    return path.name if path == root else path.relative_to(root).as_posix()  # type: ignore[arg-type]


@contextmanager
def readable(path: Place) -> Iterator[None]:
    """Turn what the operating system or a remote store says against reading into SourceError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise SourceError(f"{path} cannot be read ({reason})") from error


def _file_first(parts: tuple[str, ...]) -> list[tuple[bool, str]]:
    return [(number < len(parts), part) for number, part in enumerate(parts, start=1)]


def _place(text: str) -> Place:
    if "://" not in text and "::" not in text:
        return Path(text)
    try:
        filesystem, path = fsspec.core.url_to_fs(text)
    except (ImportError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{text} cannot be opened ({reason})") from error
    if isinstance(filesystem, LocalFileSystem):
        return Path(path)
    return RemotePath(filesystem, path.rstrip("/"))


def _expanded(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        if not 0 <= int(last) - int(first) < _MOST_FILES:
            raise SourceError(f"{match[0]} in {pattern} is no range of at most {_MOST_FILES} files")
        choices = [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    tails = _expanded(pattern[match.end() :])
    return [pattern[: match.start()] + choice + tail for choice in choices for tail in tails]


def _asked(ask: Callable[..., Any], *arguments: Any) -> Any:
    """Ask a store, and again where it might answer yet."""
    for pause in _PAUSES:
        try:
            with _as_os_errors():
                return ask(*arguments)
        except _FINAL:
            raise
        except OSError:
            time.sleep(pause)
    with _as_os_errors():
        return ask(*arguments)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """File systems have errors of their own: a web client's, a cloud library's."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(0, " ".join(f"{type(error).__name__}: {error}".split())) from error
