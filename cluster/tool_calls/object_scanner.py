"""Finds where a JSON object ends while its text is still arriving, and how deep it is in between.

Used by `object_body.py`. Looks at brackets and strings only: whether the whole is JSON is for a parser to say once it
is there. Every character is looked at once, however the text is cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_OUTSIDE = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'["\\]')


class ObjectScanner:
    """Brackets of one JSON value. `depth` is 0 before its first bracket and after its last."""

    __slots__ = ("_escaped", "_quoted", "depth")

    def __init__(self) -> None:
        self.depth = 0
        self._quoted = False
        self._escaped = False

    def turns(self, text: str) -> Iterator[tuple[int, int]]:
        """(end, depth after it) of every bracket in the next piece of text that stands outside of strings."""
        at = 0
        if self._escaped and text:
            at, self._escaped = 1, False
        while found := (_INSIDE if self._quoted else _OUTSIDE).search(text, at):
            at, mark = found.end(), found[0]
            if mark == '"':
                self._quoted = not self._quoted
            elif mark == "\\":
                self._escaped = at == len(text)
                at += 1
            else:
                self.depth += 1 if mark in "{[" else -1
                yield at, self.depth
