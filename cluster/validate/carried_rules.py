"""Configurations that a ConfigMap carries: those of Penstock and of Serve among its entries, checked like files.

Only what is surely one is looked into; other programs' files are their own affair. Used by `checker.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from penstock.cluster.validate.configuration_rules import check_stated, read_stated, section_names
from penstock.cluster.validate.findings import Path, Problem
from penstock.cluster.validate.loose import entries, text
from penstock.cluster.validate.serve_rules import check_serve
from penstock.cluster.validate.yaml_tree import Node, read_documents

OUR_NAME = "penstock"
SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Carried:
    """One entry that was looked into: where it stands, its tree with the manifest's lines, what is wrong."""

    path: Path
    node: Node | None
    problems: tuple[Problem, ...]


def carried(manifest: Node) -> Iterator[Carried]:
    """Every configuration among a ConfigMap's entries."""
    data = manifest.at(("data",))
    for name, entry in data.value.items() if data is not None and isinstance(data.value, dict) else ():
        if not isinstance(entry.value, str) or not name.endswith(SUFFIXES):
            continue
        path: Path = ("data", name)
        documents, misread = read_documents(entry.value, entry.first_text_line or entry.line)
        node = documents[0] if len(documents) == 1 else None
        tree = node.plain() if node is not None else None
        found = [replace(one.problem, path=(*path, *one.problem.path)) for one in misread]
        if OUR_NAME in name and found:
            yield Carried(path, node, tuple(found))
        elif _is_serve(tree):
            yield Carried(path, node, (*found, *check_serve(tree, path, elsewhere=True)))
        elif _is_configuration(name, tree):
            stated, unknown = read_stated(tree, path, {})
            yield Carried(path, node, (*found, *unknown, *check_stated(stated, path, elsewhere=True)))


def _is_serve(tree: Any) -> bool:
    return any(text(application, "import_path") for _, application in entries(tree, "applications"))


def _is_configuration(name: str, tree: Any) -> bool:
    if not isinstance(tree, dict) or not tree:
        return False
    return OUR_NAME in name or all(key in section_names() for key in tree)
