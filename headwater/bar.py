"""The progress bar of an ingest: rate, time left, bytes read, quarantined items."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:  # the ingest imports torch, which takes seconds
    from .ingest import Progress, ProgressCallback

RECENT_SECONDS = 30.0  # the first batches, with their warm-up, are soon forgotten


@contextmanager
def ingest_bar(console: Console, quiet: bool) -> Iterator[ProgressCallback | None]:
    """A bar on `console`, and what to give `build_index` as `progress`; none when `quiet`."""
    if quiet:
        yield None
        return
    columns: list[ProgressColumn] = [
        TextColumn("ingest"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    ]
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None)
        recent: deque[Progress] = deque()

        def advance(progress: Progress) -> None:
            words = status(recent, progress)
            bar.update(task, completed=progress.done, total=progress.total, description=words)

        yield advance


def status(recent: deque[Progress], progress: Progress) -> str:
    """The words beside the bar; `recent` holds the states of the last RECENT_SECONDS."""
    recent.append(progress)
    while len(recent) > 2 and recent[1].elapsed <= progress.elapsed - RECENT_SECONDS:
        recent.popleft()
    oldest = recent[0]
    items, seconds = progress.done - oldest.done, progress.elapsed - oldest.elapsed
    if not items:  # the first batch: all there is to go by
        items, seconds = progress.done - progress.resumed, progress.elapsed
    rate = max(items, 1) / max(seconds, 1e-9)
    left = duration((progress.total - progress.done) / rate)
    return (
        f"{rate:.1f} img/s, {left} left, {amount(progress.bytes_read)} read, "
        f"{progress.quarantined:,} quarantined"
    )


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def amount(size: int) -> str:
    """Bytes in the unit that suits them: 1.7 GB."""
    return decimal(size)
