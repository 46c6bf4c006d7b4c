"""Reads tool calls out of the text of one choice while it arrives: text in, content and pieces of calls out.

`ingress/choice_text.py` drives one `CallParser` per choice. Pure but for the ids, which must not be guessable. Time is
linear in the text, and nothing raises: what turns out to be no call is content, from its first character.

Arguments are passed on as they are written. A call that breaks off later is taken back (`CallPiece.dropped`), and its
text, that of its arguments too, comes as content; so the content of an answer is the same streamed and whole. After
such a call everything is content. White space before a call, and behind the last one, is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from penstock.cluster.stop_strings import StopMatcher
from penstock.cluster.tool_calls.call_body import CallBody, Schemas
from penstock.cluster.tool_calls.formats import After, ToolFormat

MAX_BLANK_CHARS = 256


@dataclass(frozen=True, slots=True)
class CallPiece:
    """What is new of call `index`: at first its id and name, then text of its arguments. `dropped`: it was none."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What one piece of text became."""

    content: str
    calls: tuple[CallPiece, ...]


class _At(Enum):
    START = auto()  # nothing but white space so far, of a format whose calls may begin without a mark
    TEXT = auto()
    BODY = auto()
    GAP = auto()  # behind a call
    PLAIN = auto()  # after text that only looked like a call


class CallParser:
    """The calls of one choice. `calls`: how many there are, the one under way included."""

    def __init__(self, form: ToolFormat, schemas: Schemas) -> None:
        self.calls = 0
        self.complete = 0
        self._form = form
        self._schemas = schemas
        self._at = _At.START if form.opener else _At.TEXT
        self._search = StopMatcher(form.marks)
        self._body: CallBody | None = None
        self._raw: list[str] = []  # text of the call under way, and what stands before it
        self._held = ""
        self._blank = ""
        self._content: list[str] = []
        self._pieces: list[CallPiece] = []
        self._announced = False
        self._steps: dict[_At, Callable[[str], str]] = {
            _At.START: self._start,
            _At.TEXT: self._text,
            _At.BODY: self._call,
            _At.GAP: self._gap,
            _At.PLAIN: self._plain,
        }

    def push(self, text: str) -> Reading:
        """The next piece of the text."""
        while text:
            text = self._steps[self._at](text)
        return self._reading()

    def finish(self, cut: bool) -> Reading:
        """No more text comes. `cut`: because of its length, so that a call may well be incomplete."""
        if self._at is _At.START:
            self._content.append(self._held)
        elif self._at is _At.TEXT:
            self._say(self._search.finish())
            self._content.append("" if self.calls else self._blank)
        elif self._at is _At.BODY and not (cut and self._announced):
            self._break()
        return self._reading()

    def _reading(self) -> Reading:
        found = Reading("".join(self._content), tuple(self._pieces))
        self._content, self._pieces = [], []
        return found

    # --- steps: each takes text and leaves what comes after ---------------------------------------------------------

    def _start(self, text: str) -> str:
        self._held += text
        begun = self._held.lstrip()
        if not begun and len(self._held) <= MAX_BLANK_CHARS:
            return ""
        held, self._held = self._held, ""
        if begun.startswith(self._form.opener):
            self._begin(held[: len(held) - len(begun)])
            return begun
        self._at = _At.TEXT
        return held

    def _text(self, text: str) -> str:
        self._say(self._search.push(text))
        mark = self._search.stopped
        if mark is None:
            return ""
        rest = self._search.rest
        self._search = StopMatcher(self._form.marks)
        blank, self._blank = self._blank, ""
        self._begin(blank + mark)
        return rest

    def _begin(self, before: str) -> None:
        """A call comes, with this before it."""
        self._at, self._raw, self._announced = _At.BODY, [before], False
        self._body = self._form.body(self._schemas)

    def _call(self, text: str) -> str:
        self._raw.append(text)
        step = self._body.feed(text) if self._body is not None else None
        if step is None or step.failed:
            self._break()
            return ""
        index = self.calls
        if step.name:
            self._announced = True
            self._pieces.append(CallPiece(index, self._form.new_id(), step.name))
        if step.arguments:
            self._pieces.append(CallPiece(index, arguments=step.arguments))
        if step.rest is None:
            return ""
        self.calls = self.complete = self.calls + 1
        self._at, self._raw, self._body = _At.GAP, [], None
        return step.rest

    def _break(self) -> None:
        """It was no call."""
        if self._announced:
            self._pieces.append(CallPiece(self.calls, dropped=True))
            self._announced = False
        self._content += self._raw
        self._at, self._raw, self._body = _At.PLAIN, [], None

    def _gap(self, text: str) -> str:
        self._held = (self._held + text).lstrip()
        for literal, after in self._form.gaps.items():
            if self._held.startswith(literal):
                rest, self._held = self._held[len(literal) :], ""
                if after is After.CALL:
                    self._begin(literal)
                elif after is After.TEXT:
                    self._at = _At.TEXT
                return rest
        if not self._held or any(literal.startswith(self._held) for literal in self._form.gaps):
            return ""
        rest, self._held, self._at = self._held, "", _At.TEXT
        return rest

    def _plain(self, text: str) -> str:
        self._content.append(text)
        return ""

    def _say(self, text: str) -> None:
        """Content, less white space that a call may follow."""
        text = self._blank + text
        shown = text.rstrip() or ("" if len(text) <= MAX_BLANK_CHARS else text)
        self._content.append(shown)
        self._blank = text[len(shown) :]
