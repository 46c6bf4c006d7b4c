"""Careful looks into plain trees whose shape is not sure: a wrong type reads as absent, for the schema has told it.

Used by every file of rules. Pure.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from penstock.cluster.validate.findings import Path


def at(tree: Any, *path: str | int) -> Any:
    """The value at a path, or None."""
    for part in path:
        if isinstance(tree, dict) and isinstance(part, str):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and 0 <= part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree


def mapping(tree: Any, *path: str | int) -> dict[str, Any]:
    """The mapping at a path, else an empty one."""
    found = at(tree, *path)
    return found if isinstance(found, dict) else {}


def entries(tree: Any, *path: str | int) -> list[tuple[int, dict[str, Any]]]:
    """The mappings of the list at a path, with their indices."""
    found = at(tree, *path)
    return [(i, one) for i, one in enumerate(found) if isinstance(one, dict)] if isinstance(found, list) else []


def text(tree: Any, *path: str | int) -> str:
    """The text at a path, else ''."""
    found = at(tree, *path)
    return found if isinstance(found, str) else ""


def whole(tree: Any, *path: str | int) -> int | None:
    """The integer at a path, or None."""
    found = at(tree, *path)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def number(tree: Any, *path: str | int) -> float | None:
    """The finite number at a path, or None."""
    found = at(tree, *path)
    if not isinstance(found, (int, float)) or isinstance(found, bool) or abs(found) > sys.float_info.max:
        return None
    return None if math.isnan(found) else float(found)


def switch(tree: Any, *path: str | int) -> bool:
    """Whether the value at a path is true."""
    return at(tree, *path) is True


def walk(tree: Any, path: Path = ()) -> list[tuple[Path, Any]]:
    """Every value below and including `tree`, with its path."""
    found: list[tuple[Path, Any]] = [(path, tree)]
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for part, child in children:
        found += walk(child, (*path, part))
    return found
