"""The stream to one worker: attach, deliver what comes, renew the lease, come back after a break.

`links.py` keeps one per live worker of the roster. Token rows go straight into the emissions of their requests (no
await, no event); heartbeats and cache events go to the router. Knows gRPC only as `WorkerClient`, and nothing of how
requests are placed.

Invariants: a slot points to at most one seat and is not used twice on a stream; when the stream breaks, every seat on
it hears `Lost` once, after the router has heard of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from penstock.cluster.channel import Answer, Finding, Order, Seat
from penstock.cluster.roster import RosterEntry
from penstock.router.emission import TokenLogprob
from penstock.router.router import Router
from penstock.workers.call_seal import WorkerName
from penstock.workers.errors import RefusedError, WireError
from penstock.workers.protocol import (
    OLDEST_WIRE_VERSION,
    WIRE_VERSION,
    Cancel,
    Embedding,
    Failed,
    FailureCode,
    Granted,
    Hello,
    KeepAlive,
    KVEvents,
    KVSnapshot,
    Load,
    PromptLogprobs,
    Queued,
    RequestSnapshot,
    Started,
    Stays,
    TokenFrame,
    ToRouter,
    Welcome,
)
from penstock.workers.rpc import AttachedStream, WorkerClient
from penstock.workers.tls import PeerTls

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0
MAX_SLOT = 0xFFFF_FFFF


@dataclass(frozen=True, slots=True)
class LinkIdentity:
    """Who this router is towards every worker."""

    router_id: str
    router_epoch: int
    cluster_key: str = field(repr=False)
    lease_s: float
    tls: PeerTls | None = None


class WorkerLink:
    """One worker's stream and the slots on it. `on_attached` is called after each Welcome and after each break."""

    def __init__(
        self, entry: RosterEntry, identity: LinkIdentity, router: Router, on_attached: Callable[[], None] | None = None
    ) -> None:
        self.entry = entry
        self.load: Load | None = None
        self.load_at = 0.0
        self.welcome: Welcome | None = None
        self._identity = identity
        self._router = router
        self._on_attached = on_attached
        self._stream: AttachedStream | None = None
        self._seats: dict[int, Seat] = {}
        self._next_slot = 0
        self._epoch = identity.router_epoch
        self._wire_version = WIRE_VERSION  # the newest, until the worker refuses it
        self._ended = False
        self._closing: asyncio.Future[None] | None = None
        self._task = asyncio.ensure_future(self._run())

    @property
    def attached(self) -> bool:
        """True between Welcome and the end of the stream."""
        return self._stream is not None

    def cut(self, reason: str) -> None:
        """Break the stream on purpose; the link tries again."""
        self._drop(reason)

    async def close(self) -> None:
        """End for good."""
        self._ended = True  # a stream that is being cut swallows the cancellation of its reader
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._drop("the link is closing")
        if self._closing is not None:
            await self._closing

    # --- for channels ---------------------------------------------------------------------------------------------

    def occupy(self, seat: Seat) -> int:
        """A free slot, pointing to the seat from now on."""
        self._next_slot = self._next_slot % MAX_SLOT + 1
        while self._next_slot in self._seats:
            self._next_slot = self._next_slot % MAX_SLOT + 1
        self._seats[self._next_slot] = seat
        return self._next_slot

    def post(self, order: Order) -> None:
        """Send; if the stream is over, its end is told to every seat soon anyway."""
        if self._stream is not None:
            self._stream.send(order)

    def vacate(self, seat: Seat, cancel: bool) -> None:
        """Free the seat's slot."""
        if self._seats.pop(seat.slot, None) is not None and cancel and self._stream is not None:
            self._stream.send(Cancel(seat.slot, seat.attempt))

    # --- the stream -----------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        retry_s = FIRST_RETRY_S
        name = WorkerName(self.entry.worker_id, self.entry.incarnation)
        client = WorkerClient(self.entry.address, self._identity.cluster_key, name, self._identity.tls)
        try:
            while not self._ended:
                try:
                    await self._converse(client)
                    retry_s = FIRST_RETRY_S
                except (RefusedError, WireError) as error:
                    if self._stream is not None:
                        retry_s = FIRST_RETRY_S
                    self._drop(str(error))
                    refused = isinstance(error, WireError) or error.code is FailureCode.INCOMPATIBLE
                    if refused and self.welcome is None and self._try_older():
                        continue
                    log.log(logging.WARNING if refused else logging.DEBUG, "%s: %s", self.entry.worker_id, error)
                if not self._ended:
                    await asyncio.sleep(retry_s)
                retry_s = min(LONGEST_RETRY_S, retry_s * 2)
        finally:
            await client.close()

    def _try_older(self) -> bool:
        """A worker that has never welcomed us may be of the version before; False where all have been tried."""
        older = self._wire_version > OLDEST_WIRE_VERSION
        self._wire_version = self._wire_version - 1 if older else WIRE_VERSION
        return older

    async def _converse(self, client: WorkerClient) -> None:
        """One stream from hello to its end. Raises RefusedError or WireError when it breaks."""
        identity = self._identity
        # A new epoch for every stream: what ran on a broken one was given up, so the worker shall end it too.
        self._epoch += 1
        hello = Hello(self._wire_version, identity.router_id, self._epoch, identity.lease_s)
        stream = await client.attach(hello, version=self._wire_version)
        renewal = asyncio.ensure_future(self._renew(stream))
        try:
            welcome = stream.welcome
            if welcome.worker_id != self.entry.worker_id:
                raise WireError(f"{self.entry.address} is {welcome.worker_id}, not {self.entry.worker_id}")
            if welcome.width < 1:
                raise WireError(f"{welcome.worker_id} says that it consists of {welcome.width} ranks")
            self.welcome = welcome
            self._stream = stream
            self._router.worker_joined(welcome, asyncio.get_running_loop().time())
            stream.send(RequestSnapshot())
            self._tell()
            async for message in stream:
                self._router.heard(welcome.worker_id)
                self._deliver(message)
        finally:
            renewal.cancel()
            await stream.close()

    async def _renew(self, stream: AttachedStream) -> None:
        while True:
            await asyncio.sleep(self._identity.lease_s / 4)
            stream.send(KeepAlive())

    def _drop(self, reason: str) -> None:
        """Forget the stream: the router first, then every seat, so that a retry sees the worker as gone."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        self.load = None
        self._router.worker_lost(self.entry.worker_id, reason, asyncio.get_running_loop().time())
        seats, self._seats = list(self._seats.values()), {}
        for seat in seats:
            seat.lost(reason)
        self._tell()
        self._closing = asyncio.ensure_future(stream.close())

    def _tell(self) -> None:
        if self._on_attached is not None:
            self._on_attached()

    def _deliver(self, message: ToRouter) -> None:
        match message:
            case TokenFrame():
                self._deliver_frame(message)
            case Queued() | Granted() | Started() | Failed() | Stays():
                self._answer(message)
            case PromptLogprobs() | Embedding():
                self._learn(message)
            case Load():
                self.load, self.load_at = message, asyncio.get_running_loop().time()
                self._router.load_arrived(self.entry.worker_id, message, self.load_at)
            case KVEvents():
                if self._router.kv_events(self.entry.worker_id, message) and self._stream is not None:
                    self._stream.send(RequestSnapshot())
            case KVSnapshot():
                self._router.kv_snapshot(self.entry.worker_id, message)
            case Welcome():
                raise WireError(f"worker {self.entry.worker_id} said Welcome twice")

    def _answer(self, message: Answer) -> None:
        seat = self._seats.get(message.slot)
        if seat is not None and seat.attempt == message.attempt:
            seat.answer(message)

    def _learn(self, finding: Finding) -> None:
        seat = self._seats.get(finding.slot)
        if seat is not None and seat.attempt == finding.attempt:
            seat.learn(finding)

    def _deliver_frame(self, frame: TokenFrame) -> None:
        """Hand every row to its emission. Runs once per engine step; lists, because numpy scalars are slow to touch."""
        seats = self._seats
        tokens = frame.tokens.tolist()
        columns = zip(
            frame.slots.tolist(),
            frame.attempts.tolist(),
            frame.starts.tolist(),
            frame.counts.tolist(),
            frame.ends.tolist(),
            strict=True,
        )
        logprobs = token_logprobs(frame) if len(frame.logprobs) else None
        begin = 0
        for slot, attempt, start, count, end in columns:
            stop = begin + count
            seat = seats.get(slot)
            if seat is not None and seat.attempt == attempt:
                row = logprobs[begin:stop] if logprobs is not None else None
                asked = row is not None and not any(item is None for item in row)
                seat.apply(start, tokens[begin:stop], end, row if asked else None)  # type: ignore[arg-type]  # no None in it
            begin = stop


def token_logprobs(frame: TokenFrame) -> list[TokenLogprob | None]:
    """One entry per token of the frame, None where its row did not ask."""
    ids, values = frame.top_ids.tolist(), frame.top_logprobs.tolist()
    ends = np.cumsum(frame.top_counts, dtype=np.int64).tolist()
    chosen = frame.logprobs.tolist()
    found: list[TokenLogprob | None] = []
    begin = 0
    for logprob, end in zip(chosen, ends, strict=True):
        asked = logprob == logprob  # NaN marks tokens of rows that did not ask
        found.append(
            TokenLogprob(logprob, tuple(zip(ids[begin:end], values[begin:end], strict=True))) if asked else None
        )
        begin = end
    return found
