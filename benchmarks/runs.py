"""A run of a benchmark: its `config.json`, written when it begins, and what it measured so far.

`config.json` holds the settings, which `headwater bench NAME --replay` runs again, and what the
numbers were made with. What has been measured is kept in OUT/parts until the record is whole: the
same command over the same folder goes on with it, another one is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from headwater.attribution import Model
from headwater.attribution.recipe import CODE_VERSION
from headwater.benchmarks.errors import BenchmarkError
from headwater.benchmarks.parts import Parts

# What a record was made with; `code` counts changes of what a row is, `tables` of what is kept.
PINS = ("headwater", "commit", "code", "tables", "device", "model", "corpus")
# Raise it when tables get other columns, or another lambda becomes the label-free one.
TABLES_VERSION = 2
# What decides numbers so that parts of one run and of another do not go together; the device, as
# precision is chosen by it.
DECIDING = ("benchmark", "settings", "code", "tables", "device", "model", "corpus")
_CPU = torch.device("cpu")
_NO_SETTINGS = ("world", "intro", "out", "device", "say")
_replayed: ContextVar[Mapping[str, Any]] = ContextVar("replayed")


@dataclass(frozen=True)
class Run:
    """A run that has begun."""

    out: Path
    config: dict[str, Any]
    parts: Parts

    def finish(self, **facts: Any) -> None:
        """The record is whole: say so, with `facts` that it holds, and let go of its parts.

        They are in the record's table now, and the same command shall measure anew.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        _write(self.out / "config.json", self.config | facts | {"finished": True})
        self.parts.remove()


def begin(
    out: Path,
    name: str,
    settings: Mapping[str, Any],
    *,
    model: Model | None = None,
    device: torch.device = _CPU,
    corpus: str,
    say: Callable[[str], object],
) -> Run:
    """Write `config.json`, and find what an earlier run over the same folder has left.

    Args:
        out: folder, made if it is not there.
        name: of the benchmark.
        settings: everything that its `run` was given, as JSON has it.
        model: that is asked, or that lends its parts to those that are trained; None: all are
            made here.
        device: where the run is made, if there is no model to say so.
        corpus: its `digest`.
        say: is told of parts that are there, and of a replayed record made with something else.

    Raises:
        BenchmarkError: `out` holds parts of a run that differs in what decides numbers.
    """
    where = device if model is None else model.device
    made = {
        **machine(str(where)),
        "headwater": _version(),
        "commit": _commit(),
        "code": CODE_VERSION,
        "tables": TABLES_VERSION,
        "device": where.type,
        "model": None if model is None else dict(model.fingerprint),
        "corpus": corpus,
    }
    config = {"benchmark": name, "settings": dict(settings), "finished": False, **made}
    config = json.loads(json.dumps(config))
    path, parts = out / "config.json", Parts(out / "parts")
    if len(parts):
        before = json.loads(path.read_text()) if path.is_file() else {}
        if other := differences(before, config, DECIDING):
            raise BenchmarkError(
                f"{parts.folder} is of a run with other {', '.join(other)}; give the same again, "
                "choose another --out, or remove that folder"
            )
        earlier = {key: before.get(key) for key in made if before.get(key) != config[key]}
        if sittings := [*before.get("earlier", ()), *([earlier] if earlier else ())]:
            config["earlier"] = sittings
        other = [key for key in earlier if key not in ("date", "command")]
        told = f", made with other {', '.join(other)}" if other else ""
        say(f"{len(parts)} parts are in {parts.folder}{told}; the run goes on with them")
    replayed = _replayed.get({})
    if other := differences(replayed, config, tuple(replayed)):
        say(f"not made as the replayed record was: other {', '.join(other)}")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, config)
    return Run(out, config, parts)


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a benchmark: of the `locals()` with which its `run` begins, what decides."""
    return {key: value for key, value in values.items() if key not in _NO_SETTINGS}


@contextmanager
def replaying(config: Mapping[str, Any]) -> Iterator[None]:
    """Runs that begin within say where they are not made with what this record was."""
    token = _replayed.set({key: config[key] for key in PINS if key in config})
    try:
        yield
    finally:
        _replayed.reset(token)


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], keys: tuple[str, ...]
) -> list[str]:
    """Which of the keys differ, and what is different about them."""
    found = []
    for key in keys:
        then, here = before.get(key), now.get(key)
        if then == here:
            continue
        if isinstance(then, dict) or isinstance(here, dict):
            then, here = then or {}, here or {}
            within = sorted(k for k in then.keys() | here.keys() if then.get(k) != here.get(k))
            found.append(f"{key} ({', '.join(within)})")
        else:
            found.append(f"{key} ({then}, now {here})")
    return found


def digest(*tables: pa.Table) -> str:
    """SHA-256 over the names of the columns and the values in them, however they are stored."""
    whole = hashlib.sha256()
    for table in tables:
        for name in sorted(table.column_names):
            whole.update(f"{name} {len(table)}".encode())
            for value in table[name].to_pylist():
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                whole.update(len(data).to_bytes(8) + data)
    return whole.hexdigest()[:16]


def machine(device: str) -> dict[str, str]:
    """Where, when and with what a run was made."""
    where = (
        torch.cuda.get_device_name(device)
        if device.startswith("cuda")
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {
        "machine": where,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["headwater", *sys.argv[1:]]),
    }


def _version() -> str | None:
    try:
        return version("headwater")
    except PackageNotFoundError:  # run from its sources
        return None


def _commit() -> str | None:
    """The git commit that this file is of, "-dirty" if files differ from it; None outside git."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # it may be installed in another's checkout
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _write(path: Path, config: Mapping[str, Any]) -> None:
    part = path.with_suffix(".partial")
    part.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(part, path)
