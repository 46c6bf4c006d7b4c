"""One session as the sending worker sees it: what was offered, what is still to be sent, and how it stands.

    opening -> fragments are offered and sent -> Finish sent -> Ack

Used by `sender.py`, which does the bytes and the talking; pure apart from that, the clock's reading comes in.

Invariants: a block stays in `_blocks` (may be read) until the session ends; Finish goes out only when nothing is left
to send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.workers import fault_points
from penstock.workers.fault_points import Point
from penstock.workers.protocol import Grant
from penstock.workers.transfer.incoming import MAX_RESEND_ROUNDS, SessionError
from penstock.workers.transfer.port import HostBlocks, Tail


@dataclass(frozen=True, slots=True)
class Reading:
    """The blocks of one frame to come: (fragment, block) pairs and their bytes, None where nobody needs them."""

    batch: list[tuple[int, int]]
    host: HostBlocks | None

    def release(self) -> None:
        """The bytes are needed no more."""
        if self.host is not None:
            self.host.release()


class OutgoingSession:
    """Book-keeping of one started session."""

    __slots__ = ("_blocks", "_rounds", "_unsent", "finished_at", "grant", "opened", "probe", "reading", "tail")

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.opened = False  # Open was sent
        self.tail: Tail | None = None
        self.finished_at: float | None = None  # Finish was sent
        self.reading: Reading | None = None  # taken, not sent yet
        self.probe: int | None = None  # whose answer says that the peer has caught up; see `Sender.probe`
        self._blocks: dict[int, int] = {}
        self._unsent: deque[int] = deque()
        self._rounds = 0

    @property
    def unsent(self) -> bool:
        """There are blocks to take."""
        return bool(self._unsent)

    @property
    def ready(self) -> bool:
        """There is something to send."""
        return not self.opened or self.unsent or self.reading is not None or self.finish_due

    @property
    def finish_due(self) -> bool:
        """Everything has been sent and Finish has not."""
        return self.tail is not None and not self._unsent and self.reading is None and self.finished_at is None

    @property
    def probe_due(self) -> bool:
        """Somebody wants to know when the peer has everything, and all of it has been sent."""
        return self.probe == 0 and self.opened and not self._unsent and self.reading is None

    def offer(self, fragments: Sequence[tuple[int, int]]) -> None:
        """Queue (fragment, local block) pairs. Raises SessionError for one outside the grant; repeats are ignored."""
        for fragment, block in fragments:
            if not 0 <= fragment < len(self.grant.blocks):
                raise SessionError(f"fragment {fragment} offered to a grant of {len(self.grant.blocks)}")
            if fragment not in self._blocks:
                self._blocks[fragment] = block
                self._unsent.append(fragment)

    def finish(self, tail: Tail) -> None:
        """All fragments are offered. Raises SessionError when some are not."""
        due = len(self.grant.blocks) if tail.fragments is None else tail.fragments
        if len(self._blocks) != due:
            raise SessionError(f"finished with {len(self._blocks)} of {due} fragments offered")
        if self.tail is None:
            self.tail = tail

    def take(self, limit: int) -> list[tuple[int, int]]:
        """The next at most `limit` (fragment, local block) pairs to send."""
        return [(fragment, self._blocks[fragment]) for fragment in self._take_unsent(limit)]

    def choose(self, limit: int, worker_id: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(the next pairs, those of them that really leave); different only where a test breaks the transfer."""
        plan = fault_points.plan
        if plan is None or not plan.watches(worker_id, Point.TRANSFER_SEND, Point.TRANSFER_SENT):
            taken = self.take(limit)
            return taken, taken
        taken = self.take(1)
        send = Point.TRANSFER_SEND
        leaving = [pair for pair in taken for _ in range(fault_points.times(send, worker_id, pair[0]))]
        return taken, leaving

    def put_back(self, batch: Sequence[tuple[int, int]]) -> None:
        """These were taken and could not be sent: they come first again."""
        self._unsent.extendleft(fragment for fragment, _ in reversed(batch))

    def _take_unsent(self, limit: int) -> list[int]:
        return [self._unsent.popleft() for _ in range(min(limit, len(self._unsent)))]

    def resend(self, fragments: Sequence[int]) -> None:
        """The peer lacks these after Finish: send both again. Raises SessionError when it asks too often."""
        if self.finished_at is None:
            return  # an answer to an earlier Finish, delivered late: the fragments are on their way
        self._rounds += 1
        if self._rounds > MAX_RESEND_ROUNDS or any(fragment not in self._blocks for fragment in fragments):
            raise SessionError("the receiver asked for the same fragments too often")
        self._unsent.extend(fragments)
        self.finished_at = None
