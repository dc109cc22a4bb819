"""`ledger.jsonl`: what was done to an index and when, each line hashing the one before.

The only file of an index that holds times, so that the same input gives the same bytes elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE_NAME = "ledger.jsonl"
NO_PREVIOUS = "0" * 64


def append(folder: Path, event: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Append one event to the ledger of `folder` and return the line as a dictionary.

    `previous` is the sha256 of the preceding line (64 zeros on the first one), `hash` the sha256
    of this line's canonical JSON without `hash`. Raises OSError when the folder is not writable.
    """
    with (folder / FILE_NAME).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two writers would otherwise hash the same line
        file.seek(0)
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.write(b"\n")  # an earlier append was cut short: keep its piece on its own line
        lines = text.splitlines()
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "details": dict(details),
            "previous": hashlib.sha256(lines[-1]).hexdigest() if lines else NO_PREVIOUS,
        }
        entry["hash"] = hashlib.sha256(_canonical(entry)).hexdigest()
        file.write(_canonical(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the ledger, without those that a crash cut short."""
    path = folder / FILE_NAME
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("details"), dict):
            found.append(entry)
    return found


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(
        entry, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()
