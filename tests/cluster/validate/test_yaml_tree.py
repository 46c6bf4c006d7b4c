"""Reading YAML under limits: every line is known, and what plain loading lets pass is told."""

from __future__ import annotations

import itertools

import pytest

from penstock.cluster.validate.findings import key_of
from penstock.cluster.validate.yaml_tree import MAX_BYTES, read_documents

pytestmark = pytest.mark.timeout(30)


def told(text: str | bytes) -> list[tuple[int, str, str]]:
    """Line, key and reason of everything that is wrong."""
    return [(one.line, key_of(one.problem.path), one.problem.reason) for one in read_documents(text)[1]]


def test_lines_and_values() -> None:
    documents, misread = read_documents("a: 1\nb:\n  - c: x\n    d: 2024-01-02\n---\n---\ne: |\n  f: 1\n")
    assert misread == []
    assert [one.plain() for one in documents] == [{"a": 1, "b": [{"c": "x", "d": "2024-01-02"}]}, {"e": "f: 1\n"}]
    assert documents[0].line_of(("b", 0, "d")) == 4
    assert documents[0].line_of(("b", 0, "missing")) == 3
    block = documents[1].at(("e",))
    assert block is not None
    assert block.first_text_line == 8


def test_anchors_and_merges() -> None:
    (document,), misread = read_documents("a: &x {p: 1, q: 2}\nb: *x\nc:\n  <<: *x\n  q: 3\n")
    assert misread == []
    assert document.plain() == {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 2}, "c": {"p": 1, "q": 3}}


@pytest.mark.parametrize(
    ("text", "line", "key", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a", "twice; the first is on line 1"),
        ("a:\n  1: x\n", 2, "a.1", "not text; quote it"),
        ("a:\n  on: x\n", 2, "a.on", "not text; quote it"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "", ""),
        ("a: !secret b\n", 1, "a", "has no meaning here"),
        ("a: 2024-02-31\n", 1, "a", "cannot be read"),
        ("a: b: c\n", 1, "", "not YAML"),
        ("a:\n\tb: 1\n", 2, "", "a tab where YAML wants spaces"),
        ("a: [1\n", 2, "", "not YAML"),
        ("a: *nobody\n", 1, "", "not YAML"),
        ("a: &x [*x]\n", 1, "", "for ever"),
        ("[" * 5000, 1, "", "nested deeper"),
        ("{a: " * 5000, 1, "", "nested deeper"),
        ("---\na: 1\n" * 2000, 2001, "", "more than 1000 documents"),
        ("a: " + "x" * MAX_BYTES, 1, "", "larger than"),
        (b"a: 1\nb: \xff\n", 2, "", "not UTF-8"),
        ("a: \x00\n", 1, "", "not YAML"),
        ("{{- if .Values.x }}\na: 1\n", 1, "", "a template"),
    ],
)
def test_what_is_wrong(text: str | bytes, line: int, key: str, reason: str) -> None:
    found = told(text)
    if "python/object" in str(text):  # a list under a foreign tag is a list; nothing is called
        assert read_documents(text)[0][0].plain() == {"a": ["ls"]}
        return
    assert [one for one in found if one[0] == line and one[1] == key and reason in one[2]], found


def test_a_bomb_of_aliases_is_small_work() -> None:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    names = "abcdefghijkl"
    levels += [f"{new}: &{new} [{', '.join(['*' + old] * 9)}]" for old, new in itertools.pairwise(names)]
    assert "aliases unfold" in told("\n".join(levels))[0][2]
