"""The work of an ingest, kept batch by batch: what was computed once is never computed again.

`job/part-NNNNN/START-STOP.arrow` holds the batch that covers these places of the selection. When a
range is whole its batches become a part of the index and the record `job/part-NNNNN.json`; the part
counts when the index's manifest lists it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headwater.index import EncodedRows, Shard, encode_items, write_part
from headwater.index.files import write_atomically

from .errors import SourceError
from .plan import Job, Span, Todo, write_job
from .tables import items_table, previews_table

_TOLD = b"headwater"  # key of what a batch's file says beside its rows


@dataclass(frozen=True)
class RangeRecord:
    """What became of a range: the contents of `job/part-NNNNN.json`."""

    shard: Shard | None  # None: nothing in it needed a new row
    ids: list[str] = field(default_factory=list)  # of the part's items, before they are told apart
    unchanged: list[int] = field(default_factory=list)  # positions of rows left as they are
    reasons: dict[str, int] = field(default_factory=dict)  # of quarantine


@dataclass(frozen=True)
class _Kept:
    """The start and end of a committed batch, and its file."""

    start: int
    stop: int
    path: Path


class Journal:
    """The kept work of one job in the folder of an index."""

    def __init__(self, folder: Path, job: Job, extra: pa.Schema) -> None:
        """`extra` are the types of the user's columns; nothing is written yet."""
        self.job = job
        self._folder = folder
        self._extra = extra
        self._begun = (folder / "job" / "job.json").exists()

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
        told = {"taken": span.after, "unchanged": span.unchanged}
        table = table.replace_schema_metadata({_TOLD: json.dumps(told)})
        path = self._folder / "job" / name / f"{span.start:012d}-{span.stop:012d}.arrow"

        def write(file: BinaryIO) -> None:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)

        write_atomically(path, write)

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
                f"{self._folder / 'job' / self.job.part(number)} holds records {start} to "
                f"{reached - 1} of {start} to {stop - 1} unbroken: a file that was written is gone "
                "or damaged; run the ingest again to compute the rest"
            )
        tables = [_read(kept.path) for kept in batches]
        told = [json.loads(table.schema.metadata[_TOLD]) for table in tables]
        filled = [table for table in tables if table.num_rows]
        unchanged = [position for batch in told for position in batch["unchanged"]]
        record = RangeRecord(None, unchanged=unchanged)
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
            record = RangeRecord(shard, ids, unchanged, dict(reasons))
        text = json.dumps(asdict(record)).encode()
        write_atomically(self._record_path(number), lambda file: file.write(text))
        self._drop(number)

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
                errors = _read(kept.path)["error"].to_pylist()
                reasons.update(reason for reason in errors if reason)
        return done, reasons

    def rest(self, number: int) -> Todo:
        """What is left of a range."""
        start, stop = self.job.span(number)
        taken = 0
        if kept := self._kept(number):
            start = kept[-1].stop
            taken = json.loads(_read(kept[-1].path).schema.metadata[_TOLD])["taken"]
        return Todo(number, start, stop, taken)

    def _kept(self, number: int) -> list[_Kept]:
        """The batches of a range from its start on, without a gap."""
        by_start: dict[int, _Kept] = {}
        for path in sorted((self._folder / "job" / self.job.part(number)).glob("*.arrow")):
            start, stop = map(int, path.stem.split("-"))
            by_start[start] = _Kept(start, stop, path)  # of several the longest comes last
        found, place = [], self.job.span(number)[0]
        while place in by_start:
            found.append(by_start[place])
            place = found[-1].stop
        return found

    def _record_path(self, number: int) -> Path:
        return self._folder / "job" / f"{self.job.part(number)}.json"

    def _drop(self, number: int) -> None:
        shutil.rmtree(self._folder / "job" / self.job.part(number), ignore_errors=True)


def _read(path: Path) -> pa.Table:
    try:
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{path} cannot be read ({reason}); add --restart to discard the unfinished ingest"
        ) from error
