"""An index after a crash: what was committed is finished, what was not is removed."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

from . import ledger
from .manifest import JOB_FILE, Manifest

# The ledger's line of a commit, kept until it stands there: a crash cannot lose it.
COMMIT_FILE = "commit.json"
_PART = re.compile(r"part-(\d{5,})\.(?:npy|parquet)")
_PART_FOLDERS = ("features", "items", "thumbs")


def settle(folder: Path, manifest: Manifest | None) -> None:
    """Finish what was committed, remove what was not; `manifest` is None in a new index."""
    path = folder / COMMIT_FILE
    if path.exists():
        line = json.loads(path.read_bytes())
        generation = line["details"]["generation"]
        if manifest is not None and manifest.generation == generation:
            noted = ledger.entries(folder)
            if not any(entry["details"].get("generation") == generation for entry in noted):
                ledger.append(folder, line["event"], line["details"])
        path.unlink()
    _remove_unlisted(folder, manifest)
    job = (folder / JOB_FILE).parent
    if job.exists() and not job_is_open(folder, manifest):
        for name in sorted(job.iterdir(), key=lambda path: path.name == "job.json"):  # that last
            shutil.rmtree(name) if name.is_dir() else name.unlink()
        job.rmdir()


def _remove_unlisted(folder: Path, manifest: Manifest | None) -> None:
    """Remove what looks like a file of ours and counts neither now nor for an unfinished job."""
    listed = set(manifest.all_files()) if manifest is not None else set()
    open_job = job_is_open(folder, manifest)
    next_part = manifest.next_part if manifest is not None else 0
    for top in ("curvature", "tombstones", "duplicates", *_PART_FOLDERS):
        for path in sorted((folder / top).rglob("*"), reverse=True):  # files before their folder
            if path.is_dir():
                with suppress(OSError):  # not empty
                    path.rmdir()
                continue
            if path.relative_to(folder).as_posix() in listed:
                continue
            number = _PART.fullmatch(path.name)
            ours = top not in _PART_FOLDERS or number is not None
            waits = number is not None and open_job and int(number[1]) >= next_part
            if (ours and not waits) or path.name.endswith(".writing"):
                path.unlink()
        with suppress(OSError):
            (folder / top).rmdir()
    for cut_short in (*folder.glob("*.writing"), *folder.glob("job/**/*.writing")):
        cut_short.unlink()


def job_is_open(folder: Path, manifest: Manifest | None) -> bool:
    """Whether the job that lies there still waits for its end; a committed one does not."""
    if not (folder / JOB_FILE).exists():
        return False
    first = first_part(folder)
    # Of one that cannot be read, whoever goes on with it will say so.
    return first is None or first >= (0 if manifest is None else manifest.next_part)


def first_part(folder: Path) -> int | None:
    """The number of a job's first part; None if its file is not one of ours."""
    try:
        return int(json.loads((folder / JOB_FILE).read_bytes())["first_part"])
    except (ValueError, KeyError, TypeError):
        return None
