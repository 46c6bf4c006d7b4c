"""Numbers as Kubernetes and Ray write them: quantities, versions, durations. Pure."""

from __future__ import annotations

import math
import re

_QUANTITY = re.compile(r"([+-]?[0-9]*\.?[0-9]+|[0-9]+\.)(Ki|Mi|Gi|Ti|Pi|Ei|[numkMGTPE]|[eE][+-]?[0-9]+)?")
_UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_VERSION = re.compile(r"v?([0-9]+)\.([0-9]+)(?:\.([0-9]+))?")
_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ns|us|ms|s|m|h))+")
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ns|us|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

Version = tuple[int, int, int]


def quantity(value: object) -> float | None:
    """`500m` as 0.5, `2Gi` as 2147483648.0; None for what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    found = _QUANTITY.fullmatch(str(value))
    if found is None:
        return None
    amount, unit = found[1], found[2] or ""
    if unit[:1] in ("e", "E") and unit != "E" and unit != "Ei":
        exact = float(f"{amount}{unit}")
    else:
        exact = float(amount) * (_BINARY[unit] if unit in _BINARY else _UNITS[unit])
    return exact if math.isfinite(exact) else None


def version(text: str) -> Version | None:
    """`2.60.0` (a suffix may follow) as (2, 60, 0)."""
    found = _VERSION.match(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def shown(value: Version) -> str:
    """`2.60.0`."""
    return ".".join(map(str, value))


def duration_s(text: str) -> float | None:
    """Seconds of a Go duration (`1h30m`) or of a plain number."""
    if text.isdigit():
        return float(text)
    if _DURATION.fullmatch(text) is None:
        return None
    return sum(float(amount) * _SECONDS[unit] for amount, unit in _DURATION_PART.findall(text))
