"""The error of this room: a question that cannot be asked of this index with this model."""

from __future__ import annotations


class QueryError(ValueError):
    """A question that has no answer as asked; the message says why and what to do."""
