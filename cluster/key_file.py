"""Reads the file of API keys: who may ask, as whom, for which models, and how much. YAML, safely loaded.

    - name: team-a                 # for logs and metrics; unique
      key: sk-...                  # or key_sha256: the hex SHA-256 of the key, so that the file holds no secret
      tenant: research             # shares fairness and prefix caches; default: the name
      models: [penstock-embedded]  # default: all
      max_open_requests: 8         # default: no limit of its own
      requests_per_minute: 600
      tokens_per_minute: 100000
      max_tokens: 4096             # of one choice
      not_after: 2027-01-31        # the last day (UTC), or a time, on which the key opens anything
      ttft_target_s: 5             # refuse at once what would wait longer for its first token; lowers the router's own
      operator: false              # may also read /metrics and /status

Called when the configuration is checked, when an ingress starts, and when the file has changed
(`ingress/key_watch.py`). Keys are kept as digests only. Knows no HTTP.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import yaml

from penstock.workers.errors import ConfigError

MAX_FILE_BYTES = 4 << 20
MAX_KEYS = 10_000
MAX_RATE = 1 << 50
SETTING = "front.api_keys_file"
_NAME = re.compile(r"[A-Za-z0-9_.:@-]{1,64}\Z")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}\Z")
_LIMITS = ("max_open_requests", "requests_per_minute", "tokens_per_minute", "max_tokens", "ttft_target_s")
_KNOWN = {"name", "key", "key_sha256", "tenant", "models", "operator", "not_after", *_LIMITS}


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """One key. Limits are per ingress cluster; None = none."""

    name: str
    digest: bytes = field(repr=False)  # SHA-256 of the key
    tenant: str = "default"
    models: tuple[str, ...] = ()  # empty = all
    operator: bool = False
    max_open_requests: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_tokens: int | None = None  # of one choice
    not_after: float | None = None  # seconds since the epoch
    ttft_target_s: int | None = None


def key_digest(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).digest()


def read_key_file(path: Path) -> tuple[KeyEntry, ...]:
    """All keys of the file. Raises ConfigError naming the file and the entry, never a key."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise _wrong(path, f"larger than {MAX_FILE_BYTES} bytes")
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        raise _wrong(path, "is not YAML") from None  # the parser's words may quote a key
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_KEYS:
        raise _wrong(path, f"must be a list of 1 to {MAX_KEYS} keys")
    entries = tuple(_entry(item, f"{path}: entry {number}") for number, item in enumerate(raw, 1))
    for what, values in (("name", [e.name for e in entries]), ("key", [e.digest for e in entries])):
        if len(set(values)) < len(values):
            raise _wrong(path, f"two entries have the same {what}")
    return entries


def _entry(raw: object, place: str) -> KeyEntry:
    if not isinstance(raw, Mapping):
        raise _wrong(place, "must have the keys " + ", ".join(sorted(_KNOWN)))
    unknown = sorted(str(key)[:64] for key in raw if key not in _KNOWN)
    if unknown:
        raise _wrong(place, f"unknown key {unknown[0]!r}; known are {', '.join(sorted(_KNOWN))}")
    name = _name(raw, "name", place, None)
    models = raw.get("models") or ()
    if not isinstance(models, (list, tuple)) or not all(isinstance(model, str) and model for model in models):
        raise _wrong(place, "'models' must be a list of names")
    operator = raw.get("operator", False)
    if not isinstance(operator, bool):
        raise _wrong(place, "'operator' must be true or false")
    limits = {limit: _limit(raw, limit, place) for limit in _LIMITS}
    tenant = _name(raw, "tenant", place, name)
    until = _not_after(raw.get("not_after"), place)
    return KeyEntry(name, _digest(raw, place), tenant, tuple(models), operator, **limits, not_after=until)


def _digest(raw: Mapping[Any, Any], place: str) -> bytes:
    key, sha256 = raw.get("key"), raw.get("key_sha256")
    if (key is None) == (sha256 is None):
        raise _wrong(place, "needs either 'key' or 'key_sha256'")
    if key is not None:
        if not isinstance(key, str) or not 1 <= len(key) <= 512 or not key.isascii() or any(c.isspace() for c in key):
            raise _wrong(place, "'key' must be 1 to 512 ASCII characters without spaces")
        return key_digest(key)
    if not isinstance(sha256, str) or not _SHA256.match(sha256):
        raise _wrong(place, "'key_sha256' must be 64 hex digits")
    return bytes.fromhex(sha256)


def _name(raw: Mapping[Any, Any], key: str, place: str, default: str | None) -> str:
    value = raw.get(key, default)
    if not isinstance(value, str) or not _NAME.match(value):
        raise _wrong(place, f"{key!r} must be 1 to 64 letters, digits or any of _.:@-")
    return value


def _limit(raw: Mapping[Any, Any], key: str, place: str) -> int | None:
    value = raw.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RATE):
        raise _wrong(place, f"{key!r} must be a whole number of at least 1")
    return value


def _not_after(value: object, place: str) -> float | None:
    """The end of a day, or a moment; without a zone it is UTC's."""
    if value is None:
        return None
    try:
        stated = datetime.fromisoformat(value) if isinstance(value, str) and len(value) > len("2027-01-31") else value
        day = date.fromisoformat(stated) if isinstance(stated, str) else stated
        if isinstance(day, datetime):
            return (day if day.tzinfo is not None else day.replace(tzinfo=UTC)).timestamp()
        if isinstance(day, date):
            return (datetime.combine(day, time(), UTC) + timedelta(days=1)).timestamp()
    except (ValueError, OverflowError):
        pass
    raise _wrong(place, "'not_after' must be a date or a time, as 2027-01-31 or 2027-01-31T12:00:00Z")


def _wrong(place: Path | str, reason: str) -> ConfigError:
    return ConfigError(f"{SETTING}: {place}: {reason}", key=SETTING)
