"""What a worker says of itself to a ledger: its blocks counted twice, its sessions, and how sampled attempts ended.

The engine keeps an `AuditLog` while `ledger.share` is above 0 and answers `Engine.inspect` on its own thread, so that
the figures fit each other; `service.py` sends them as the answer to the `Audit` call; `cluster/ledger/` judges them.
Nothing of it is looked at by whoever serves a request: it is a second account. Bounded; no cost per token, and none at
all for requests that are not sampled. Ends are numbered and told a page at a time: who looks again and again hears what
is new, and asks for the next page while `EngineAccount.next_end` is below `ended_in_all`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

from penstock.workers.errors import IntegrityError, WireError
from penstock.workers.kv.block_account import BlockAccount
from penstock.workers.protocol import EndReason, FailureCode
from penstock.workers.scheduler.events import EndedEvent, RefusedEvent, SchedulerEvent, SequenceKey, StepOutcome
from penstock.workers.scheduler.scheduler import Scheduler

MAX_ENDED = 1 << 14  # that are kept
PAGE = 1 << 10  # ends of one answer
_MAX_OPEN = 1 << 16


@dataclass(frozen=True, slots=True)
class EndedAttempt:
    """One attempt that is over here. `tokens`: generated for its choice in all, or -1 where it failed."""

    request_id: str
    attempt: int
    tokens: int
    end: str  # "stop", "length", or a failure code


@dataclass(frozen=True, slots=True)
class EngineAccount:
    """What the engine has and holds between two steps."""

    blocks: BlockAccount
    fault: str = ""  # what the engine's own integrity check found
    sequences: int = 0  # that wait or run
    sessions: int = 0  # transfers that the engine waits for
    lingering: int = 0  # ended sequences whose blocks a transfer may still touch
    ended: tuple[EndedAttempt, ...] = ()  # in their order, from the one that was asked for, or the oldest kept
    ended_before: int = 0  # attempts that ended before these; more than was asked for: so many were forgotten
    ended_in_all: int = 0

    @property
    def next_end(self) -> int:
        """What to ask for next."""
        return self.ended_before + len(self.ended)


@dataclass(frozen=True, slots=True)
class WorkerAudit:
    """The whole answer; `transfers` are the `TransferCounters`."""

    worker_id: str
    incarnation: int
    account: EngineAccount
    transfers: dict[str, int]

    @staticmethod
    def from_plain(raw: dict[str, Any]) -> WorkerAudit:
        """Inverse of `dataclasses.asdict` behind JSON. Raises WireError for what is none."""
        try:
            account = raw["account"]
            ended = tuple(EndedAttempt(**each) for each in account["ended"])
            whole = EngineAccount(**{**account, "blocks": BlockAccount(**account["blocks"]), "ended": ended})
            return WorkerAudit(raw["worker_id"], raw["incarnation"], whole, dict(raw["transfers"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"no account of a worker: {error}") from error


def account_of(scheduler: Scheduler, sessions: int, log: AuditLog | None, after: int) -> EngineAccount:
    """With the ends that followed the first `after` ones. Engine thread only."""
    fault = ""
    try:
        scheduler.check_integrity()
    except IntegrityError as error:
        fault = str(error)
    stats = scheduler.stats()
    first, ended = (0, ()) if log is None else log.page(after)
    return EngineAccount(
        blocks=scheduler.account(),
        fault=fault,
        sequences=stats.running + stats.waiting,
        sessions=sessions,
        lingering=scheduler.lingering,
        ended=ended,
        ended_before=first,
        ended_in_all=0 if log is None else log.count,
    )


def is_sampled(request_id: str, share: float) -> bool:
    """Whether this request is in the sample; the same on every process."""
    if share >= 1.0:
        return True
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2.0**64


class AuditLog:
    """Ends of sampled attempts. Engine thread only."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._open: dict[SequenceKey, str] = {}
        self._ended: deque[EndedAttempt] = deque(maxlen=MAX_ENDED)
        self.count = 0  # ends so far, those that are no longer kept included

    def page(self, after: int) -> tuple[int, tuple[EndedAttempt, ...]]:
        """How many ended before these, and up to `PAGE` ends that followed the first `after` ones, oldest first."""
        oldest = self.count - len(self._ended)
        first = min(max(after, oldest), self.count)
        return first, tuple(itertools.islice(self._ended, first - oldest, first - oldest + PAGE))

    def received(self, key: SequenceKey, request_id: str) -> None:
        """A router asks for this attempt."""
        if len(self._open) < _MAX_OPEN and is_sampled(request_id, self._share):
            self._open[key] = request_id

    def happened(self, event: SchedulerEvent) -> None:
        """An attempt may have ended without a step."""
        if isinstance(event, EndedEvent):
            self._end(event.key, event.start + len(event.tokens), event.end.name.lower())
        elif isinstance(event, RefusedEvent):
            self.over(event.key, event.code)

    def stepped(self, outcome: StepOutcome) -> None:
        """Rows of a step may have ended their choice."""
        if not self._open or not outcome.ends.any():
            return
        for row in outcome.ends.nonzero()[0].tolist():
            router = outcome.router_ids[int(outcome.router_index[row])]
            key = SequenceKey(router, int(outcome.slots[row]), int(outcome.attempts[row]))
            self._end(key, int(outcome.starts[row]) + 1, EndReason(int(outcome.ends[row])).name.lower())

    def over(self, key: SequenceKey, code: FailureCode) -> None:
        """The attempt failed or was cancelled."""
        self._end(key, -1, code.value)

    def _end(self, key: SequenceKey, tokens: int, end: str) -> None:
        request_id = self._open.pop(key, None)
        if request_id is not None:
            self.count += 1
            self._ended.append(EndedAttempt(request_id, key.attempt, tokens, end))
