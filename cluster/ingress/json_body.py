"""A JSON object out of the bytes of a body, or a 400: nothing that a parser, a log or an encoder could choke on later.

Used by `service.py`. Refused: bad UTF-8, lone surrogates, NaN and Infinity, nesting beyond `MAX_DEPTH`, a name twice
in one object (gateways and servers disagree which one counts), anything but an object at the top, and bodies of so
many values that parsing them would hold up everybody else: their punctuation is counted before, that in strings too.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from penstock.cluster.ingress.errors import HttpProblem

MAX_DEPTH = 64
MAX_MEMBERS = 500_000  # lists, objects and names
MAX_COMMAS = 2_000_000
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89abcdefABCDEF]")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The body. Raises HttpProblem 400."""
    brackets = raw.count(b"[") + raw.count(b"{")
    if brackets + raw.count(b":") > MAX_MEMBERS or raw.count(b",") > MAX_COMMAS:
        raise _wrong("the body holds too many values")
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant, object_pairs_hook=_once)
        if _SURROGATE_ESCAPE.search(raw):
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise _wrong("the body is nested too deeply") from None
    except UnicodeError:
        raise _wrong("the body is not valid UTF-8") from None
    except ValueError as error:
        raise _wrong(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(body, dict):
        raise _wrong("the body must be a JSON object")
    if brackets > MAX_DEPTH:
        _check_depth(body)
    return body


def _check_depth(body: object) -> None:
    level = [body]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            inner += [item for item in items if isinstance(item, (dict, list))]
        if not inner:
            return
        level = inner
    raise _wrong("the body is nested too deeply")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _wrong(reason: str) -> HttpProblem:
    return HttpProblem(400, "invalid_request_error", reason, code="invalid_json")
