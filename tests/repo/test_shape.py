"""Sizes, names and words of the source: budgets are enforced, not hoped for."""

import ast
import sys
import tomllib

import pytest
from repo.source_tree import ROOMS, ROOT, parse, relative, source_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_KERNEL_FUNCTION_LINES = 150
GENERIC_NAMES = {"utils", "util", "common", "helpers", "misc", "manager", "impl", "base", "core"}
TOP_LEVEL = {
    "pyproject.toml",
    "cluster",
    "workers",
    "router",
    "kernels",
    "deploy",
    "tests",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
}


def test_top_level_is_the_planned_one() -> None:
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and not p.name.endswith(".egg-info")} - {
        "build",
        "dist",
        "shared",
    }
    assert found <= TOP_LEVEL


def test_rooms_hold_no_init_of_their_own() -> None:
    assert [room for room in ROOMS if (ROOT / room / "__init__.py").exists()] == []


def test_files_and_functions_fit() -> None:
    too_long = []
    for path in source_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{relative(path)}: {lines} lines")
        limit = MAX_KERNEL_FUNCTION_LINES if relative(path).startswith("kernels/gpu/") else MAX_FUNCTION_LINES
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > limit:
                    too_long.append(f"{relative(path)}:{node.lineno} {node.name} is {length} lines")
    assert too_long == []


def test_total_size_is_within_the_budget() -> None:
    budget = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["penstock"]["max_source_lines"]
    per_room = {
        room: sum(len(p.read_text(encoding="utf-8").splitlines()) for p in source_files(room)) for room in ROOMS
    }
    assert sum(per_room.values()) <= budget, per_room


def test_file_names_are_nouns_of_the_field() -> None:
    bad = [
        relative(path)
        for path in source_files()
        if path.stem in GENERIC_NAMES
        or (path.stem in sys.stdlib_module_names and path.stem not in ("__init__", "__main__"))
    ]
    assert bad == []


def test_every_module_says_what_it_is() -> None:
    silent = [relative(path) for path in source_files() if not (ast.get_docstring(parse(path)) or "").strip()]
    assert silent == []


def test_nothing_is_left_unfinished() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    found = [
        f"{relative(path)}:{number}"
        for path in source_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if any(mark in line for mark in marks)
    ]
    assert found == []


@pytest.mark.parametrize("room", ROOMS)
def test_public_functions_and_classes_are_documented_and_typed(room: str) -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = [
        f"{relative(path)}:{node.lineno} {node.name} has no docstring"
        for path in source_files(room)
        for node in parse(path).body
        if isinstance(node, kinds) and not node.name.startswith("_") and ast.get_docstring(node) is None
    ]
    assert found == []
