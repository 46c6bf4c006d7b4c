"""What a check found: where, what, how bad, and what was probably meant.

Rules return `Problem`s, which know a place by its path within one document; `checker.py` turns them into `Finding`s,
which know the file and the line. Pure.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str | int, ...]
LIKENESS = 0.6  # of a misspelt name to the one that was meant
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")


class Severity(enum.Enum):
    """An error will not work, or not as written; a warning works and is probably not what was meant."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong at `path` of a document. `hint` is the nearest known name."""

    path: Path
    reason: str
    hint: str | None = None
    severity: Severity = Severity.ERROR


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a file; `line` counts from 1."""

    file: str
    line: int
    key: str
    reason: str
    hint: str | None
    severity: Severity

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}: {self.severity.value}: {self.key + ': ' if self.key else ''}"
        return place + self.reason + (f" (did you mean {self.hint!r}?)" if self.hint else "")

    def as_json(self) -> dict[str, object]:
        """Plain values for `--json`."""
        return {
            "file": self.file,
            "line": self.line,
            "key": self.key,
            "severity": self.severity.value,
            "reason": self.reason,
            "did_you_mean": self.hint,
        }


def warning(path: Path, reason: str, hint: str | None = None) -> Problem:
    """A problem that does not stop anything."""
    return Problem(path, reason, hint, Severity.WARNING)


def key_of(path: Path) -> str:
    """`spec.groups[0].labels["ray.io/x"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_KEY.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def nearest(name: object, known: Iterable[str], likeness: float | None = None) -> str | None:
    """The known name that was probably meant: the same but for case, dashes and underscores, else the closest.

    `likeness`: how alike it has to be, 0 to 1.
    """
    if not isinstance(name, str):
        return None
    candidates = sorted(set(known) - {name})
    same = [c for c in candidates if _squeezed(c) == _squeezed(name)]
    close = same or difflib.get_close_matches(name, candidates, n=1, cutoff=LIKENESS if likeness is None else likeness)
    return close[0] if close else None


def _squeezed(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
