"""YAML as a tree that remembers lines, read with limits: the one reader of files under validation.

`read_documents` composes nodes (nothing is constructed but plain scalars, so no tag can run anything) and turns them
into `Node`s. What plain loading lets pass is a problem here: duplicate keys, keys that are no text, unknown tags,
aliases that unfold without bound. Used by `checker.py` and, for YAML inside a string, by the rules.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from penstock.cluster.validate.findings import Path, Problem

MAX_BYTES = 1 << 20
MAX_NODES = 100_000  # aliases unfolded
MAX_DEPTH = 64
MAX_DOCUMENTS = 1000
_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp"))
_MERGE = "tag:yaml.org,2002:merge"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it stands. `value`: dict[str, Node], list[Node], or a plain scalar."""

    value: Any
    line: int
    key_lines: dict[str, int] = field(default_factory=dict)
    first_text_line: int | None = None  # of a literal block scalar: where its text begins

    def plain(self) -> Any:
        """The tree without lines."""
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def at(self, path: Path) -> Node | None:
        """The node at a path, if there is one."""
        node: Node | None = self
        for part in path:
            inside = node.value if node is not None else None
            if isinstance(inside, dict) and isinstance(part, str):
                node = inside.get(part)
            elif isinstance(inside, list) and isinstance(part, int) and part < len(inside):
                node = inside[part]
            else:
                return None
        return node

    def line_of(self, path: Path) -> int:
        """The line of the deepest part of `path` that exists: that of its key where it has one."""
        node, line = self, self.line
        for part in path:
            if isinstance(node.value, dict) and part in node.value:
                line = node.key_lines[str(part)]
                node = node.value[str(part)]
            elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.line
            else:
                break
        return line


@dataclass(frozen=True, slots=True)
class Misread:
    """A problem of reading: it has a line, and a path where the tree got so far."""

    line: int
    problem: Problem


class _UnreadableError(Exception):
    """Nothing of the text can be used."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


def read_documents(text: str | bytes, first_line: int = 1) -> tuple[list[Node], list[Misread]]:
    """The documents of a YAML text, empty ones left out, and what was wrong in reading. Never raises."""
    decoded = ""
    try:
        decoded = _decode(text)
        _check_events(decoded)
        reader = _Reader(first_line)
        documents = [reader.node(raw, (), 0) for raw in yaml.compose_all(decoded, Loader=_LOADER) if raw is not None]
    except _UnreadableError as error:
        return [], [Misread(error.line + first_line - 1, Problem((), error.reason))]
    except yaml.YAMLError as error:
        line, reason = _yaml_reason(error, decoded)
        return [], [Misread(line + first_line - 1, Problem((), reason))]
    return [one for one in documents if one.value is not None], reader.misread


def shifted(misread: Misread, prefix: Path) -> Misread:
    """The same, seen from the document that the text stands in."""
    return replace(misread, problem=replace(misread.problem, path=prefix + misread.problem.path))


def _decode(text: str | bytes) -> str:
    if len(text) > MAX_BYTES:
        raise _UnreadableError(1, f"larger than {MAX_BYTES} bytes")
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnreadableError(text[: error.start].count(b"\n") + 1, "not UTF-8 text") from error


def _check_events(text: str) -> None:
    """Bound nesting and documents before anything recurses over them."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _UnreadableError(_line(event), f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > MAX_DOCUMENTS:
                raise _UnreadableError(_line(event), f"more than {MAX_DOCUMENTS} documents")


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 1


def _yaml_reason(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:
        return 1, f"not YAML: {str(error).splitlines()[0]}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if line[mark.column : mark.column + 1] == "\t":
        return mark.line + 1, "a tab where YAML wants spaces"
    if "{{" in line:
        return mark.line + 1, "a template, not YAML; render it first and check what comes out"
    return mark.line + 1, f"not YAML: {getattr(error, 'problem', None) or 'malformed'}"


class _Reader:
    """Turns composed nodes into `Node`s and collects what is wrong with them."""

    def __init__(self, first_line: int) -> None:
        self._offset = first_line
        self._seen = 0
        self._constructor = yaml.constructor.SafeConstructor()
        self.misread: list[Misread] = []

    def node(self, raw: yaml.Node, path: Path, depth: int) -> Node:
        """One composed node with all below it."""
        line = raw.start_mark.line + self._offset
        self._seen += 1
        if self._seen > MAX_NODES or depth > MAX_DEPTH:  # an alias may repeat, or contain itself
            raise _UnreadableError(
                raw.start_mark.line + 1, f"aliases unfold to more than {MAX_NODES} values, or for ever"
            )
        if isinstance(raw, yaml.MappingNode):
            return self._mapping(raw, path, depth)
        if isinstance(raw, yaml.SequenceNode):
            return Node([self.node(one, (*path, i), depth + 1) for i, one in enumerate(raw.value)], line)
        first_text_line = line + 1 if getattr(raw, "style", None) == "|" else None
        return Node(self._scalar(raw, path), line, first_text_line=first_text_line)

    def _mapping(self, raw: yaml.MappingNode, path: Path, depth: int) -> Node:
        values: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Node] = {}
        for raw_key, raw_value in raw.value:
            line = raw_key.start_mark.line + self._offset
            if raw_key.tag == _MERGE:
                for other in self._merged(raw_value, path, depth, line):
                    merged = {**other.value, **merged}
                continue
            name = self._key(raw_key, path, line)
            if name in values:
                self._note(line, (*path, name), f"this key stands here twice; the first is on line {lines[name]}")
            values[name] = self.node(raw_value, (*path, name), depth + 1)
            lines[name] = line
        for name, value in merged.items():
            if name not in values:
                values[name], lines[name] = value, value.line
        return Node(values, raw.start_mark.line + self._offset, lines)

    def _merged(self, raw: yaml.Node, path: Path, depth: int, line: int) -> Iterator[Node]:
        for one in raw.value if isinstance(raw, yaml.SequenceNode) else [raw]:
            node = self.node(one, path, depth + 1)
            if isinstance(node.value, dict):
                yield node
            else:
                self._note(line, path, "'<<' can only merge mappings")

    def _key(self, raw: yaml.Node, path: Path, line: int) -> str:
        if isinstance(raw, yaml.ScalarNode):
            if raw.tag not in (f"tag:yaml.org,2002:{kind}" for kind in ("str", "timestamp")):
                self._note(line, (*path, raw.value), f"the key {raw.value!r} is not text; quote it")
            return str(raw.value)
        self._note(line, path, "a key must be text")
        return "?"

    def _scalar(self, raw: yaml.Node, path: Path) -> object:
        if raw.tag not in _SCALAR_TAGS:
            tag = raw.tag.removeprefix("tag:yaml.org,2002:")
            self._note(raw.start_mark.line + self._offset, path, f"the tag {tag!r} has no meaning here")
            return str(raw.value)
        try:
            value = self._constructor.construct_object(raw)
        except ValueError as error:  # like 2024-02-31, which only looks like a date
            self._note(raw.start_mark.line + self._offset, path, f"{raw.value!r} cannot be read: {error}")
            return str(raw.value)
        return str(raw.value) if isinstance(value, datetime.date) else value

    def _note(self, line: int, path: Path, reason: str) -> None:
        self.misread.append(Misread(line, Problem(path, reason)))
