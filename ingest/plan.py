"""What an ingest was asked, in which ranges it proceeds, and what of them is still to do.

The selected records are cut into ranges of SHARD_ITEMS places, and range k becomes part
`first_part` + k, whatever the batches: so a job that was cut short ends in the bytes of one that
was not, and any worker can do any range.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from headwater.attribution import differences
from headwater.index import JOB_FILE, part_name
from headwater.index.files import write_atomically

from .errors import SourceError
from .signature import difference
from .sources import Source, SourceItem

SHARD_ITEMS = 2048  # records of a range: about 16 MB of rows at 4096 dimensions


@dataclass(frozen=True)
class Job:
    """The contents of `job/job.json`: everything that the rows of an ingest depend on."""

    id: str  # random: what a lost worker of another job writes late is not taken for this one's
    label: str  # the source as given, for messages
    signature: Mapping[str, Any]  # what the source was; see `Source.signature`
    where: str | None
    limit: int | None
    id_prefix: str
    space: Mapping[str, Any]  # feature space: recipe and model
    execution: Mapping[str, Any]
    device: str  # its kind: rows of a GPU and of a processor differ in rounding
    width: int  # pictures in every pass
    items: int  # selected records
    range_items: int
    first_part: int
    spoilt: str | None = None  # how the source changed while it was read: any row may be of either

    @property
    def ranges(self) -> int:
        """How many ranges there are."""
        return -(-self.items // self.range_items)

    def part(self, number: int) -> str:
        """The name of the part that a range becomes."""
        return part_name(self.first_part + number)

    def span(self, number: int) -> tuple[int, int]:
        """The places of a range in the selection: first, one past the last."""
        start = number * self.range_items
        return start, min(start + self.range_items, self.items)


@dataclass(frozen=True)
class Todo:
    """What is left of a range."""

    number: int  # of the range
    start: int  # place in the selection
    stop: int
    taken: int = 0  # items of the range that were taken before `start`


@dataclass(frozen=True)
class Span:
    """Which records a batch stands for."""

    number: int  # of the range
    start: int
    stop: int
    taken: int  # items of the range that were taken before it
    after: int  # and with it
    unchanged: tuple[int, ...] = ()  # positions in the index of records left as they are
    # Of these: {id: why not} where the record is unusable now, so that its older row stays.
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one range; `items` are those that need a row."""

    span: Span
    items: list[SourceItem]


Unchanged = Callable[[SourceItem], int | None]


def chunks(
    source: Source,
    todo: Iterable[Todo],
    batch_size: int,
    unchanged: Unchanged,
    id_prefix: str = "",
) -> Iterator[Chunk]:
    """Read what is to be done and cut it where a multiple of `batch_size` items of a range ends.

    `unchanged` gives the position of a record's row in the index if it can stay as it is.
    """
    for run in _runs(todo):
        read = source.part(run[0].start, run[-1].stop)  # a row group is read once
        items = (replace(item, item_id=id_prefix + item.item_id) for item in read)
        for part in run:
            yield from _cut(part, islice(items, part.stop - part.start), batch_size, unchanged)


def _runs(todo: Iterable[Todo]) -> Iterator[list[Todo]]:
    run: list[Todo] = []
    for part in todo:
        if run and run[-1].stop != part.start:
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _cut(
    part: Todo, items: Iterable[SourceItem], batch_size: int, unchanged: Unchanged
) -> Iterator[Chunk]:
    start, taken = part.start, part.taken
    kept: list[SourceItem] = []
    held: list[int] = []
    for place, item in enumerate(items, start=part.start):
        position = unchanged(item)
        if position is not None:
            held.append(position)
            continue
        kept.append(item)
        after = taken + len(kept)
        if after % batch_size == 0:
            yield Chunk(Span(part.number, start, place + 1, taken, after, tuple(held)), kept)
            start, taken, kept, held = place + 1, after, [], []
    if start < part.stop:
        after = taken + len(kept)
        yield Chunk(Span(part.number, start, part.stop, taken, after, tuple(held)), kept)


def everything(source: Source) -> list[Todo]:
    """All records of a source as one range."""
    return [Todo(0, 0, len(source))]


# job.json -----------------------------------------------------------------------------------------


def read_job(folder: Path) -> Job | None:
    """The job in the folder of an index, if one runs there or was cut short."""
    path = folder / JOB_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return None if content == {"first_part": -1} else Job(**content)  # -1: discarded
    except (TypeError, ValueError) as error:
        raise SourceError(
            f"{path} cannot be read ({error}); add --restart to discard the unfinished ingest"
        ) from error


def write_job(folder: Path, job: Job) -> None:
    """Note the job, before its first batch is kept."""
    text = json.dumps(asdict(job), indent=1, sort_keys=True, allow_nan=False).encode()
    write_atomically(folder / JOB_FILE, lambda file: file.write(text))


def check_same(folder: Path, begun: Job, asked: Job) -> None:
    """Refuse to go on with a job under another name.

    Raises:
        SourceError: names what differs from the job that was begun.
    """
    if begun.spoilt is not None:
        raise SourceError(
            f"the source {begun.label} changed while it was ingested into {folder}: "
            f"{begun.spoilt}; add --restart to begin anew"
        )
    if reason := _difference(begun, asked):
        raise SourceError(
            f"the unfinished ingest into {folder} was begun otherwise: {reason}; "
            "run it as it was begun, or add --restart to discard it and begin anew"
        )


def _difference(begun: Job, asked: Job) -> str | None:
    for name in ("where", "limit", "id_prefix"):
        before, now = getattr(begun, name), getattr(asked, name)
        if before != now:
            return f"--{name.replace('_', '-')} was {before!r}, is {now!r}"
    if found := differences(asked.space, begun.space):
        return f"another feature space, different: {', '.join(found)}"
    if reason := difference(dict(begun.signature), dict(asked.signature)):
        return f"the source {begun.label} has changed: {reason}"
    if begun.device != asked.device:
        return f"the device was {begun.device}, is {asked.device}"
    for name, before in begun.execution.items():
        if before != asked.execution.get(name):
            return f"{name} was {before}, is {asked.execution.get(name)}"
    return None
