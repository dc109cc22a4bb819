"""The house: no import runs upward or sideways, and the ground floor keeps to its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("attribution", "index", "ingest", "queries")
MAY_IMPORT = {
    "attribution": set(),
    "index": set(),
    "ingest": {"attribution", "index"},
    "queries": {"attribution", "index"},
}
FOREIGN = {
    "index": {"torch", "diffusers", "transformers"},
    "attribution": {"faiss", "duckdb", "pyarrow"},
}


def imported(path: Path) -> set[str]:
    """Absolute module names that a file imports; relative ones resolved against its package."""
    package = ["headwater", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, node.module or ""]).rstrip("."))
    return found


def modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_upward_or_sideways(room: str) -> None:
    assert modules(room)
    allowed = MAY_IMPORT[room] | {room}
    for path in modules(room):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "headwater":
                assert set(parts[1:2]) & allowed, f"{path} imports {name}"
            assert parts[0] not in ROOMS, f"{path} imports {name} past the package"


@pytest.mark.parametrize("room", FOREIGN)
def test_ground_floor_knows_nothing_of_its_neighbour(room: str) -> None:
    for path in modules(room):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & FOREIGN[room], f"{path} imports {tops & FOREIGN[room]}"


def test_the_reader_of_imports_sees_them(tmp_path: Path) -> None:
    sample = ROOT / "queries" / "ask.py"
    assert {"headwater.attribution", "headwater.index", "headwater.queries.concept"} <= imported(
        sample
    )


def test_every_module_says_what_it_does() -> None:
    for path in (p for room in (*ROOMS, "headwater", "benchmarks", "tests") for p in modules(room)):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
