"""Input ahead of the device: the order is the source's, memory is bounded, errors name the item."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from conftest import png

from headwater.attribution import decode, fit
from headwater.ingest import SourceError, fingerprints, prepare, thumbnail
from headwater.ingest.plan import Chunk, Span
from headwater.ingest.prepare import PreparedBatch, prepare_batch, prepared_batches
from headwater.ingest.sources import SourceItem

SIZE = (8, 8)


def item(number: int, data: bytes | None = None, error: str | None = None) -> SourceItem:
    if data is None and error is None:
        data = png(number)
    return SourceItem(
        key=f"k{number}", item_id=f"i{number}", uri=f"#{number}", data=data, caption="",
        licence=None, rights_holder=None, source=None, extra={"place": number}, error=error,
    )  # fmt: skip


def hears(_: str) -> None:
    """A model that hears every caption."""


def cut(items: Iterable[SourceItem], batch_size: int) -> Iterator[Chunk]:
    stream, start = iter(items), 0
    while part := list(islice(stream, batch_size)):
        yield Chunk(Span(0, start, start + len(part), start, start + len(part)), part)
        start += len(part)


def ids(batch: PreparedBatch) -> list[str]:
    return [columns["item_id"] for columns in batch.columns]


def test_a_batch_holds_what_the_item_by_item_loop_gives() -> None:
    items = [item(0), item(1, b"no picture"), item(2, error="no such file"), item(3)]
    batch = prepare_batch(*cut(items, 9), SIZE)
    assert batch.usable == [0, 3]
    assert batch.keys == ["k0", "k1", "k2", "k3"]
    assert batch.bytes_read == sum(len(i.data) for i in items if i.data is not None)
    for place, position in enumerate(batch.usable):
        data = items[position].data
        assert data is not None
        image, columns = decode(data), batch.columns[position]
        assert np.array_equal(batch.pixels[place], fit(image, SIZE))
        assert (columns["sha256"], columns["phash"]) == fingerprints(data, image)
        assert (columns["width"], columns["height"]) == image.size
        assert batch.previews[position] == thumbnail(image)
        assert (columns["status"], columns["error"]) == ("ok", None)
    assert [batch.columns[i]["status"] for i in (1, 2)] == ["quarantined"] * 2
    assert batch.columns[2]["error"] == "no such file"
    assert [batch.previews[i] for i in (1, 2)] == [None, None]
    assert prepare_batch(*cut(items[1:3], 9), SIZE).pixels.shape == (0, 8, 8, 3)


def test_batches_keep_the_order_and_say_which_records_they_are() -> None:
    pieces = list(cut(map(item, range(25)), 4))
    with prepared_batches(pieces, SIZE, refuses=hears, processes=False) as batches:
        found = list(batches)
    assert [batch.span for batch in found] == [piece.span for piece in pieces]
    assert [name for batch in found for name in ids(batch)] == [f"i{n}" for n in range(25)]


def test_captions_that_the_model_cannot_hear_are_put_down() -> None:
    def refuses(caption: str) -> str | None:
        return f"no class {caption!r}" if caption == "unicorn" else None

    items = [replace(item(n), caption="unicorn" if n == 1 else "cat") for n in range(3)]
    items[2] = replace(items[2], data=None, error="no such file", caption="unicorn")
    with prepared_batches(cut(items, 4), SIZE, refuses=refuses, processes=False) as batches:
        (batch,) = batches
    assert batch.usable == [0]
    reasons = [columns["error"] for columns in batch.columns]
    assert reasons == [None, "no class 'unicorn'", "no such file"]


def test_processes_prepare_what_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "PREPARERS", 2)
    items = [item(n, b"" if n == 5 else None) for n in range(23)]
    found: dict[bool, Any] = {}
    for processes in (False, True):
        with prepared_batches(cut(items, 4), SIZE, refuses=hears, processes=processes) as batches:
            found[processes] = list(batches)
    for mine, theirs in zip(found[False], found[True], strict=True):
        assert (mine.columns, mine.previews, mine.usable, mine.bytes_read) == (
            theirs.columns, theirs.previews, theirs.usable, theirs.bytes_read,
        )  # fmt: skip
        assert np.array_equal(mine.pixels, theirs.pixels)


def test_reading_runs_ahead_but_only_a_few_batches() -> None:
    read = []

    def source() -> Iterator[SourceItem]:
        for number in range(1000):
            read.append(number)
            yield item(number)

    with prepared_batches(cut(source(), 2), SIZE, refuses=hears, processes=False) as batches:
        next(batches)
        time.sleep(0.5)  # whatever would run away has run away by now
        assert len(read) <= 2 * (prepare.PREPARERS + 6)
        list(islice(batches, 20))
        time.sleep(0.5)
        assert len(read) <= 40 + 2 * (prepare.PREPARERS + 6)


def test_the_next_batch_is_prepared_while_the_last_one_is_used() -> None:
    prepared = threading.Event()

    def source() -> Iterator[SourceItem]:
        for number in range(40):
            if number == 4:
                prepared.set()
            yield item(number)

    with prepared_batches(cut(source(), 2), SIZE, refuses=hears, processes=False) as batches:
        next(batches)
        assert prepared.wait(10)  # nobody asked for a second batch


@pytest.mark.parametrize("at", [0, 17])
def test_an_unforeseen_error_names_the_item(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    honest = prepare.thumbnail

    def broken(image: Any) -> bytes:
        if image.getpixel((0, 0)) == decode(png(at)).getpixel((0, 0)):
            raise RuntimeError("out of ink")
        return honest(image)

    monkeypatch.setattr(prepare, "thumbnail", broken)
    with (
        pytest.raises(SourceError, match=f"'i{at}' .#{at}. cannot be prepared: .*out of ink"),
        prepared_batches(
            cut(map(item, range(30)), 4), SIZE, refuses=hears, processes=False
        ) as batches,
    ):
        list(batches)


def test_an_error_of_the_source_reaches_the_reader() -> None:
    def source() -> Iterator[SourceItem]:
        yield from map(item, range(9))
        raise SourceError("the file ends here")

    taken = []
    with (
        pytest.raises(SourceError, match="ends here"),
        prepared_batches(cut(source(), 4), SIZE, refuses=hears, processes=False) as batches,
    ):
        taken += batches
    assert len(taken) <= 2


def test_no_thread_outlives_the_context() -> None:
    before = set(threading.enumerate())

    def interrupted() -> None:
        with prepared_batches(
            cut(map(item, range(1000)), 2), SIZE, refuses=hears, processes=False
        ) as batches:
            next(batches)
            assert not set(threading.enumerate()) <= before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(threading.enumerate()) <= before
