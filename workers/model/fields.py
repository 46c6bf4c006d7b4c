"""Checked access to the fields of a JSON object from a model directory.

Used by `config.py`. Knows nothing of models: it turns a missing, mistyped or out-of-range field into a ModelError that
names the file and the dotted key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.workers.errors import ModelError


@dataclass(frozen=True, slots=True)
class FieldReader:
    """One JSON object of the file `path`; `prefix` is the dotted key that leads to it."""

    raw: dict[str, Any]
    path: str
    prefix: str = ""

    def error(self, key: str, message: str) -> ModelError:
        """The error to raise for `key`."""
        return ModelError(f"{self.path}: {self.prefix}{key}: {message}", self.path)

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """An integer in [least, most]; null counts as missing."""
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "missing")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"{value!r} is not an integer")
        if not least <= value <= most:
            raise self.error(key, f"{value} is not in {least} .. {most}")
        return value

    def number(self, key: str, least: float, most: float, default: float | None = None) -> float:
        """A finite number in [least, most]; null counts as missing."""
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise self.error(key, f"{value!r} is not a number")
        if not least <= value <= most:
            raise self.error(key, f"{value} is not in {least} .. {most}")
        return float(value)

    def optional_integer(self, key: str, least: int, most: int, default: int | None) -> int | None:
        """As `integer`, but null is None, and so is a missing key without a default."""
        if self._absent(key, default):
            return None
        return self.integer(key, least, most, default)

    def optional_number(self, key: str, least: float, most: float, default: float | None = None) -> float | None:
        """As `number`, but null is None, and so is a missing key without a default."""
        if self._absent(key, default):
            return None
        return self.number(key, least, most, default)

    def _absent(self, key: str, default: float | None) -> bool:
        return self.raw[key] is None if key in self.raw else default is None

    def boolean(self, key: str, default: bool) -> bool:
        """True or false; null counts as missing."""
        value = self.raw.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"{value!r} is not true or false")
        return value

    def section(self, key: str) -> FieldReader:
        """The object under `key`."""
        value = self.raw.get(key)
        if not isinstance(value, dict):
            raise self.error(key, "must be an object")
        return FieldReader(value, self.path, f"{self.prefix}{key}.")
