"""The error of this room: something about the model or the recipe that its user can mend."""

from __future__ import annotations


class ModelError(ValueError):
    """A model folder, parameter selection or recipe that cannot be used; the message says why."""
