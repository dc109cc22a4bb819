"""The work of an ingest, kept batch by batch: what was computed once is never computed again.

`job/part-NNNNN/START-STOP-JOB-SHA256.arrow` holds the batch that covers these places of the
selection. One of another job is ignored; one whose bytes have another hash counts as lost and is
computed again. When a range is whole its batches become a part of the index and the record
`job/part-NNNNN.json`; the part counts when the index's manifest lists it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headwater.index import EncodedRows, Shard, encode_items, write_part
from headwater.index.files import sha256_of, write_atomically

from .errors import SourceError
from .plan import Job, Span, Todo, write_job
from .tables import items_table, previews_table

_TOLD = b"headwater"  # key of what a batch's file says beside its rows
_BATCH = re.compile(r"(\d{12,})-(\d{12,})-([0-9a-f]+)-([0-9a-f]{64})\.arrow")


@dataclass(frozen=True)
class RangeRecord:
    """What became of a range: the contents of `job/part-NNNNN.json`."""

    shard: Shard | None  # None: nothing in it needed a new row
    ids: list[str] = field(default_factory=list)  # of the part's items, before they are told apart
    unchanged: list[int] = field(default_factory=list)  # positions of rows left as they are
    reasons: dict[str, int] = field(default_factory=dict)  # of quarantine
    kept: dict[str, str] = field(default_factory=dict)  # of unchanged; see `Span.kept`
    renamed: dict[str, str] = field(default_factory=dict)  # {file: sha256} with its final ids


@dataclass(frozen=True)
class _Kept:
    """The start and end of a committed batch, and what it holds."""

    start: int
    stop: int
    table: pa.Table

    @property
    def told(self) -> dict[str, Any]:
        """What it says beside its rows."""
        told: dict[str, Any] = json.loads(self.table.schema.metadata[_TOLD])
        return told


class Journal:
    """The kept work of one job in the folder of an index."""

    def __init__(self, folder: Path, job: Job, extra: pa.Schema, *, begun: bool = False) -> None:
        """`extra` are the types of the user's columns; nothing is written yet.

        `begun`: the job is noted by another process; if it is no longer, nothing can be kept.
        """
        self.job = job
        self._folder = folder
        self._extra = extra
        self._begun = begun or (folder / "job" / "job.json").exists()

    def todo(self) -> list[Todo]:
        """What is left of each range, in order; ranges that are whole but for merging too."""
        return [
            self.rest(number)
            for number in range(self.job.ranges)
            if not self._record_path(number).exists()
        ]

    def begin(self) -> None:
        """Note the job in the folder, where that is not done yet."""
        if not self._begun:
            write_job(self._folder, self.job)
            self._begun = True

    def commit(
        self,
        span: Span,
        rows: npt.NDArray[np.float32],
        columns: Sequence[dict[str, Any]],
        previews: Sequence[bytes | None],
    ) -> None:
        """Keep a batch; when this returns, it is on the disk.

        Args:
            span: the records it stands for.
            rows: [n, dim] raw features.
            columns: item columns, n.
            previews: n, None where there is none.
        """
        self.begin()
        name = self.job.part(span.number)
        table = items_table(columns, self._extra)
        if columns:
            encoded = encode_items(name, table, rows, rows.shape[1])
            units = pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(2 * rows.shape[1]), len(rows), [None, pa.py_buffer(encoded.units)]
            )
            # Found again by their place at the end: a user's column may have any name.
            table = encoded.items.append_column("unit", units)
            table = table.append_column("preview", pa.array(previews, pa.binary()))
        told = {"taken": span.after, "unchanged": span.unchanged, "kept": dict(span.kept)}
        table = table.replace_schema_metadata({_TOLD: json.dumps(told)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        digest = hashlib.sha256(content).hexdigest()
        folder = self._folder / "job" / name
        try:
            folder.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise SourceError(
                f"{folder.parent} is gone: the ingest was ended or discarded meanwhile"
            ) from None
        path = folder / f"{span.start:012d}-{span.stop:012d}-{self.job.id}-{digest}.arrow"
        write_atomically(path, lambda file: file.write(content))

    def merge(self, number: int) -> None:
        """Make a range that is whole a part of the index, and forget its batches.

        Raises:
            SourceError: batches of it are gone or damaged; what is left of them stays.
        """
        batches = self._kept(number)
        start, stop = self.job.span(number)
        reached = batches[-1].stop if batches else start
        if reached != stop:
            raise SourceError(
                f"{self._folder / 'job' / self.job.part(number)} lacks records from {reached} on "
                f"(of {start} to {stop - 1}): a file that was written is gone or damaged; run the "
                "ingest again to compute the rest"
            )
        filled = [kept.table for kept in batches if kept.table.num_rows]
        unchanged = [position for kept in batches for position in kept.told["unchanged"]]
        stays = {name: reason for batch in batches for name, reason in batch.told["kept"].items()}
        record = RangeRecord(None, unchanged=unchanged, kept=stays)
        if filled:
            name = self.job.part(number)
            table = pa.concat_tables([part.replace_schema_metadata(None) for part in filled])
            ids = table["item_id"].to_pylist()
            columns = table.num_columns - 2
            units = np.frombuffer(b"".join(table.column(columns).to_pylist()), np.float16)
            encoded = EncodedRows(table.select(range(columns)), units.reshape(len(ids), -1))
            thumbs = previews_table(ids, table.column(columns + 1).to_pylist())
            shard = write_part(self._folder, name, encoded, thumbs)
            reasons = Counter(reason for reason in table["error"].to_pylist() if reason)
            record = RangeRecord(shard, ids, unchanged, dict(reasons), stays)
        self._write(number, record)
        self._drop(number)

    def note_renamed(self, number: int, renamed: dict[str, str]) -> None:
        """Note the hashes that a part's files get with its final ids, before they are written."""
        self._write(number, replace(self.record(number), renamed=renamed))

    def check_part(self, number: int) -> None:
        """Hash the files of a merged range.

        Raises:
            SourceError: one is gone or damaged; the range is then forgotten, to be computed again.
        """
        record = self.record(number)
        for path, digest in record.shard.files.items() if record.shard is not None else ():
            file = self._folder / path
            if not file.is_file() or sha256_of(file) not in (digest, record.renamed.get(path)):
                self._record_path(number).unlink()
                raise SourceError(
                    f"{file} is gone or damaged since it was written; run the ingest again to "
                    "compute its items anew"
                )

    def record(self, number: int) -> RangeRecord:
        """What became of a merged range."""
        content = json.loads(self._record_path(number).read_bytes())
        shard = content.pop("shard")
        return RangeRecord(None if shard is None else Shard(**shard), **content)

    def tidy(self) -> None:
        """Remove batches of ranges that were merged just before a crash."""
        for number in range(self.job.ranges):
            if self._record_path(number).exists():
                self._drop(number)

    def progress(self) -> tuple[int, Counter[str]]:
        """How many records are done, and why items of theirs are in quarantine."""
        done, reasons = 0, Counter[str]()
        for number in range(self.job.ranges):
            first, stop = self.job.span(number)
            if self._record_path(number).exists():
                done += stop - first
                reasons.update(self.record(number).reasons)
                continue
            for kept in self._kept(number):
                done += kept.stop - kept.start
                errors = kept.table["error"].to_pylist()
                reasons.update(reason for reason in errors if reason)
        return done, reasons

    def rest(self, number: int) -> Todo:
        """What is left of a range."""
        start, stop = self.job.span(number)
        taken = 0
        if kept := self._kept(number):
            start = kept[-1].stop
            taken = kept[-1].told["taken"]
        return Todo(number, start, stop, taken)

    def _kept(self, number: int) -> list[_Kept]:
        """The batches of a range from its start on, without a gap."""
        by_start: dict[int, list[tuple[int, Path, str]]] = {}
        for path in sorted((self._folder / "job" / self.job.part(number)).glob("*.arrow")):
            name = _BATCH.fullmatch(path.name)
            if name is not None and name[3] == self.job.id:
                by_start.setdefault(int(name[1]), []).append((int(name[2]), path, name[4]))
        found, place = [], self.job.span(number)[0]
        while place in by_start:
            for stop, path, digest in reversed(by_start[place]):  # of several the longest
                if (table := _read(path, digest)) is not None:
                    found.append(_Kept(place, stop, table))
                    place = stop
                    break
            else:
                break
        return found

    def _write(self, number: int, record: RangeRecord) -> None:
        text = json.dumps(asdict(record)).encode()
        write_atomically(self._record_path(number), lambda file: file.write(text))

    def _record_path(self, number: int) -> Path:
        return self._folder / "job" / f"{self.job.part(number)}.json"

    def _drop(self, number: int) -> None:
        shutil.rmtree(self._folder / "job" / self.job.part(number), ignore_errors=True)


def _read(path: Path, digest: str) -> pa.Table | None:
    """A batch; None if its bytes are not those that were written, or cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content).hexdigest() != digest:
        return None
    return pa.ipc.open_file(content).read_all()
