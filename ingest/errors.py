"""The one exception of the sources."""

from __future__ import annotations


class SourceError(ValueError):
    """A mistake about a corpus that its user can mend; names file, column and remedy."""
