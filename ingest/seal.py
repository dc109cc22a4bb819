"""The end of an ingest: unique ids, replaced rows deleted, curvature, duplicates, one commit."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headwater.index import (
    DuplicateCounts,
    IndexWriter,
    Outlier,
    Shard,
    StoredIndex,
    duplicate_counts,
    norm_outliers,
    part_files,
    save_table,
)
from headwater.index.files import sha256_of, write_atomically

from .errors import SourceError
from .held import Held
from .journal import Journal, RangeRecord
from .spectrum import curvature_arrays


@dataclass(frozen=True)
class Sealed:
    """What a job changed."""

    written: int  # items with a new row, quarantined ones included
    reasons: Counter[str]  # of quarantine
    replaced: tuple[str, ...]  # ids whose older row is deleted
    unchanged: int  # records that were left as they are
    kept: dict[str, str]  # {id: reason} of these whose record is unusable now
    outliers: tuple[Outlier, ...]  # of the index, by gradient norm
    duplicates: DuplicateCounts | None  # of the index; None: not looked for


def seal(
    writer: IndexWriter,
    before: StoredIndex | None,
    journal: Journal,
    details: Mapping[str, Any],
    *,
    content_keyed: bool,
) -> Sealed:
    """Let a job whose ranges are all merged count, and remove its folder.

    Args:
        writer: holds the lock.
        before: the index as it was; None for a new one.
        details: how the ingest was run, for the ledger.
        content_keyed: `Source.content_keyed` of its source.

    Raises:
        SourceError: no image of the source is usable; the job is then discarded. Or what was kept
            is not all that was to be done; the job stays.
    """
    job, folder = journal.job, writer.folder
    records = [journal.record(number) for number in range(job.ranges)]
    for number, record in enumerate(records):
        journal.check_part(number)
        first, stop = job.span(number)
        if (accounted := len(record.ids) + len(record.unchanged)) != stop - first:
            raise SourceError(
                f"job/{job.part(number)}.json in {folder} accounts for {accounted} of "
                f"{stop - first} records; add --restart to discard the unfinished ingest"
            )
    reasons = Counter[str]()
    for record in records:
        reasons.update(record.reasons)
    written = sum(len(record.ids) for record in records)
    unchanged = sum(len(record.unchanged) for record in records)
    kept = {name: reason for record in records for name, reason in record.kept.items()}
    if written == reasons.total() and not unchanged:
        writer.discard_job()
        reason, count = reasons.most_common(1)[0]
        raise SourceError(
            f"no usable image in {job.label}: {written} items, "
            f"of which {count} with: {reason}; check the image column and the files"
        )
    ids, replaced = _final_ids(records, Held(before, content_keyed=content_keyed))
    shards = [
        shard
        for number, final in enumerate(ids)
        if (shard := _renamed(journal, folder, number, final)) is not None
    ]
    told = dict(details) | {
        "source": job.label, "written": written, "unchanged": unchanged, "replaced": [*replaced],
        "kept": kept,
    }  # fmt: skip
    if shards:
        writer.add_parts(shards, job.first_part + job.ranges)
        if before is not None and replaced:
            gone = np.array(sorted(replaced.values()), np.int64)
            writer.write_tombstones(np.union1d(before.deleted_positions, gone))
        writer.write_curvature(curvature_arrays(StoredIndex(folder, writer.manifest), before))
        writer.write_duplicates()
        writer.finish(told)
    else:
        writer.note("ingest", told)
        writer.discard_job()
    after = StoredIndex(folder, writer.manifest)
    found = after.duplicates()
    return Sealed(
        written,
        reasons,
        tuple(replaced),
        unchanged,
        kept,
        _outliers(after),
        None if found is None else duplicate_counts(found),
    )


def _final_ids(records: list[RangeRecord], held: Held) -> tuple[list[list[str]], dict[str, int]]:
    """The ids of every part, each once in the index, and {id: position} of the rows they replace.

    The first item with an id has it; a further one, equal in content, gets "~2", "~3" in order of
    position, but no id that a record gave. An id of the index is taken over from its row, unless a
    record said that this row stays. Where ids are made from content none is taken over: that row
    has the same image and caption, and what is carried along with it may be of another corpus.
    """
    staying = {position for record in records for position in record.unchanged}
    given = {item_id for record in records for item_id in record.ids}
    used: set[str] = set()
    following: dict[str, int] = {}
    replaced: dict[str, int] = {}
    found = []
    for record in records:
        final = []
        for wanted in record.ids:
            candidate, number = wanted, following.get(wanted, 1)
            while (
                candidate in used
                or (position := held.position(candidate)) in staying
                or (held.content_keyed and position is not None)
                or (candidate != wanted and candidate in given)
            ):
                number += 1
                candidate = f"{wanted}~{number}"
            following[wanted] = number
            used.add(candidate)
            if (position := held.position(candidate)) is not None:
                replaced[candidate] = position
            final.append(candidate)
        found.append(final)
    return found, replaced


def _renamed(journal: Journal, folder: Path, number: int, final: list[str]) -> Shard | None:
    """The part of a range with its final ids; done again after a crash, it gives the same files."""
    record = journal.record(number)
    shard = record.shard
    if shard is None or record.ids == final:
        return shard
    _, items_path, thumbs_path = part_files(shard.name)
    written: dict[str, bytes] = {}
    for path in (items_path, thumbs_path):
        if sha256_of(folder / path) != shard.files[path]:
            continue  # it has its final ids since an attempt that was cut short
        table = pq.read_table(folder / path)
        names = final
        if path == thumbs_path:  # the items with a preview, in their order
            shown = iter(zip(record.ids, final, strict=True))
            known = table["item_id"].to_pylist()
            names = [next(new for old, new in shown if old == name) for name in known]
        place = table.column_names.index("item_id")
        file = io.BytesIO()
        save_table(table.set_column(place, "item_id", pa.array(names, pa.string())), file)
        written[path] = file.getvalue()
    renamed = record.renamed | {
        path: hashlib.sha256(content).hexdigest() for path, content in written.items()
    }
    if renamed != record.renamed:
        journal.note_renamed(number, renamed)
    for path, content in written.items():
        write_atomically(folder / path, partial(_put, content))
    return replace(shard, files=dict(shard.files) | renamed)


def _put(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _outliers(index: StoredIndex) -> tuple[Outlier, ...]:
    items = index.items(["item_id", "status", "gradient_norm"])
    return tuple(norm_outliers(items.take(pa.array(index.live_positions))))
