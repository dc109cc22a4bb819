"""What a run has measured so far, table by table, so that a run that is broken off goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


class Parts:
    """Tables by key, each a Parquet file that has its name when it is whole.

    Without a folder nothing is kept and nothing is there.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._results: list[pa.Table] = []
        self._watch: Callable[[pa.Table], object] | None = None

    def __len__(self) -> int:
        return 0 if self.folder is None else len(list(self.folder.glob("*.parquet")))

    def done(self, *key: object) -> pa.Table | None:
        """The table that was kept by this key."""
        if self.folder is None or not (path := self.folder / _name(key)).is_file():
            return None
        return pq.read_table(path)

    def keep(self, table: pa.Table, *key: object) -> None:
        """Write the table, whole or not at all."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _name(key)
        pq.write_table(table, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)

    def once(self, make: Callable[[], pa.Table], *key: object) -> pa.Table:
        """A result that is there by this key, or else what `make` gives, which is kept."""
        table, made = self.done(*key), False
        if table is None:
            table, made = make(), True
            self.keep(table, *key)
        if self._watch is not None:
            self._results.append(table)
            if made:
                self._watch(pa.concat_tables(self._results))
        return table

    def watch(self, see: Callable[[pa.Table], object]) -> None:
        """Have all results so far seen after each one that is made."""
        self._watch = see

    def remove(self) -> None:
        """Leave nothing of them."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


NOWHERE = Parts()


def _name(key: tuple[object, ...]) -> str:
    """A file name that a person can read and that no other key has."""
    text = json.dumps([str(part) for part in key])
    told = re.sub(r"\W+", "-", " ".join(map(str, key))).strip("-")[:60]
    return f"{told}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.parquet"
