"""From a request to its tokens, in one process: `Generator.submit` starts a request path, `Generation` reads it.

The HTTP front, the local cluster and the benchmarks call it; one generator per ingress process, on its asyncio loop.
Knows tokens only: text, stop strings and HTTP are the caller's. Every generation ends once: exhausted after a delta
with an `EndReason`, or with RefusedError, RequestError or another PenstockError raised to its reader, or cancelled.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.cluster.links import Links
from penstock.cluster.worker_link import LinkIdentity
from penstock.router.emission import Delta, Emission, TokenLogprob
from penstock.router.journey import RequestReport
from penstock.router.request_path import serve_request
from penstock.router.router import Router
from penstock.router.settings import RouterSettings
from penstock.router.trail import Trail
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest
from penstock.workers.tls import PeerTls

__all__ = ["Delta", "Generation", "GenerationTimings", "Generator", "TokenLogprob"]


@dataclass(slots=True)
class GenerationTimings:
    """Monotonic seconds; None until it happened."""

    submitted: float
    first_token: float | None = None
    ended: float | None = None


class Generation:
    """One choice on its way. Iterate to read; leave early with `cancel`."""

    def __init__(self, request: GenerateRequest, clock: Callable[[], float]) -> None:
        self.request = request
        self.timings = GenerationTimings(clock())
        self.emission = Emission.for_request(request, self._progress)
        self._clock = clock
        self._task: asyncio.Task[object] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._finished = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV came from a prefix cache; known once the first token is out."""
        return self.emission.cached_tokens

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """One entry per prompt token, None for the first; complete with the first delta, empty when not asked.

        Built at every call from the arrays that hold the scores, so read it once.
        """
        return self.emission.prompt_logprobs

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """The last prompt token's hidden state, float32 [hidden size]; there with the first delta where asked."""
        return self.emission.embedding

    @property
    def trail(self) -> Trail:
        """Where the request has been, and when; grows while it runs."""
        return self.emission.trail

    @property
    def ended(self) -> bool:
        """True once nothing runs for it any more."""
        return self._task is not None and self._task.done()

    def begin(self, path: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        """Run the request path; called once, by the generator."""
        self._task = asyncio.get_running_loop().create_task(path)
        self._task.add_done_callback(self._path_ended)
        return self._task

    def cancel(self) -> None:
        """The caller goes away; workers are told at once. Harmless after the end."""
        if self._task is not None:
            self._task.cancel()

    def finish(self) -> None:
        """The reader has all it wants, such as a whole stop string: a good end, and the work stops everywhere."""
        if not self.ended and not self.emission.ended:
            self.emission.conclude(EndReason.STOP)
        self.cancel()

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        """All tokens since the last call, at least one of them or the end. Raises what ended the request early."""
        while True:
            if self.emission.pending:
                delta = self.emission.take()
                self._finished = delta.end is not EndReason.NONE
                return delta
            if self._finished:
                raise StopAsyncIteration
            if self.ended:
                raise self._failure()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _failure(self) -> BaseException:
        task = self._task
        if task is None or task.cancelled():
            return RefusedError(FailureCode.CANCELLED, "the request was cancelled")
        return task.exception() or RefusedError(FailureCode.INTERNAL, "the request ended without an end")

    def _progress(self) -> None:
        if self.timings.first_token is None:
            self.timings.first_token = self._clock()
        self._wake()

    def _path_ended(self, task: asyncio.Task[object]) -> None:
        self.timings.ended = self._clock()
        if not task.cancelled():
            task.exception()  # read here, so that nobody is warned about a failure whose reader has left
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Generator:
    """Starts request paths over the links of this process."""

    def __init__(self, links: Links, router: Router) -> None:
        self.links = links
        self.router = router
        self._open: set[asyncio.Task[object]] = set()

    @property
    def open_generations(self) -> int:
        """Request paths running now."""
        return len(self._open)

    def check(self, tenant: str) -> None:
        """Raises RefusedError where any request of the tenant would be refused now, before work is spent on one."""
        self.router.admission.check(tenant, self.links.now())

    def submit(self, request: GenerateRequest) -> Generation:
        """Start serving `request`; returns at once. Whether it is admitted shows when the generation is read."""
        generation = Generation(request, self.links.now)
        task = generation.begin(serve_request(request, self.links, self.router, generation.emission))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        return generation

    def cut(self) -> None:
        """End what runs with a typed error for its reader."""
        self.router.cut()

    async def close(self) -> None:
        """Cancel what runs and drop the links."""
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self.links.close()


def open_generator(
    settings: RouterSettings,
    cluster_key: str,
    *,
    lease_s: float = 10.0,
    observe: Callable[[RequestReport], None] | None = None,
    on_fleet_change: Callable[[], None] | None = None,
    tls: PeerTls | None = None,
) -> Generator:
    """A generator without workers yet: give it rosters by `generator.links.update`. Must run on its loop."""
    router = Router(settings, seed=int.from_bytes(os.urandom(8), "little"), observe=observe)
    identity = LinkIdentity(f"router-{os.urandom(8).hex()}", 1, cluster_key, lease_s, tls)
    return Generator(Links(router, identity, on_fleet_change), router)
