"""WebDataset tar shards, also as img2dataset writes them with a Parquet file beside each.

A sample is a run of members that share their name up to the first dot of its last part:
`000000012.jpg`, `.txt`, `.json`. Images are read from where they lie, nothing is unpacked. A shard
that is cut short or damaged gives the samples before that place; the rest is reported.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import IO, Any

import numpy as np
import pyarrow as pa

from .columns import ColumnNames, find_columns, flag
from .errors import SourceError
from .listing import Int64, Listing, Unreadable, sharded_listing
from .parquet_files import read_table, unified
from .places import Place, readable, relative_name

IMAGE_EXTENSIONS = frozenset(
    {
        *("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"),
        *("avif", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "ico", "qoi"),
    }
)
_TEXTS = frozenset({"txt", "text", "caption", "cls", "json"})
_BLOCK = 512
_log = logging.getLogger(__name__)


def tar_listing(root: Place, paths: list[Place], asked: ColumnNames) -> Listing:
    """List the samples of tar shards; `root` is where their names start.

    A shard with a Parquet file of its name beside it has that file's rows, also those without an
    image, and its headers are read when its images are. Else headers, texts and JSON are read now:
    about 0.1 ms a sample on a local disk, and 40 bytes of memory beside its columns.
    """
    files = [(relative_name(path, root), path) for path in paths]
    headers = _RecentHeaders(asked.image)
    shards = [_opened(path, asked.image, headers) for path in paths]
    tables = _fitted([shard.table for shard in shards])
    schema = unified(tuple(table.schema for table in tables), root, "side")
    roles = find_columns(schema, replace(asked, image=None), str(root))
    image = "image"
    while image in {name.lower() for name in schema.names}:
        image = f"_{image}"

    def read(number: int, rows: Int64) -> Iterator[bytes | Unreadable]:
        with readable(paths[number]):
            yield from shards[number].images(rows)

    return sharded_listing(
        files,
        tables,
        schema.append(pa.field(image, pa.binary())),
        replace(roles, image=image),
        read=read,
        name_of=lambda number, row: shards[number].names[row].as_py(),
    )


@dataclass(frozen=True)
class _Shard:
    table: pa.Table
    names: pa.Array  # of the samples, by which records are identified
    images: Callable[[Int64], Iterator[bytes | Unreadable]]  # at ascending rows


def _opened(
    path: Place,
    extension: str | None,
    headers: _RecentHeaders,
) -> _Shard:
    side = path.with_suffix(".parquet")
    with readable(side):
        has_side = side.is_file()
    if not has_side:
        with readable(path):
            samples = _scanned(path, extension, texts=True)
        images = partial(_images, path, replace(samples, records=[]))  # the table has them
        return _Shard(samples.table(), samples.names, images)
    table = read_table(side)
    if "key" not in table.column_names:
        raise SourceError(f"{side} has no column 'key', which says where an image is in {path}")
    keys = table["key"].cast(pa.string()).combine_chunks()

    def images_of(rows: Int64) -> Iterator[bytes | Unreadable]:
        samples, places = headers(path)
        wanted = [places.get(key) for key in keys.take(pa.array(rows)).to_pylist()]
        found = _images(path, samples, np.array([p for p in wanted if p is not None], np.int64))
        missing = Unreadable(f"no image of this record in {path.name}{samples.damage or ''}")
        yield from (missing if place is None else next(found) for place in wanted)

    return _Shard(table, keys, images_of)


class _RecentHeaders:
    """The headers of a shard, by its path; a worker that it is sent to reads its own.

    Ranges are read in order: the headers of the shards they lie in are read once, and dropped.
    """

    def __init__(self, extension: str | None) -> None:
        self._extension = extension
        self._read = lru_cache(maxsize=2)(partial(_headers, extension=extension))

    def __call__(self, path: Place) -> tuple[_Samples, dict[str, int]]:
        return self._read(path)

    def __reduce__(self) -> tuple[type[_RecentHeaders], tuple[str | None]]:
        return _RecentHeaders, (self._extension,)


def _headers(path: Place, extension: str | None) -> tuple[_Samples, dict[str, int]]:
    """What lies in a tar, and which sample has which key."""
    samples = _scanned(path, extension, texts=False)
    return samples, {name: row for row, name in enumerate(samples.names.to_pylist())}


# What lies in a tar -------------------------------------------------------------------------------


@dataclass
class _Sample:
    key: str
    extensions: set[str] = field(default_factory=set)
    offset: int = -1  # of its image's bytes in the tar; -1: it has none
    size: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)  # by extension


@dataclass(frozen=True)
class _Samples:
    names: pa.Array
    offsets: Int64
    sizes: Int64
    records: list[dict[str, Any]]  # what texts and JSON say, where they were read
    errors: dict[int, str]  # row -> why it cannot be used
    damage: str | None  # what has become of the rest of the tar

    def table(self) -> pa.Table:
        names = dict.fromkeys(name for record in self.records for name in record)
        columns = {name: _column([r.get(name) for r in self.records]) for name in names}
        return pa.table({"__key__": self.names, **columns})


def _images(path: Place, samples: _Samples, rows: Int64) -> Iterator[bytes | Unreadable]:
    with path.open("rb") as file:
        for row in rows.tolist():
            if error := samples.errors.get(row):
                yield Unreadable(error)
                continue
            file.seek(samples.offsets[row])
            yield file.read(samples.sizes[row])


def _scanned(path: Place, extension: str | None, *, texts: bool) -> _Samples:
    """Read the headers of a tar once, and its texts and JSON where `texts` asks for them."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    records: list[dict[str, Any]] = []
    errors: dict[int, str] = {}
    seen: set[str] = set()
    unused: set[str] = set()
    scan = _Scan(path, extension, texts)
    for sample in scan:
        row = len(names)
        names.append(sample.key if sample.key not in seen else f"{sample.key}#{row}")
        seen.add(sample.key)
        places.append((sample.offset, sample.size))
        unused |= sample.extensions
        if sample.offset < 0:
            errors[row] = f"no image in this sample of {path.name}"
        try:
            records.append(_record(sample.texts))
        except ValueError as error:
            records.append({})
            errors[row] = f"{error} in this sample of {path.name}"
        # A sample that has what others have is whole; of a single one nobody knows.
        lacking = texts and (scan.cut or not sample.extensions >= scan.usual or not scan.usual)
        if scan.damage is not None and (lacking or sample.offset < 0):
            errors[row] = f"{path.name}{scan.damage}, in this sample"
    if scan.damage is not None:
        whole = len(names) - len(errors)
        _log.warning("%s%s; %d samples before are whole", path, scan.damage, whole)
    if names and len(errors) == len(names) and scan.damage is None:
        raise SourceError(
            f"no sample of {path} has an image; name its extension with {flag('image')}; "
            f"extensions: {', '.join(sorted(unused))}"
        )
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    return _Samples(pa.array(names, pa.string()), offsets, sizes, records, errors, scan.damage)


class _Scan:
    """Iterates over the samples of a tar; `damage` is known when the last one is given."""

    def __init__(self, path: Place, extension: str | None, texts: bool) -> None:
        self._path, self._extension, self._texts = path, extension, texts
        self.usual: set[str] = set()  # the extensions that the first sample has
        self.cut = False  # a member of the last sample is not whole
        self.damage: str | None = None

    def __iter__(self) -> Iterator[_Sample]:
        with self._path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            sample: _Sample | None = None
            for member in self._members(file, size):
                key, extension = _key_and_extension(member.name)
                if not extension:
                    continue
                if sample is None or sample.key != key or extension in sample.extensions:
                    if sample is not None:
                        self.usual = self.usual or sample.extensions
                        yield sample
                    sample = _Sample(key)
                if member.offset_data + member.size > size:
                    self.cut = True
                    break
                sample.extensions.add(extension)
                if self._is_image(extension) and sample.offset < 0:
                    sample.offset, sample.size = member.offset_data, member.size
                elif self._texts and extension in _TEXTS:
                    file.seek(member.offset_data)
                    sample.texts[extension] = file.read(member.size)
            if sample is not None:
                yield sample

    def _is_image(self, extension: str) -> bool:
        if self._extension is not None:
            return extension == self._extension
        return extension.lower() in IMAGE_EXTENSIONS

    def _members(self, file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
        """Yield the files of the tar, then put down whether it ends as it should."""
        if size < _BLOCK:
            self.damage = f" is cut short at byte {size}"
            return
        try:
            tar = tarfile.TarFile(fileobj=file, mode="r")
        except tarfile.TarError as error:
            raise SourceError(
                f"{self._path} is no uncompressed tar archive ({error}); replace it, or unpack "
                "what compresses it"
            ) from error
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps them all
                if member.offset_data + member.size > size:
                    self.damage = f" is cut short at byte {size}"
                if member.isreg() and not member.issparse():
                    yield member
        except tarfile.TarError:
            self.damage = f" is cut short at byte {size}"
            return
        file.seek(tar.offset)
        end = file.read(_BLOCK)
        if end != bytes(_BLOCK):  # a whole archive ends in blocks of zeros
            cut = len(end) < _BLOCK
            self.damage = (
                f" is cut short at byte {size}" if cut else f" is damaged at byte {tar.offset}"
            )


def _key_and_extension(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension


# What stands beside the images --------------------------------------------------------------------


def _record(texts: dict[str, bytes]) -> dict[str, Any]:
    """The columns of one sample: each text by its extension, and the fields of its JSON."""
    record: dict[str, Any] = {}
    try:
        for extension, content in texts.items():
            if extension != "json":
                record[extension] = content.decode("utf-8-sig").strip()
        fields = json.loads(texts.get("json", b"{}"))
    except UnicodeDecodeError:
        raise ValueError("text that is not UTF-8") from None
    except ValueError:
        raise ValueError("JSON that cannot be read") from None
    if not isinstance(fields, dict):
        raise ValueError("JSON that is no object")
    for name, value in fields.items():
        # Lists and objects as text: their types would have to agree over all samples.
        shown = json.dumps(value) if isinstance(value, dict | list) else value
        record[f"json.{name}" if name in record else name] = shown
    return record


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return _as_text(values)


def _as_text(values: list[Any]) -> pa.Array:
    texts = (v if v is None or isinstance(v, str) else json.dumps(v) for v in values)
    return pa.array(list(texts), pa.string())


def _fitted(tables: list[pa.Table]) -> list[pa.Table]:
    """The tables with columns as text whose types do not agree."""
    for name in dict.fromkeys(name for table in tables for name in table.column_names):
        having = [table for table in tables if name in table.column_names]
        schemas = [pa.schema([table.field(name)]) for table in having]
        try:
            pa.unify_schemas(schemas, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            tables = [
                table.set_column(
                    table.column_names.index(name), name, _as_text(table[name].to_pylist())
                )
                if name in table.column_names
                else table
                for table in tables
            ]
    return tables
