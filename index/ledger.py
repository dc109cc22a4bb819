"""`ledger.jsonl`: what was done to an index and when, each line hashing the one before.

The only file of an index that holds times, so that the same input gives the same bytes elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE_NAME = "ledger.jsonl"
NO_PREVIOUS = "0" * 64
_SURROGATE = re.compile("[\ud800-\udfff]")


def append(folder: Path, event: str, details: Mapping[str, Any]) -> dict[str, Any]:
    """Append one event to the ledger of `folder` and return the line as a dictionary.

    `previous` is the sha256 of the preceding line (64 zeros on the first one), `hash` the sha256
    of this line's canonical JSON without `hash`. Raises OSError when the folder is not writable.
    """
    # Not through a link: a folder from elsewhere must not write to other files of this user.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(folder / FILE_NAME, flags, 0o666), "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two writers would otherwise hash the same line
        file.seek(0)
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.write(b"\n")  # an earlier append was cut short: keep its piece on its own line
        lines = text.splitlines()
        entry: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "details": encodable(details),
            "previous": hashlib.sha256(lines[-1]).hexdigest() if lines else NO_PREVIOUS,
        }
        entry["hash"] = hashlib.sha256(_canonical(entry)).hexdigest()
        file.write(_canonical(entry) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    return entry


def encodable(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return `details` as a ledger can hold them: JSON in UTF-8.

    The bytes of a path that are no UTF-8 are lone surrogates in Python; they are spelled out.
    """
    text = json.dumps(dict(details), allow_nan=False, ensure_ascii=False)
    plain = _SURROGATE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)
    return dict(json.loads(plain))


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the ledger, without those that a crash cut short."""
    path = folder / FILE_NAME
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("details"), dict):
            found.append(entry)
    return found


@dataclass(frozen=True)
class Chain:
    """What a ledger is worth."""

    lines: int
    head: str  # hash of the last line that can be read; 64 zeros without any
    problems: tuple[str, ...]  # each names its line, from 1


def check(folder: Path) -> Chain:
    """Check the chain of a ledger: each line's own hash, and that of the line before.

    An edited, removed, inserted or moved line is found, and a last line that is cut short; lines
    removed from the end are not: nothing in the file says that they were there. A piece that a
    crash left inside is no problem, as the line after it hashes it.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return Chain(0, NO_PREVIOUS, ("it is missing",))
    text = path.read_bytes()
    lines = text.splitlines()
    problems, head, previous = [], NO_PREVIOUS, NO_PREVIOUS
    cut_short = 0  # the number of the line before, when it is only a piece
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            if cut_short:
                problems.append(f"line {cut_short} is no entry of a ledger")
            cut_short = number
        else:
            own = {name: value for name, value in entry.items() if name != "hash"}
            if entry["hash"] != hashlib.sha256(_canonical(own)).hexdigest():
                problems.append(f"line {number} is not what was written: its own hash differs")
            elif entry["previous"] != previous:
                where = f"line {cut_short}" if cut_short else f"line {number}"
                problems.append(
                    f"{where} is not what was written, or lines before line {number} are missing: "
                    f"line {number} hashes another line before it"
                )
            head, cut_short = entry["hash"], 0
        previous = hashlib.sha256(line).hexdigest()
    if cut_short:
        problems.append(f"line {cut_short} is cut short or overwritten")
    elif text and not text.endswith(b"\n"):
        problems.append(f"line {len(lines)} has lost its end")
    if not lines:
        problems.append("it is empty")
    return Chain(len(lines), head, tuple(problems))


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return a line as it was written, or None: not whole, or not in canonical form."""
    try:
        entry = json.loads(line)
        whole = isinstance(entry, dict) and {"hash", "previous"} <= set(entry)
        return entry if whole and _canonical(entry) == line else None
    except (ValueError, RecursionError):
        return None


def _canonical(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(
        entry, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    ).encode()
