"""The README's promises: its Python snippet runs, its commands and flags exist."""

from __future__ import annotations

import re
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from headwater.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_snippets_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_folder: Path,
    corpus: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "my-model")
    shutil.copy(corpus, "my-images.parquet")
    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "case.html").is_file()
    assert "rights_holder" in capsys.readouterr().out


def test_commands_and_flags_exist() -> None:
    commands = [
        line
        for block in blocks("sh")
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("headwater ")
    ]
    assert {line.split()[1] for line in commands} >= set(get_command(app).commands)
    for line in commands:
        names = list(takewhile(str.isalpha, line.split()[1:]))  # `bench speed` are two
        help_text = CliRunner().invoke(
            app, [*names, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}
        )
        assert help_text.exit_code == 0, line
        for flag in re.findall(r"--[a-z-]+", line):
            assert flag in help_text.output, f"{flag} of {line!r}"


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z]+)", "\n".join(blocks("sh")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
