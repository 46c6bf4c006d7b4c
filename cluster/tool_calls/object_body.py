"""Reads calls whose arguments are a JSON object: `{"name": …, "arguments": {…}}`, or a name with the object behind it.

Made by `formats.py`, driven by `parsing.py`. The arguments are passed on as they are written, character by character,
as soon as the name is known; the complete object is parsed once more, so that what was passed on is known to be right
or wrong. An object that states its name last is passed on when it is complete.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from penstock.cluster.tool_calls.call_body import FAILED, BodyStep, Schemas
from penstock.cluster.tool_calls.object_scanner import ObjectScanner

MAX_DEPTH = 64
MAX_LEAD_CHARS = 256
# The usual beginning of a call, up to the arguments' brace.
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


class ObjectBody:
    """One call. `lead` matches what stands before the object; its group `name`, if it has one, is the tool's."""

    __slots__ = ("_at", "_begun", "_lead", "_name", "_object", "_passing", "_scanner", "_schemas", "_sent")

    def __init__(self, lead: re.Pattern[str], schemas: Schemas) -> None:
        self._lead: re.Pattern[str] | None = lead
        self._schemas = schemas
        self._scanner = ObjectScanner()
        self._object: list[str] = []
        self._sent: list[str] = []
        self._name = ""
        self._at = 2  # depth of the arguments' inside
        self._begun = False  # something as deep has been there, so the usual beginning has come or will not
        self._passing = False  # what comes now are arguments of a known call

    def feed(self, text: str) -> BodyStep:
        """See `CallBody`."""
        if self._lead is None:
            return self._feed(text, "")
        self._object.append(text)
        lead = "".join(self._object)
        brace = lead.find("{")
        if brace < 0:
            return FAILED if len(lead) > MAX_LEAD_CHARS else BodyStep()
        found = self._lead.fullmatch(lead, 0, brace)
        if found is None or brace > MAX_LEAD_CHARS:
            return FAILED
        self._lead, self._object = None, []
        self._name = found.groupdict().get("name") or ""
        if self._name:
            self._at, self._begun, self._passing = 1, True, True
        return self._feed(lead[brace:], self._name)

    def _feed(self, text: str, name: str) -> BodyStep:
        """`name`: that has just become known."""
        if name and name not in self._schemas:
            return FAILED
        passed, sent = "", 0  # sent: where in the text the arguments that were not yet passed on begin
        for end, depth in self._scanner.turns(text):
            if depth > MAX_DEPTH:
                return FAILED
            if depth == 2 and not self._begun:
                self._begun = True
                if text[end - 1] == "{":
                    self._name = name = self._named_by("".join(self._object) + text[: end - 1])
                    self._passing, sent = bool(name), end - 1
            elif self._passing and depth < self._at:
                passed, self._passing = passed + text[sent:end], False
            if depth == 0:
                self._object.append(text[:end])
                return self._complete(name, passed, text[end:])
        if self._passing:
            passed += text[sent:]
        self._object.append(text)
        self._sent.append(passed)
        return BodyStep(name, passed)

    def _named_by(self, head: str) -> str:
        """The name in a call's usual beginning; empty where it begins otherwise, or names no tool that there is."""
        found = _HEAD.fullmatch(head)
        return found[1] if found is not None and found[1] in self._schemas else ""

    def _complete(self, name: str, passed: str, rest: str) -> BodyStep:
        """The last step, where the object is a call, and the very one that was passed on."""
        whole, sent = _parsed("".join(self._object)), "".join((*self._sent, passed))
        stated = whole if self._at == 1 else _arguments(whole)
        if self._at == 2 and isinstance(whole, dict):
            called = whole.get("name")
            if not isinstance(called, str) or called not in self._schemas or (sent and called != self._name):
                return FAILED
            if not sent:
                name, passed = called, json.dumps(stated)
        if not isinstance(stated, dict) or (sent and _parsed(sent) != stated):
            return FAILED
        return BodyStep(name, passed, rest)


def _arguments(whole: Any) -> Any:
    """Of a call as an object; a tool that takes none may be called without."""
    if not isinstance(whole, dict):
        return None
    return whole.get("arguments", whole.get("parameters", {}))


def _parsed(text: str) -> Any:
    """The JSON value, None where it is none; its depth has been counted, so the parser's own bound is far."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
