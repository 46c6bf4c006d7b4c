"""What the HTTP application needs of the engine behind it: submit a request, read its deltas, cancel.

`penstock.cluster.generation` implements it over the router; tests use small fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.router.emission import Delta, TokenLogprob
from penstock.router.trail import Trail
from penstock.workers.protocol import GenerateRequest


class Generation(Protocol):
    """One choice being generated. Iteration ends after the delta whose `end` is set, or raises a PenstockError."""

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from a prefix cache; final once the first delta is there."""
        ...

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """One entry per prompt token, None for the first; final once the first delta is there, empty when not asked.

        NaN where a score was lost. Read it once: every call builds it anew.
        """
        ...

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """The last prompt token's hidden state, float32 [hidden size]; there with the first delta where asked."""
        ...

    @property
    def trail(self) -> Trail:
        """Where the request has been, and when; grows while it runs."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __anext__(self) -> Delta:
        """Everything new since the last read."""
        ...

    def finish(self) -> None:
        """The caller has all it wants before the end: a good end, and the work stops everywhere."""
        ...

    def cancel(self) -> None:
        """Stop the work everywhere; harmless at any time, also after the end."""
        ...


class Generator(Protocol):
    """Gives every request to the cluster."""

    def check(self, tenant: str) -> None:
        """Raises RefusedError where any request of the tenant would be refused now, before work is spent on one."""
        ...

    def submit(self, request: GenerateRequest) -> Generation:
        """Start it. Refusals come from the iteration."""
        ...
