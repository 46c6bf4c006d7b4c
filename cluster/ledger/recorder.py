"""Writes down what readers of generations get, and judges it while serving.

A recorder stands between the service and its generator: whoever reads a generation through it has each piece noted.
Tests keep all entries (`Recorder`) and judge everything at rest;
`Ledger` keeps those of a share of the requests (`ledger.share`) until both the reader and the router's report have
said how it ended, judges that one request, counts violations by law (`penstock_ledger_violations`) and logs each with
its id. A counter and a log line rather than a file: both are collected already, rotate, and hold no content.

Runs on the ingress's loop. Bounded: beyond `MAX_OPEN` requests are not followed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from penstock.cluster.ingress.generator import Generation, Generator
from penstock.cluster.ledger.entries import Entry, Law, Terminal, Violation
from penstock.cluster.ledger.laws import ends_once, report_agrees, usage_is_true, whole_prefix
from penstock.router.emission import Delta, TokenLogprob
from penstock.router.journey import RequestReport
from penstock.router.trail import Trail
from penstock.workers.audit import is_sampled
from penstock.workers.errors import PenstockError
from penstock.workers.protocol import EndReason, GenerateRequest

MAX_OPEN = 1 << 16
_PATIENCE_S = 60.0  # between the two accounts of one request
log = logging.getLogger(__name__)
T = TypeVar("T")


def entry_of(request: GenerateRequest) -> Entry:
    """The page of a request that was just accepted; tokens it brings along count as delivered."""
    sampling = request.sampling
    tokens = list(request.emitted)
    return Entry(request.request_id, len(request.prompt), sampling.max_tokens, sampling.stop_token_ids, tokens)


class Recorded:
    """A generation whose every piece is written down before its reader gets it."""

    def __init__(self, generation: Generation, entry: Entry, over: Callable[[Entry], None]) -> None:
        self.entry = entry
        self._generation = generation
        self._over = over
        self._given = len(entry.tokens)

    @property
    def cached_tokens(self) -> int:
        """As the generation says."""
        return self._generation.cached_tokens

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        """As the generation says."""
        return self._generation.prompt_logprobs

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """As the generation says."""
        return self._generation.embedding

    @property
    def trail(self) -> Trail:
        """As the generation says."""
        return self._generation.trail

    def __aiter__(self) -> Recorded:
        return self

    async def __anext__(self) -> Delta:
        """The next piece, noted."""
        try:
            delta = await self._generation.__anext__()
        except StopAsyncIteration:
            raise
        except PenstockError as error:
            if self.entry.terminal is not Terminal.CANCELLED:  # else this is the echo of its own leaving
                self.entry.fail(error)
                self._over(self.entry)
            raise
        self.entry.give(self._given, delta.tokens)
        self._given += len(delta.tokens)
        if delta.end is not EndReason.NONE:
            left = self.entry.terminal is Terminal.CANCELLED  # somebody else took it away from its reader
            self.entry.finish(delta.end.name.lower())
            if not left:
                self._over(self.entry)
        return delta

    def finish(self) -> None:
        """The reader has all it wants."""
        if not self.entry.ends:
            self.entry.cut = True
            self.entry.finish("stop")
            self._over(self.entry)
        self._generation.finish()

    def cancel(self) -> None:
        """The reader goes away."""
        if not self.entry.ends:
            self.entry.cancel()
            self._over(self.entry)
        self._generation.cancel()


class Recorder:
    """A `Generator` that writes down every request it passes on."""

    def __init__(self, generator: Generator) -> None:
        self.entries: list[Entry] = []
        self._generator = generator

    def submit(self, request: GenerateRequest) -> Recorded:
        """Start it, on a page of its own."""
        entry = entry_of(request)
        self.entries.append(entry)
        return Recorded(self._generator.submit(request), entry, lambda _: None)


class Ledger:
    """The ledger of a serving ingress. `violated` is told each violation, by law."""

    def __init__(
        self, share: float, violated: Callable[[Law], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._share = share
        self._violated = violated
        self._clock = clock
        self._open: dict[str, Entry] = {}  # their readers have not said how they ended
        self._reported: OrderedDict[str, tuple[RequestReport, float]] = OrderedDict()  # waiting for their readers
        self._read: OrderedDict[str, tuple[Entry, float]] = OrderedDict()  # waiting for their reports

    def submit(self, generator: Generator, request: GenerateRequest) -> Generation:
        """Start a request, on a page of its own where it is sampled."""
        generation = generator.submit(request)
        if len(self._open) >= MAX_OPEN or not is_sampled(request.request_id, self._share):
            return generation
        entry = self._open[request.request_id] = entry_of(request)
        return Recorded(generation, entry, self._ended)

    def report(self, report: RequestReport) -> None:
        """The router says how a request ended."""
        self._sweep()
        read = self._read.pop(report.request_id, None)
        if read is not None:
            self._judge(read[0], report)
        elif report.request_id in self._open:
            self._reported[report.request_id] = report, self._clock()

    def _ended(self, entry: Entry) -> None:
        self._open.pop(entry.request_id, None)
        reported = self._reported.pop(entry.request_id, None)
        if reported is not None:
            self._judge(entry, reported[0])
        else:
            self._read[entry.request_id] = entry, self._clock()

    def _judge(self, entry: Entry, report: RequestReport) -> None:
        if entry.terminal is Terminal.COMPLETED and not entry.cut:
            entry.usage = report.prompt_tokens, report.generated_tokens  # what the answer tells the caller
        for violation in chain(
            ends_once([entry]), whole_prefix([entry]), usage_is_true([entry]), report_agrees(entry, report)
        ):
            self._tell(violation)

    def _sweep(self) -> None:
        """One account without the other is a violation of its own."""
        late = self._clock() - _PATIENCE_S
        for request_id in _older(self._read, late):
            self._tell(Violation(Law.COUNTERS_AGREE, request_id, "its reader was done, the router never reported it"))
        for request_id in _older(self._reported, late):
            self._open.pop(request_id, None)
            self._tell(Violation(Law.ENDS_ONCE, request_id, "the router reported it, its reader was told nothing"))

    def _tell(self, violation: Violation) -> None:
        self._violated(violation.law)
        log.error("ledger: %s", violation)


def followed(ledger: Ledger | None, generator: Generator) -> Generator:
    """The generator, with the sampled requests written down where there is a ledger."""
    return generator if ledger is None else _Followed(ledger, generator)


class _Followed:
    """A generator that a ledger reads along."""

    def __init__(self, ledger: Ledger, generator: Generator) -> None:
        self._ledger = ledger
        self._generator = generator

    def check(self, tenant: str) -> None:
        """See `Generator`; who is refused here was never accepted."""
        self._generator.check(tenant)

    def submit(self, request: GenerateRequest) -> Generation:
        """See `Generator`."""
        return self._ledger.submit(self._generator, request)


def _older(waiting: OrderedDict[str, tuple[T, float]], than: float) -> Iterator[str]:
    while waiting:
        request_id, (_, since) = next(iter(waiting.items()))
        if since > than:
            return
        del waiting[request_id]
        yield request_id
