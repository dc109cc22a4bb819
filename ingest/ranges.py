"""Ranges of a source computed and kept: what a process does alone, and each worker of a cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .devices import BatchRows, Devices, Pictures
from .held import Held
from .journal import Journal
from .plan import Span, Todo, chunks
from .prepare import PreparedBatch, prepared_batches
from .sources import Source
from .tables import joined


@dataclass(frozen=True)
class Done:
    """A batch that is kept."""

    span: Span
    reasons: Sequence[str]  # of its quarantined items
    bytes_read: int  # of encoded images


class Workers(Protocol):
    """Who computes the ranges of an ingest."""

    @property
    def devices(self) -> Sequence[str]:
        """What they compute on, for the ledger."""

    def batch_size(self) -> int:
        """The batch size that suits their memory."""

    def run(
        self, journal: Journal, todo: Sequence[Todo], batch_size: int
    ) -> Generator[Done, None, None]:
        """Compute and keep what is left of these ranges; tells of every batch that is kept.

        The batches of one range come in order, to its end.
        """


class Worker:
    """This process, with its devices: all of a local ingest, one of many on a cluster."""

    def __init__(
        self, source: Source, devices: Devices, held: Held, names: Sequence[str] = ()
    ) -> None:
        self._source = source
        self._ready = devices
        self._held = held
        self.devices = names

    def batch_size(self) -> int:
        """The batch size that suits the memory of the (first) device."""
        return self._ready.batch_size()

    def run(
        self, journal: Journal, todo: Sequence[Todo], batch_size: int
    ) -> Generator[Done, None, None]:
        """Compute and keep what is left of these ranges, in order, without a pause between them."""
        model = self._ready.engine.model
        with prepared_batches(
            chunks(self._source, todo, batch_size, self._held.unchanged, journal.job.id_prefix),
            model.image_size,
            refuses=model.refuses,
            processes=self._ready.image_processes,
        ) as batches:
            for batch, found in computed(batches, self._ready, journal.job.width):
                reasons = self._keep(batch, found, journal)
                yield Done(batch.span, reasons, batch.bytes_read)

    def _keep(self, batch: PreparedBatch, found: BatchRows, journal: Journal) -> list[str]:
        """Journal a batch without what the index holds already; the reasons of quarantine.

        A record that is unusable now takes no usable row away.
        """
        rows, columns = joined(batch, found)
        staying: dict[int, int] = {}  # {place in the batch: position in the index}
        kept: dict[str, str] = {}
        for place, known in enumerate(columns):
            if (position := self._held.still_quarantined(known)) is not None:
                staying[place] = position
            elif (
                known["error"] and (position := self._held.searchable(known["item_id"])) is not None
            ):
                staying[place] = position
                kept[known["item_id"]] = known["error"]
        new = [place for place in range(len(columns)) if place not in staying]
        unchanged = (*batch.span.unchanged, *staying.values())
        span = replace(batch.span, unchanged=unchanged, kept=kept)
        columns = [columns[place] for place in new]
        journal.commit(span, rows[new], columns, [batch.previews[place] for place in new])
        return [known["error"] for known in columns if known["error"]]


def computed(
    batches: Iterator[PreparedBatch], devices: Devices, width: int
) -> Iterator[tuple[PreparedBatch, BatchRows]]:
    """Every batch with its rows, in order; the devices take the next ones meanwhile."""
    conditional = devices.engine.model.conditional
    under_way: deque[PreparedBatch] = deque()

    def pictures() -> Iterator[Pictures]:
        for batch in batches:
            under_way.append(batch)
            chosen = [batch.columns[position] for position in batch.usable]
            captions = [columns["caption"] if conditional else "" for columns in chosen]
            keys = [batch.keys[position] for position in batch.usable]
            places = [batch.span.taken + position for position in batch.usable]
            yield Pictures(batch.pixels, captions, keys, places, width)

    for found in devices.rows(pictures()):
        yield under_way.popleft(), found
