"""How far an ingest has come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The state of an ingest after a batch."""

    done: int  # items
    total: int  # items
    quarantined: int  # of those done
    bytes_read: int  # encoded images, as they lie in the source
    elapsed: float  # seconds since the first batch was asked for
    resumed: int = 0  # of the items done, those that an earlier run had done


ProgressCallback = Callable[[Progress], None]
