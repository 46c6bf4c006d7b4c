"""What a ledger writes down of each request, as its reader saw it, and what it calls a violation. Plain data.

Filled by `recorder.py` (in a serving ingress and in tests) or by a test's HTTP client, judged by `laws.py`. Knows no
router: a request that the router believes to have answered is here what its reader got.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import FailureCode


class Terminal(StrEnum):
    """How a request ended for its reader; each accepted request in exactly one."""

    PENDING = "pending"  # it has not ended
    COMPLETED = "completed"
    CLIENT_ERROR = "client_error"
    SHED = "shed"
    CANCELLED = "cancelled"
    FAILED = "failed"  # with a typed error
    SILENT = "silent"  # the stream was over without an end and without an error, or with one that nobody made


CLIENT_ERRORS = frozenset({FailureCode.BAD_REQUEST, FailureCode.TOO_LARGE, FailureCode.GRAMMAR})
SHED = frozenset({FailureCode.OVERLOADED, FailureCode.QUEUE_FULL, FailureCode.TENANT_LIMIT, FailureCode.DRAINING})


class Law(StrEnum):
    """What is to hold; a closed set, a label of metrics."""

    ENDS_ONCE = "L1"  # every accepted request ends, in exactly one way
    WHOLE_PREFIX = "L2"  # tokens without gap or double, those of the oracle; a completed request has all
    BLOCKS_BACK = "L3"  # KV blocks allocated - freed = live, and nothing is live at rest
    TRANSFERS_END = "L4"  # transfers started = done + failed + expired; nothing counts unchecked
    NOTHING_FOREIGN = "L5"  # no request shows another's canary
    USAGE_IS_TRUE = "L6"  # usage = delivered tokens, prompt once
    COUNTERS_AGREE = "L7"  # metrics, reports and traces say what the ledger says
    FOOTPRINT_BACK = "L8"  # processes, threads, descriptors, shared memory, memory as before


@dataclass(frozen=True, slots=True)
class Violation:
    """A law that does not hold: ids and figures, never a prompt's or an answer's content."""

    law: Law
    who: str  # a request's id, a worker's, or what is counted
    evidence: str

    def __str__(self) -> str:
        return f"{self.law}: {self.who}: {self.evidence}"


@dataclass(slots=True)
class Entry:
    """One request. `tokens`: what its reader was given, in order, by the index that came with it."""

    request_id: str
    prompt_tokens: int
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    terminal: Terminal = Terminal.PENDING
    code: str = ""  # of a typed error
    end: str = ""  # "stop" or "length", where it completed
    ends: int = 0  # how often an end was told
    misplaced: int = 0  # tokens that came with an index other than the next one
    usage: tuple[int, int] | None = None  # prompt and completion tokens, as the caller was told
    cut: bool = False  # its reader had what it wanted before the end (a stop string)

    def give(self, start: int, tokens: tuple[int, ...]) -> None:
        """The reader got these, the first of which is generated token `start`."""
        self.misplaced += start != len(self.tokens)
        self.tokens += tokens

    def finish(self, end: str) -> None:
        """The reader was told that this was all."""
        self._over(Terminal.COMPLETED)
        self.end = end

    def fail(self, error: BaseException) -> None:
        """The reader got this instead of an end."""
        if isinstance(error, RequestError):
            self._over(Terminal.CLIENT_ERROR)
            self.code = FailureCode.BAD_REQUEST
        elif isinstance(error, RefusedError):
            self._over(terminal_of(error.code))
            self.code = error.code
        else:
            self._over(Terminal.SILENT)
            self.code = type(error).__name__

    def cancel(self) -> None:
        """The reader went away."""
        if self.terminal is Terminal.PENDING:
            self._over(Terminal.CANCELLED)

    def _over(self, terminal: Terminal) -> None:
        """One that left while its end was on its way, and is told it after all, has ended once."""
        self.ends += self.terminal is not Terminal.CANCELLED
        self.terminal = terminal


def terminal_of(code: str) -> Terminal:
    """The class of a failure code, or of a router report's terminal state."""
    if code == "completed":
        return Terminal.COMPLETED
    if code in CLIENT_ERRORS:
        return Terminal.CLIENT_ERROR
    if code in SHED:
        return Terminal.SHED
    return Terminal.CANCELLED if code == FailureCode.CANCELLED else Terminal.FAILED
