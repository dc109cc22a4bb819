"""The one exception of this room."""

from __future__ import annotations


class IndexStoreError(ValueError):
    """A mistake about an index that its user can mend; the message names file, value and remedy."""
