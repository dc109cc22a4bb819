"""Some consecutive shards of an index, read as an index of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from .manifest import Manifest
from .reader import Int64, StoredIndex


class Excerpt(StoredIndex):
    """The shards `start` to `stop` - 1 of an index; positions count from the first of their rows.

    Position p of the excerpt is position `first_row` + p of the index. Curvature is that of the
    whole index. Only these shards' items and rows are read.
    """

    def __init__(self, folder: Path, manifest: Manifest, start: int, stop: int) -> None:
        """Look at shards of the index in `folder`, which has this manifest."""
        shards = manifest.shards[start:stop]
        rows = sum(shard.items for shard in shards)
        quarantined = sum(shard.quarantined for shard in shards)
        self.first_row = sum(shard.items for shard in manifest.shards[:start])
        self._whole = StoredIndex(folder, manifest)
        super().__init__(
            folder, replace(manifest, shards=shards, rows=rows, quarantined=quarantined)
        )

    @cached_property
    def deleted_positions(self) -> Int64:
        """Ascending positions, in the excerpt, of its deleted items."""
        deleted = self._whole.deleted_positions - self.first_row
        return deleted[(deleted >= 0) & (deleted < self.manifest.rows)]

    @property
    def caches(self) -> str:
        """Excerpts are cut in many ways: each has accelerators of its own."""
        first, last = self.manifest.shards[0], self.manifest.shards[-1]
        return f"{first.name}-{last.number}"


def split_shards(manifest: Manifest, parts: int) -> list[tuple[int, int]]:
    """Return (start, stop) of at most `parts` runs of shards with about as many rows each.

    Every shard is in one of them and none is empty.
    """
    sizes = np.array([shard.items for shard in manifest.shards])
    middles = np.cumsum(sizes) - sizes / 2
    homes = middles * parts // manifest.rows
    cuts = (np.flatnonzero(np.diff(homes)) + 1).tolist()
    return list(pairwise([0, *cuts, len(sizes)]))
