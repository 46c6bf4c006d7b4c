"""From files to findings: reads each, decides what each document is, runs its schema and rules, sorts what was found.

`penstock validate` calls `check_files`. A document is a Kubernetes object, a Serve configuration, or Penstock's own
configuration; its keys tell which. Nothing is contacted and nothing in a file is executed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from penstock.cluster.validate.carried_rules import carried
from penstock.cluster.validate.configuration_rules import check_configuration, section_names
from penstock.cluster.validate.findings import Finding, Path, Problem, Severity, key_of, nearest, warning
from penstock.cluster.validate.kind_rules import check_kind, is_known
from penstock.cluster.validate.loose import text
from penstock.cluster.validate.object_rules import check_object
from penstock.cluster.validate.reference_rules import KubernetesObject, check_references
from penstock.cluster.validate.schemas import SchemaBook
from penstock.cluster.validate.serve_rules import check_serve, serve_keys
from penstock.cluster.validate.service_rules import SERVE_KEY, embedded
from penstock.cluster.validate.structural import complete, problems
from penstock.cluster.validate.yaml_tree import MAX_BYTES, Node, read_documents

OBJECT_KEYS = ("apiVersion", "kind", "metadata", "spec")
ALIKE = 0.75  # other programs' files have a `version` and `annotations` too


class DocumentKind(enum.Enum):
    """What a document is."""

    CONFIGURATION = "configuration"
    SERVE = "serve"
    KUBERNETES = "kubernetes"


@dataclass(slots=True)
class _Document:
    """One document under examination; `problems` collects what is found in it."""

    file: str
    node: Node
    tree: Any
    inside: dict[Path, Node] = field(default_factory=dict)  # documents within texts of this one, by their place
    problems: list[Problem] = field(default_factory=list)

    def line_of(self, path: Path) -> int:
        """The line of a path; paths into a document within a text lead into its own lines."""
        for place, node in self.inside.items():
            rest = path[len(place) :]
            if path[: len(place)] == place and rest and node.at(rest[:1]) is not None:
                return node.line_of(rest)
        return self.node.line_of(path)


def check_files(
    files: Iterable[FilePath],
    book: SchemaBook,
    expected: DocumentKind | None = None,
    met: frozenset[FilePath] = frozenset(),
) -> list[Finding]:
    """Every finding of all files, in the order of files and lines.

    `expected`: what every document has to be. `met`: files that nobody named, found in a folder; they may be of others.
    """
    findings: list[Finding] = []
    documents: list[_Document] = []
    for file in files:
        found, read = _read(file)
        documents += found
        findings += read
    objects: list[KubernetesObject] = []
    for number, document in enumerate(documents):
        kind = expected or kind_of(document.tree)
        if kind is DocumentKind.KUBERNETES:
            _check_kubernetes(document, book)
            if isinstance(document.tree, dict):
                objects.append(KubernetesObject(number, document.tree))
        elif kind is DocumentKind.SERVE:
            document.problems += check_serve(document.tree)
        elif kind is DocumentKind.CONFIGURATION:
            document.problems += check_configuration(document.tree)
            if [other.file for other in documents].count(document.file) > 1:
                document.problems.append(Problem((), "a configuration is one document; this file holds several"))
        else:
            reason = "neither a configuration of Penstock, nor a Serve configuration, nor a Kubernetes object"
            by_chance = FilePath(document.file) in met
            document.problems.append(warning((), f"{reason}: left aside") if by_chance else Problem((), reason))
    for number, problem in check_references(objects):
        documents[number].problems.append(problem)
    findings += [one for document in documents for one in _findings(document)]
    return _sorted(findings)


def kind_of(tree: Any) -> DocumentKind | None:
    """What a document is, by its keys, by near misses where none is right; None where nothing fits."""
    if not isinstance(tree, dict):
        return None
    sections, serve = section_names(), None
    names = [str(name) for name in tree]
    if any(name in ("apiVersion", "kind") for name in names):
        return DocumentKind.KUBERNETES
    if any(name in sections for name in names):
        return DocumentKind.CONFIGURATION
    serve = serve_keys()
    if any(name in serve for name in names):
        return DocumentKind.SERVE
    for kind, known in (
        (DocumentKind.KUBERNETES, OBJECT_KEYS),
        (DocumentKind.SERVE, serve),
        (DocumentKind.CONFIGURATION, sections),
    ):
        if any(name in known or nearest(name, known, ALIKE) for name in names):
            return kind
    return None


def _read(file: FilePath) -> tuple[list[_Document], list[Finding]]:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return [], [Finding(str(file), 1, "", error.strerror or str(error), None, Severity.ERROR)]
    nodes, misread = read_documents(content)
    findings = [_finding(str(file), one.line, one.problem) for one in misread]
    documents = [_Document(str(file), node, node.plain()) for node in nodes]
    if not documents and not findings:
        findings.append(Finding(str(file), 1, "", "the file holds nothing", None, Severity.ERROR))
    return [one for document in documents for one in _items(document)], findings


def _items(document: _Document) -> Iterator[_Document]:
    """A `kind: List` stands for what it holds."""
    items = document.node.at(("items",))
    if text(document.tree, "kind") == "List" and items is not None and not isinstance(items.value, list):
        document.problems.append(Problem(("items",), "expected a list of objects"))
    if text(document.tree, "kind") == "List" and items is not None and isinstance(items.value, list):
        for node in items.value:
            yield _Document(document.file, node, node.plain())
    else:
        yield document


def _check_kubernetes(document: _Document, book: SchemaBook) -> None:
    tree = document.tree
    if not isinstance(tree, dict):
        document.problems.append(Problem((), "expected the keys of a Kubernetes object"))
        return
    known = book.known()
    document.problems += check_kind(tree, known)
    schemas = book.find(text(tree, "apiVersion"), text(tree, "kind"))
    stated = tree
    if schemas:
        tree = complete(tree, schemas[0])
        for schema in schemas:
            document.problems += problems(tree, schema)
    if not is_known(tree, known):
        return
    if text(tree, "kind") == "RayService":
        found = embedded(document.node)
        serve_config = found.node.plain() if found.node is not None else None
        if found.node is not None:
            document.inside[("spec", SERVE_KEY)] = found.node
        document.problems += [
            replace(one.problem, path=("spec", SERVE_KEY, *one.problem.path)) for one in found.misread
        ]
        document.problems += check_object(tree, stated, serve_config, found.several)
        return
    for one in carried(document.node) if text(tree, "kind") == "ConfigMap" else ():
        document.problems += one.problems
        if one.node is not None:
            document.inside[one.path] = one.node
    document.problems += check_object(tree, stated)


def _findings(document: _Document) -> Iterator[Finding]:
    """One finding per place and severity: what a schema and a rule both see is told once."""
    told: set[tuple[Path, Severity]] = set()
    for problem in document.problems:
        if (problem.path, problem.severity) in told or (problem.path, Severity.ERROR) in told:
            continue
        told.add((problem.path, problem.severity))
        yield _finding(document.file, document.line_of(problem.path), problem)


def _finding(file: str, line: int, problem: Problem) -> Finding:
    return Finding(file, line, key_of(problem.path), problem.reason, problem.hint, problem.severity)


def _sorted(findings: list[Finding]) -> list[Finding]:
    files = list(dict.fromkeys(one.file for one in findings))
    return sorted(findings, key=lambda one: (files.index(one.file), one.line, one.key))
