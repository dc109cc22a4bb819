"""The house: no import runs upward or sideways, and the ground floor keeps to its own.

The rooms know nothing of headwater.benchmarks; the face loads it when a benchmark is asked for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
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


def statements(node: ast.AST, lazily: bool) -> Iterator[ast.AST]:
    """Every node below, but for those in functions unless `lazily`."""
    for child in ast.iter_child_nodes(node):
        yield child
        if lazily or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from statements(child, lazily)


def imported(path: Path, *, lazily: bool = True) -> set[str]:
    """Absolute module names that a file imports; relative ones resolved against its package.

    `lazily` counts what functions import when they are called.
    """
    parts = path.relative_to(ROOT).parent.parts
    package = list(parts) if parts[0] == "headwater" else ["headwater", *parts]
    found = set()
    for node in statements(ast.parse(path.read_text()), lazily):
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


def test_the_face_imports_benchmarks_lazily() -> None:
    def benchmarks(path: Path, lazily: bool) -> set[str]:
        return {name for name in imported(path, lazily=lazily) if ".benchmarks" in name}

    assert any(benchmarks(path, lazily=True) for path in modules("headwater"))
    for path in modules("headwater"):
        assert not benchmarks(path, lazily=False), path


def test_the_reader_of_imports_sees_them() -> None:
    sample = ROOT / "queries" / "ask.py"
    assert {"headwater.attribution", "headwater.index", "headwater.queries.concept"} <= imported(
        sample
    )
    face = ROOT / "headwater" / "cli.py"
    assert "headwater.bar" in imported(face, lazily=False)
    assert "headwater.index" in imported(face) - imported(face, lazily=False)


def test_every_module_says_what_it_does() -> None:
    for path in (p for room in (*ROOMS, "headwater", "benchmarks", "tests") for p in modules(room)):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"
