"""The one ordered channel on which rank 0 tells the others what to do: step plans, and what belongs between them.

The `GroupRunner` sends on the engine thread; a follower receives on its main thread, acts, and answers with its part of
a step where the runner has one to give. Nothing polls: a rank sleeps in its connection until something comes. A large
body goes through shared memory to ranks on this host and inside the frame to the others; either way it is authentic,
and what a follower gets is its own copy.

Knows frames and codecs, neither runners nor what a message leads to. All frames of one connection are counted
(`group_link.py`), so a plan that was lost, doubled or sent by a former life of the group is an IntegrityError before
anything of it is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.workers.errors import GroupError, IntegrityError, WireError
from penstock.workers.parallel.group_link import Frame, GroupLink
from penstock.workers.parallel.group_messages import BlocksRenewed, GroupMessage, decode_message, encode_message
from penstock.workers.parallel.plan_codec import decode_plan, encode_plan
from penstock.workers.parallel.step_ring import RingReader, RingWriter
from penstock.workers.scheduler.plan import StepPlan

_PLAN, _MESSAGE, _PART = 1, 2, 3
_IN_RING = 1
_INLINE_BYTES = 4096  # a body up to this goes inside the frame: copying it once more costs less than a second place
RING_TIMEOUT_S = 60.0  # the group's watch ends a stuck rank long before


class StepSender:
    """Rank 0's end: one connection per follower, in rank order from rank 1."""

    def __init__(self, links: Sequence[GroupLink], ring: RingWriter | None) -> None:
        self._links = dict(enumerate(links, start=1))  # by rank; never changed, only replaced
        self._ring = ring
        self.broken: tuple[int, ...] = ()  # ranks to which something could not be sent
        self._lock = threading.Lock()  # a message stays in its place between plans
        self._generations = self._told = self._own = np.zeros(0, np.uint64)
        self.sequence = 0  # of the last plan or message

    def announce(self, generations: NDArray[np.uint64], own: NDArray[np.uint64] | None = None) -> None:
        """From now on tell, before anything else, which blocks' generations in this array have changed.

        `own`: the leading ones, of rank 0's storage, where that has an array of its own; it is kept equal.
        """
        self._generations, self._told = generations, np.zeros_like(generations)
        self._own = np.zeros(0, np.uint64) if own is None else own

    def send_plan(self, plan: StepPlan) -> int:
        """Every rank is to run this; its sequence number. Raises GroupError where a rank takes nothing for too long."""
        return self._publish(_PLAN, encode_plan(plan))

    def send(self, message: GroupMessage) -> int:
        """Every rank is to act on this once it has done what was sent before. Raises as `send_plan`."""
        return self._publish(_MESSAGE, encode_message(message))

    def parts(self, sequence: int) -> list[bytearray]:
        """What every follower answers to the plan of this number, in rank order. Waits. Raises GroupError."""
        answers = []
        for rank, link in self._links.items():
            frame = link.receive()
            if frame.kind != _PART or frame.place != sequence:
                raise IntegrityError(f"rank {rank} answers to message {frame.place}, not to {sequence}")
            answers.append(frame.body)
        return answers

    def leave_out(self, rank: int) -> None:
        """This rank's process has ended: nothing is sent to it or waits for it any more. From any thread."""
        links = dict(self._links)
        link = links.pop(rank, None)
        self._links = links
        if link is None:
            return
        if self._ring is not None and link.local:
            self._ring.leave_out(rank - 1)
        link.close()

    def close(self) -> None:
        """Followers see the end of the channel."""
        for link in self._links.values():
            link.close()
        if self._ring is not None:
            self._ring.close()

    def _publish(self, kind: int, body: bytes) -> int:
        with self._lock:
            if self._told.size and (self._generations != self._told).any():
                renewed = np.flatnonzero(self._generations != self._told)
                self._told[renewed] = generations = self._generations[renewed]
                self._own[:] = self._generations[: len(self._own)]
                self._transmit(_MESSAGE, encode_message(BlocksRenewed(renewed.astype(np.uint32), generations)))
            return self._transmit(kind, body)

    def _transmit(self, kind: int, body: bytes) -> int:
        self.sequence += 1
        where: dict[str, Any] = {}
        if self._ring is not None and _INLINE_BYTES < len(body) <= self._ring.size // 2:
            place = self._ring.write(body, RING_TIMEOUT_S)
            # The frame has room for two numbers: the length goes into the body.
            where = {"flags": _IN_RING, "place": place, "digest": xxhash.xxh3_64_intdigest(body)}
        for rank, link in self._links.items():
            try:
                if where and link.local:
                    link.send(kind, len(body).to_bytes(8, "little"), **where)
                else:
                    link.send(kind, body)
            except GroupError:  # the others are to hear it in any case; what becomes of this one is not known here
                self.broken = tuple({*self.broken, rank})
        return self.sequence


class StepReceiver:
    """A follower's end."""

    def __init__(self, link: GroupLink, ring: RingReader | None) -> None:
        self._link = link
        self._ring = ring
        self.sequence = 0  # of the last plan or message

    def receive(self) -> StepPlan | GroupMessage:
        """What to do next; waits. A plan's arrays are the caller's. Raises GroupError, WireError, IntegrityError."""
        frame = self._link.receive()
        body = self._body(frame)
        self.sequence += 1
        if frame.kind == _PLAN:
            return decode_plan(body)
        if frame.kind == _MESSAGE:
            return decode_message(bytes(body))
        raise WireError(f"a frame of kind {frame.kind} on the channel of steps")

    def answer(self, part: bytes) -> None:
        """This rank's part of the plan received last. Raises GroupError."""
        self._link.send(_PART, part, place=self.sequence)

    def close(self) -> None:
        """Leave the channel."""
        self._link.close()
        if self._ring is not None:
            self._ring.close()

    def _body(self, frame: Frame) -> bytearray:
        if not frame.flags & _IN_RING:
            return frame.body
        if self._ring is None or len(frame.body) != 8:
            raise WireError("a body in shared memory that this rank does not have")
        body = self._ring.read(frame.place, int.from_bytes(frame.body, "little"))
        if xxhash.xxh3_64_intdigest(body) != frame.digest:
            raise IntegrityError(f"frame {frame.sequence}: shared memory does not hold what was sent")
        return body
