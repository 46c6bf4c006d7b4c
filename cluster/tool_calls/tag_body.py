"""Reads calls that are written as tags: `<function=NAME><parameter=KEY>VALUE</parameter>…</function>`.

Made by `formats.py`, driven by `parsing.py`. Values are plain text, which becomes what the tool's schema says it is;
each is passed on as JSON when it is complete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from penstock.cluster.stop_strings import StopMatcher
from penstock.cluster.tool_calls.call_body import FAILED, BodyStep, Schemas

MAX_TAG_CHARS = 256
_OPENING = re.compile(r"<function=([A-Za-z0-9_-]{1,64})>")
_KEY = re.compile(r"<parameter=([^<>\n]{1,200})>")
_END = "</function>"
_VALUE_END = "</parameter>"


class TagBody:
    """One call."""

    __slots__ = ("_held", "_key", "_keys", "_name", "_schemas", "_search", "_value")

    def __init__(self, schemas: Schemas) -> None:
        self._schemas = schemas
        self._held = ""  # outside of values: a tag that is not complete
        self._name = ""
        self._key: str | None = None  # of the value that is being read
        self._keys: set[str] = set()
        self._value: list[str] = []
        self._search = StopMatcher((_VALUE_END,))

    def feed(self, text: str) -> BodyStep:
        """See `CallBody`."""
        name, arguments, rest = "", "", text
        while True:
            if self._key is not None:
                self._value.append(self._search.push(rest))
                if self._search.stopped is None:
                    return BodyStep(name, arguments)
                arguments += self._argument(self._key)
                rest, self._key, self._search = self._search.rest, None, StopMatcher((_VALUE_END,))
            self._held = (self._held + rest).lstrip()
            if self._name and self._held.startswith(_END):
                return BodyStep(name, arguments + ("}" if self._keys else "{}"), self._held[len(_END) :])
            tag, mark, rest = self._held.partition(">")
            if not mark:
                return FAILED if len(tag) > MAX_TAG_CHARS or not _may_begin_tag(tag) else BodyStep(name, arguments)
            found = (_KEY if self._name else _OPENING).fullmatch(tag + mark)
            if found is None or found[1] in self._keys:
                return FAILED
            self._held = ""
            if not self._name:
                self._name = name = found[1]
                if name not in self._schemas:
                    return FAILED
            else:
                self._key = found[1]

    def _argument(self, key: str) -> str:
        """The JSON text of one argument, with what stands before it."""
        value, self._value = "".join(self._value), []
        value = value.removeprefix("\n").removesuffix("\n")
        lead = ", " if self._keys else "{"
        self._keys.add(key)
        properties = self._schemas[self._name].get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return f"{lead}{json.dumps(key)}: {_as_json(value, schema)}"


def _may_begin_tag(text: str) -> bool:
    return not text or text.startswith("<")


def _as_json(value: str, schema: Any) -> str:
    """The value as JSON: a string where the schema says so or where it is nothing else."""
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return json.dumps(value)
    try:
        return json.dumps(json.loads(value, parse_constant=_no_constant))
    except (ValueError, RecursionError):
        return json.dumps(value)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
