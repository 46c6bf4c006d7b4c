"""What the HTTP application needs of the engine behind it: submit a request, read its deltas, cancel.

`penstock.cluster.generation` implements it over the router; tests use small fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from penstock.router.emission import Delta
from penstock.workers.protocol import GenerateRequest


class Generation(Protocol):
    """One choice being generated. Iteration ends after the delta whose `end` is set, or raises a PenstockError."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from a prefix cache; final once the first delta is there."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __anext__(self) -> Delta:
        """Everything new since the last read."""
        ...

    def cancel(self) -> None:
        """Stop the work everywhere; harmless at any time, also after the end."""
        ...


class Generator(Protocol):
    """Gives every request to the cluster."""

    def submit(self, request: GenerateRequest) -> Generation:
        """Start it. Refusals come from the iteration."""
        ...
