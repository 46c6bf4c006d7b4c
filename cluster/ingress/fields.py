"""Typed, bounded readers for the fields of one JSON body; every complaint names its field.

Used by the request parsers of this folder. JSON's `null` counts as absent. Booleans are never numbers, numbers never
text. Knows the limits it is told, and nothing of what the fields mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from penstock.workers.errors import RequestError

MAX_SHOWN_CHARS = 60
_KINDS = {str: "a string", bool: "true or false", int: "an integer", dict: "an object"}


class Fields:
    """One JSON object and the way to its values."""

    __slots__ = ("_path", "_raw")

    def __init__(self, raw: Mapping[str, Any], path: str = "") -> None:
        self._raw = raw
        self._path = path

    def name(self, key: str) -> str:
        """The field's full name, as `param` reports it."""
        return f"{self._path}{key}"

    def raw(self, key: str) -> Any:
        """The value as parsed, None when absent."""
        return self._raw.get(key)

    def keys(self) -> list[str]:
        """Names present in the object."""
        return list(self._raw)

    def refuse(self, key: str, reason: str, code: str = "invalid_value") -> RequestError:
        """The error to raise about a field."""
        return RequestError(f"{self.name(key)}: {reason}", field=self.name(key), code=code)

    def boolean(self, key: str, default: bool = False) -> bool:
        """true or false."""
        value = self._raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, f"must be true or false, not {shown(value)}", "invalid_type")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int | None:
        """A whole number from `low` to `high`; 3.0 is not one."""
        value = self._raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, f"must be an integer, not {shown(value)}", "invalid_type")
        if not low <= value <= high:
            raise self.refuse(key, f"must be from {low} to {high}, not {shown(value)}", "out_of_range")
        return value

    def number(self, key: str, low: float, high: float, default: float, above: bool = False) -> float:
        """A finite number from `low` to `high`, more than `low` when `above`."""
        value = self._raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.refuse(key, f"must be a number, not {shown(value)}", "invalid_type")
        if (
            (isinstance(value, float) and not math.isfinite(value))
            or not low <= value <= high
            or (above and value == low)
        ):
            least = f"more than {low:g}" if above else f"at least {low:g}"
            raise self.refuse(key, f"must be {least} and at most {high:g}, not {shown(value)}", "out_of_range")
        return float(value)

    def text(self, key: str, max_bytes: int, default: str | None = None) -> str | None:
        """A string of at most `max_bytes` UTF-8 bytes."""
        value = self._raw.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.refuse(key, f"must be a string, not {shown(value)}", "invalid_type")
        if len(value.encode()) > max_bytes:
            raise self.refuse(key, f"is longer than {max_bytes} bytes", "too_long")
        return value

    def child(self, key: str) -> Fields | None:
        """A nested object."""
        value = self._raw.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refuse(key, f"must be an object, not {shown(value)}", "invalid_type")
        return Fields(value, f"{self.name(key)}.")

    def sized(self, key: str, kind: type, max_bytes: int) -> None:
        """Accepts any value of a kind whose JSON is short: fields that are taken and not used."""
        value = self._raw.get(key)
        if value is None:
            return
        if type(value) is not kind:
            raise self.refuse(key, f"must be {_KINDS[kind]}, not {shown(value)}", "invalid_type")
        if len(json.dumps(value)) > max_bytes:
            raise self.refuse(key, f"is longer than {max_bytes} bytes", "too_long")

    def only(self, key: str, allowed: tuple[object, ...]) -> None:
        """A field of which only the values that change nothing are accepted in this version."""
        value = self._raw.get(key)
        if value is not None and not any(value == one and type(value) is type(one) for one in allowed):
            raise self.refuse(key, f"{shown(value)} is not supported by this server", "unsupported_value")


def shown(value: object) -> str:
    """A short, safe rendering of a caller's value for an error text."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return "a huge number"
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
