"""What can go wrong in this room and its user can mend."""

from __future__ import annotations


class IndexStoreError(ValueError):
    """A mistake about an index that its user can mend; the message names file, value and remedy."""


class ClusterError(ValueError):
    """A Ray cluster that is not there, has no room or lost what it computed; names the remedy."""
