"""What can go wrong in an ingest and its user can mend."""

from __future__ import annotations


class SourceError(ValueError):
    """A mistake about a corpus that its user can mend; names file, column and remedy."""


class DeviceError(ValueError):
    """A device, or a process that works beside it, cannot go on; names it and the remedy."""
