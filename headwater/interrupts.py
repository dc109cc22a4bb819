"""An ingest that is cut short: how it ends, and what the user is told."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape


@contextmanager
def unfinished_told(console: Console, index: Path) -> Iterator[None]:
    """An ingest that is cut short says that it can go on; SIGTERM ends it as Ctrl-C does."""
    from .index import IndexStoreError
    from .ingest import SourceError, read_job

    def stop(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except (IndexStoreError, SourceError):  # about what was asked: they say it themselves
        raise
    except BaseException:
        if read_job(index) is not None:
            console.print(
                f"[bold yellow]unfinished:[/] what was computed is kept in {escape(str(index))}; "
                "the same command goes on with it"
            )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
