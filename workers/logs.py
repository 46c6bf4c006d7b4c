"""How every process of the cluster writes its log: one line per record, as text or JSON, without what callers sent.

`configure` is called once per process, by `process.py` and `actor.py` here and by the ingress, the controller and the
launcher in `cluster/`. Records may carry fields in their `extra` under the key `fields` (the access log does).

Invariants: a record is one line, whatever characters it holds, so that nobody can forge a second one; tracebacks name
exception types and places in our code, and their messages only where those come from the machine or from ourselves:
a message of any other exception may quote what a caller sent.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from penstock.workers.errors import ConfigError, DeviceError, ModelError
from penstock.workers.settings import LogSettings

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_OPEN_MESSAGES = (OSError, MemoryError, ConfigError, ModelError, DeviceError)
_MAX_CAUSES = 8
_MAX_FRAMES = 20
_CHATTY = (
    "httpx",
    "httpcore",
    "opentelemetry",
    "urllib3",
    "asyncio",
)  # libraries; below warning they say nothing


def configure(settings: LogSettings, part: str, stream: TextIO | None = None) -> None:
    """Send this process's log to `stream` (standard error) in the one format. `part`: the process's name in it."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter(settings.format, part))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def formatter(kind: str, part: str) -> logging.Formatter:
    """The formatter of one process."""
    return _LineFormatter(_as_json if kind == "json" else _as_text, part)


def one_line(text: str) -> str:
    """The text with every control character and line separator escaped."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def describe_exception(error: BaseException) -> list[str]:
    """One line per exception of the chain, newest last: type, message where it is ours, and where it was raised."""
    lines: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(lines) < _MAX_CAUSES:
        seen.add(id(current))
        frames = traceback.extract_tb(current.__traceback__)[-_MAX_FRAMES:]
        places = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        said = f": {current}" if isinstance(current, _OPEN_MESSAGES) else ""
        lines.append(one_line(f"{type(current).__name__}{said} at {places}"))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return lines[::-1]


class _LineFormatter(logging.Formatter):
    """Renders records with one of the functions below."""

    def __init__(self, render: Callable[[logging.LogRecord, str], str], part: str) -> None:
        super().__init__()
        self._render = render
        self._part = part

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter.format`."""
        return self._render(record, self._part)


def _as_text(record: logging.LogRecord, part: str) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    head = f"{at}.{int(record.msecs):03d}Z {record.levelname} {part} {record.name}:"
    fields = " ".join(f"{name}={_word(value)}" for name, value in _fields(record).items())
    causes = " | ".join(_causes(record))
    said = (one_line(record.getMessage()), fields, causes and f"| {causes}")
    return f"{head} {' '.join(filter(None, said))}"


def _as_json(record: logging.LogRecord, part: str) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    line: dict[str, Any] = {
        "time": f"{at}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "part": part,
        "logger": record.name,
        "message": record.getMessage(),
        **_fields(record),
    }
    causes = _causes(record)
    if causes:
        line["exception"] = causes
    return json.dumps(line, ensure_ascii=True, default=str)  # ASCII: no line separator of any alphabet gets through


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def _causes(record: logging.LogRecord) -> list[str]:
    error = record.exc_info[1] if record.exc_info else None
    return describe_exception(error) if error is not None else []


def _word(value: object) -> str:
    """A value that stands in one piece in a line of text."""
    text = one_line(str(value))
    return json.dumps(text) if not text or re.search(r'[\s"=]', text) else text
