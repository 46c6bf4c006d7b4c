"""Fields of a body that this server does not know: accepted, as clients send extras, and told once in the log.

`service.py` asks per request; the names go back to a caller who asks for them. Bounded: so many names are logged, and
no more.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from penstock.cluster.ingress.openapi_bodies import Kind, Shape, body_schema
from penstock.cluster.settings import LimitSettings

log = logging.getLogger(__name__)

MAX_LOGGED = 256
MAX_NAMED = 32
_PLAIN = re.compile(r"[A-Za-z0-9_.-]{1,64}\Z")
_ANY_SHAPE = Shape(LimitSettings(), 1, 1)
KNOWN = {kind: frozenset(body_schema(kind, _ANY_SHAPE)["properties"]) for kind in Kind}


class IgnoredFields:
    """Remembers which names have been logged."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def note(self, kind: Kind, body: Mapping[str, Any]) -> tuple[str, ...]:
        """Unknown names of this body that are plain enough to be repeated, a few at most."""
        unknown = body.keys() - KNOWN[kind]
        if not unknown:
            return ()
        plain = sorted(name for name in unknown if _PLAIN.match(name))[:MAX_NAMED]
        for name in plain:
            if name not in self._logged and len(self._logged) < MAX_LOGGED:
                self._logged.add(name)
                log.info("field %r of %s is not known and was ignored; said once per name", name, kind.value)
        return tuple(plain)
