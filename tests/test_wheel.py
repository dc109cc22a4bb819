"""A wheel in an empty environment, outside the repository, runs the demo: package data included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A tenth of the pictures: here it is about what the wheel holds and asks for.
SMALL_DEMO = """
from functools import partial
from headwater import cli
from headwater.demo import run
run.write_corpus = partial(run.write_corpus, images_per_pair=2)
cli.main()
"""


def run(*words: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_wheel_runs_the_demo_in_an_empty_environment(tmp_path: Path) -> None:
    dist, venv = tmp_path / "dist", tmp_path / "venv"
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", dist, ROOT,
        cwd=tmp_path)  # fmt: skip
    (wheel,) = dist.glob("headwater-*.whl")
    run(sys.executable, "-m", "venv", venv, cwd=tmp_path)
    # Compiling all of torch to bytecode takes longer than compiling what is imported.
    run(venv / "bin" / "pip", "install", "--quiet", "--no-compile", "--constraint",
        ROOT / "constraints.txt", f"{wheel}[cpu]", cwd=tmp_path)  # fmt: skip
    where = run(venv / "bin" / "python", "-c", "import headwater; print(headwater.__file__)",
                cwd=tmp_path)  # fmt: skip
    assert Path(where.strip()).is_relative_to(venv)
    run(venv / "bin" / "python", "-c", SMALL_DEMO, "demo", "--out", "out", "--quiet", cwd=tmp_path)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert len(result["object"]["hits"]) == len(result["studio"]["hits"]) == 10
    assert (tmp_path / "out" / "report.html").is_file()
    for command in ("ingest", "query", "inspect", "demo", "bench"):
        run(venv / "bin" / "headwater", command, "--help", cwd=tmp_path)
