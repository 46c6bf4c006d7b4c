"""What reads one call's own text, and what it says of it: the part in which the formats differ.

`parsing.py` drives a `CallBody` per call; `object_body.py` and `tag_body.py` implement it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Schemas = Mapping[str, Mapping[str, Any]]  # of the arguments, by the names of the tools that may be called


@dataclass(frozen=True, slots=True)
class BodyStep:
    """What one piece of text told. `name` is told once, before the first of the arguments' JSON text.

    `rest`: the call is complete, and this follows it. `failed`: it is no call of a tool that may be called.
    """

    name: str = ""
    arguments: str = ""
    rest: str | None = None
    failed: bool = False


FAILED = BodyStep(failed=True)


class CallBody(Protocol):
    """One call being read. Never raises; is not asked again once it has failed or is complete."""

    def feed(self, text: str) -> BodyStep:
        """The next piece of the call's text, of any length."""
        ...
