"""`headwater bench STUDY`: settings from the command, from --small and from a record."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import Command

from headwater.commands_studies import STUDIES


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for one benchmark's module: keeps what it is called with."""
    seen: dict[str, Any] = {}

    def run(
        out: Path,
        *,
        corpus: str,
        rows: int = 100,
        methods: Sequence[str] = (),
        device: str,
        say: Any,
    ) -> None:
        seen.update(out=out, corpus=corpus, rows=rows, methods=methods, device=device)
        say("done")

    module = ModuleType("headwater.benchmarks.emoji")
    module.run, module.SMALL = run, {"rows": 3}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "headwater.benchmarks.emoji", module)
    return seen


def test_settings_of_the_full_the_small_and_the_given_version(
    headwater: Command, seen: dict[str, Any], tmp_path: Path
) -> None:
    base = ("bench", "emoji", "--out", tmp_path, "--corpus", "c")
    code, out, err = headwater(*base)
    assert (code, out.strip(), err) == (0, "done", "")
    assert seen == {
        "out": tmp_path, "corpus": "c", "rows": 100, "methods": (), "device": "auto",
    }  # fmt: skip
    headwater(*base, "--small", "--device", "cpu")
    assert (seen["rows"], seen["device"]) == (3, "cpu")
    headwater(*base, "--small", "--set", "rows=7", "--set", 'methods=["a"]')
    assert (seen["rows"], seen["methods"]) == (7, ["a"])
    headwater(*base, "--set", "methods=plain words")
    assert seen["methods"] == "plain words"


def test_a_record_is_replayed(headwater: Command, seen: dict[str, Any], tmp_path: Path) -> None:
    record = tmp_path / "config.json"
    record.write_text(
        json.dumps({"benchmark": "emoji", "settings": {"rows": 5, "corpus": "there"}})
    )
    code, _, err = headwater("bench", "emoji", "--out", tmp_path, "--replay", record)
    assert (code, err) == (0, "")
    assert (seen["rows"], seen["corpus"]) == (5, "there")
    headwater("bench", "emoji", "--out", tmp_path, "--replay", record, "--corpus", "here")
    assert seen["corpus"] == "here"


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "bench emoji needs --corpus"),
        (("--corpus", "c", "--set", "row=1"), "no setting 'row'; choose corpus, rows, methods"),
        (("--corpus", "c", "--tree", "t"), "no setting 'tree'"),
        (("--corpus", "c", "--set", "rows"), "has no '='"),
        (("--small", "--replay", "x"), "exclude each other"),
        (("--replay", "nowhere.json"), "nowhere.json is no record"),
        (("--replay", "README.md"), "README.md is no record"),
    ],
)
def test_what_cannot_be_set_is_told(
    headwater: Command, tmp_path: Path, flags: Sequence[str], message: str
) -> None:
    code, _, err = headwater("bench", "emoji", "--out", tmp_path, *flags)
    assert code == 2
    assert message in " ".join(err.split())


def test_what_is_not_installed_is_told_before_the_run(
    headwater: Command, seen: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headwater.commands_studies.find_spec", lambda name: None)
    code, _, err = headwater("bench", "emoji", "--out", tmp_path, "--corpus", "c")
    assert code == 2
    assert "bm25s is not installed; pip install" in " ".join(err.split())
    assert not seen


def test_a_record_of_another_benchmark_is_refused(
    headwater: Command, seen: dict[str, Any], tmp_path: Path
) -> None:
    record = tmp_path / "config.json"
    record.write_text(json.dumps({"benchmark": "faces", "settings": {}}))
    code, _, err = headwater("bench", "emoji", "--out", tmp_path, "--replay", record)
    assert code == 2
    assert "is of bench faces" in " ".join(err.split())
    assert not seen


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_module(name: str) -> None:
    module = __import__(f"headwater.benchmarks.{name.replace('-', '_')}", fromlist=["run", "SMALL"])
    assert callable(module.run)
    assert isinstance(module.SMALL, dict)
