"""Reads the checkout's source as text and syntax trees, for the tests of this folder; imports nothing of it."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["kernels", "workers", "router", "cluster"]  # low to high


def source_files(*rooms: str) -> list[Path]:
    """Every Python file of the rooms (default: all four)."""
    return [path for room in rooms or ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


@cache
def parse(path: Path) -> ast.Module:
    """Read once for all tests of a module; `conftest.py` forgets it after them."""
    return ast.parse(path.read_text(encoding="utf-8"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def imported_modules(path: Path) -> tuple[tuple[int, str], ...]:
    """(line, absolute dotted name) of every import in the file, wherever it stands; read once for all tests."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = ["penstock", *path.relative_to(ROOT).parts[:-1]]
                base = parts[: len(parts) - node.level + 1]
                yield node.lineno, ".".join([*base, *((node.module or "").split("."))]).rstrip(".")
            elif node.module:
                yield node.lineno, node.module
