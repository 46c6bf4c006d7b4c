"""Rank 0's side of a group: gathers the ranks, hears from them, watches over them, and lets one go or ends them all.

Made by `process.py` or an actor before the worker is built, since followers need its address to start. A control
thread hears every follower and judges (`watch.py`); the engine thread only leaves word of where its step stands. What
the ranks compute is not known here, nor how those that are left go on (`group_runner.py`).

Invariants: nothing is planned before every rank has loaded the same checkpoint; a rank that is lost has ended before
anybody goes on without it. Where the others cannot go on no rank survives: each gets word of it or is killed, and this
process ends with an exit code of its own.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from penstock.workers.errors import ConfigError, GroupError, IntegrityError, PenstockError, WireError
from penstock.workers.parallel.fence import EXIT_GROUP_LOST, EXIT_RANK_STUCK, RankProcess, end_ranks
from penstock.workers.parallel.group_messages import (
    Beat,
    GroupMessage,
    Joined,
    RankFailed,
    Ready,
    SessionOver,
    Stop,
    StoreOpen,
    decode_message,
    encode_message,
)
from penstock.workers.parallel.meeting import CONTROL, Meeting, Member
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.step_channel import StepSender
from penstock.workers.parallel.watch import GroupWatch, StepPace, Verdict
from penstock.workers.settings import WorkerSettings
from penstock.workers.transfer.host import host_id

log = logging.getLogger(__name__)

LOOK_S = 0.05  # between two looks at the group
GRACE_S = 0.3  # for followers that got word, before they are killed
LOST_WITHIN_S = 1.0  # a process that is killed has ended
_CONTROL_TIMEOUT_S = 1.0  # a message that has begun to come is whole within
_RING_BYTES = 8 << 20


class GroupLeader:
    """`meet`, then `complete` once this rank has loaded, then `sender`, `progress` and `pace` are the engine's."""

    def __init__(self, settings: WorkerSettings, leave: Callable[[int], NoReturn] = os._exit) -> None:
        """Listen for followers; `address` is what they need. Raises ConfigError."""
        settings.group.check()
        self._settings = settings
        self._leave = leave
        self._host_id = host_id()
        self._meeting = Meeting(settings, self._host_id, _RING_BYTES)
        self.address = self._meeting.address
        self.progress = RankProgress()
        self.pace = StepPace(settings.group.slow_factor)
        self.limit_s = 0.0  # of the step under way
        self.sender = StepSender((), None)
        self.on_session_over: Callable[[int, SessionOver], None] = _ignore
        self.on_loss: Callable[[int], None] = lambda _rank: None  # a rank is lost and the others go on
        self.can_lose_ranks = False  # the others can go on
        self._cut_short: float | None = None  # `progress.since` of a step that a loss cuts short: not judged any more
        self.lost_ranks: tuple[int, ...] = ()  # so far
        self.on_start_failure: Callable[[PenstockError], None] | None = None  # instead of an error at the next call
        self._members: dict[int, Member] = {}
        self._processes: list[RankProcess] = []
        self._joined: dict[int, Joined] = {}
        self._start_error: PenstockError | None = None
        self._news = threading.Condition()
        self._ending = threading.Lock()  # taken once, by who ends the group
        self._losing = threading.Lock()  # one rank after the other
        self._selector = selectors.DefaultSelector()
        self._stopped = False
        self._watch = GroupWatch(settings.group, time.monotonic())
        self._thread = threading.Thread(target=self._control, name="group-control", daemon=True)

    @property
    def width(self) -> int:
        """Ranks of the group."""
        return self._settings.group.width

    @property
    def rank(self) -> int:
        """This one's."""
        return 0

    @property
    def serves(self) -> bool:
        """All ranks have loaded."""
        return self._watch.armed

    # --- start ------------------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Returns when every follower is connected. Raises ConfigError naming those that are missing."""
        members = self._meeting.wait(self._settings.group.start_timeout_s)
        self._members = {member.rank: member for member in members}
        self._processes = [
            RankProcess(member.rank, member.pid) for member in members if member.host_id == self._host_id
        ]
        for member in members:
            member.control.socket.settimeout(_CONTROL_TIMEOUT_S)
        self.sender = StepSender([member.steps for member in members], self._meeting.ring)
        self._thread.start()

    def share_store(self, address: str) -> None:
        """Tell the followers where the collectives' store is. Raises GroupError."""
        self._tell(StoreOpen(address))

    def complete(self, fingerprint: str, num_blocks: int) -> int:
        """This rank has loaded too: wait for the others; how many blocks all ranks have. Raises ConfigError.

        `fingerprint` is of the checkpoint and the layout of its KV, and must be the same on every rank.
        """
        give_up_s = self._settings.group.start_timeout_s
        with self._news:
            self._news.wait_for(lambda: self._start_error or len(self._joined) == len(self._members), give_up_s)
            if self._start_error is not None:
                raise self._start_error
            missing = [str(rank) for rank in self._members if rank not in self._joined]
        if missing:
            raise ConfigError(f"rank {', '.join(missing)} did not load within {give_up_s:g} s", "group.start_timeout_s")
        for rank, joined in sorted(self._joined.items()):
            if joined.fingerprint != fingerprint:
                raise ConfigError(
                    f"rank {rank} has loaded {joined.fingerprint}, and rank 0 {fingerprint}", "runner.model_dir"
                )
        least = min([num_blocks, *(joined.num_blocks for joined in self._joined.values())])
        self._watch.arm(time.monotonic())
        self._tell(Ready(least))
        log.info("%d ranks are ready with %d blocks", self.width, least)
        return least

    @property
    def transfer_addresses(self) -> tuple[str, ...]:
        """Of the followers, in rank order, once all have joined."""
        return tuple(joined.transfer_address for _, joined in sorted(self._joined.items()))

    # --- losing a rank ----------------------------------------------------------------------------------------------

    @property
    def on_one_host(self) -> bool:
        """Every rank is on this host and can be ended from here, so that a lost one is sure to have ended."""
        return len(self._processes) == self.width - 1 and all(process.held for process in self._processes)

    def is_alive(self, rank: int) -> bool:
        """Whether this rank may still come to where the others are."""
        return rank not in self.lost_ranks and not any(
            process.rank == rank and process.gone for process in self._processes
        )

    def let_go(self, rank: int, reason: str) -> None:
        """End this rank above 0 for good; the others go on without it. From any thread; harmless when repeated."""
        with self._losing:
            if rank in self.lost_ranks or self._stopped:
                return
            ranks = [process for process in self._processes if process.rank == rank]
            self._cut_short = self.progress.since
            end_ranks(ranks, rank, LOST_WITHIN_S)
            self._watch.leave_out(rank)
            self._members = {number: member for number, member in self._members.items() if number != rank}
            self._processes = [process for process in self._processes if process.rank != rank]
            self.sender.leave_out(rank)
            self.lost_ranks = (*self.lost_ranks, rank)
        for process in ranks:
            process.close()
        log.error(
            "%s goes on without rank %d, with %d ranks: %s",
            self._settings.worker_id,
            rank,
            len(self._members) + 1,
            reason,
        )
        self.on_loss(rank)

    # --- the end ----------------------------------------------------------------------------------------------------

    def abandon_start(self, error: Exception) -> None:
        """This rank cannot start: the others need not wait."""
        self._stopped = True
        self._tell_all(Stop(False, 0, f"rank 0: {error}"))
        self._meeting.close()

    def stop(self) -> None:
        """All work is done: every rank ends in order. Safe to call twice."""
        if self._stopped or not self._ending.acquire(blocking=False):
            return
        self._stopped = True
        self._tell_all(Stop(True, None, "rank 0 has stopped"))
        end_ranks(self._processes, None, self._settings.group.silence_s)
        self.sender.close()

    def lost(self, error: Exception) -> NoReturn:
        """A step failed on this rank, whose group cannot go on without it: find who is at fault, and end all."""
        time.sleep(2 * LOOK_S)  # the control thread may know better: who died, or what a follower says
        rank = error.rank if isinstance(error, GroupError) else 0
        self._end(Verdict(rank, f"rank 0: {type(error).__name__}: {error}"))

    def _end(self, verdict: Verdict) -> NoReturn:
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is at it, and ends this one with it
        who = "unknown" if verdict.rank is None else f"rank {verdict.rank}"
        log.error("the group of %s ends; at fault: %s; %s", self._settings.worker_id, who, verdict.reason)
        self._tell_all(Stop(False, verdict.rank, verdict.reason))
        end_ranks(self._processes, verdict.rank, GRACE_S)
        self._leave(EXIT_RANK_STUCK if verdict.rank == 0 else EXIT_GROUP_LOST)

    # --- the control thread -----------------------------------------------------------------------------------------

    def _control(self) -> None:
        for member in self._members.values():
            self._selector.register(member.control.socket, selectors.EVENT_READ, member)
        next_beat = 0.0
        while not self._stopped:
            for key, _ in self._selector.select(LOOK_S):
                verdict = self._hear(key.data)
                if verdict is not None:
                    self._selector.unregister(key.fileobj)
                    self._found(verdict)
                    if key.data.rank in self.lost_ranks:
                        key.data.control.close()
            now = time.monotonic()
            beat_due = now >= next_beat
            if beat_due:
                next_beat = now + self._settings.group.heartbeat_s / 2  # one that comes late is still in time
                self._tell_all(self.progress.beat())
            verdict = self._judge(now, beat_due=beat_due)
            if verdict is not None:
                self._found(verdict)

    def _judge(self, now: float, *, beat_due: bool) -> Verdict | None:
        watch = self._watch
        watch.heard(0, self.progress.beat(), now)
        since = self.progress.since
        age_s = 0.0 if since is None or since == self._cut_short else time.perf_counter() - since
        unreached = [rank for rank in self.sender.broken if rank not in self.lost_ranks]
        return (
            watch.silent(now)
            or (Verdict(unreached[0], f"nothing can be sent to rank {unreached[0]}") if unreached else None)
            or watch.stuck(age_s, self.limit_s, now)
            or (watch.slow(self.pace, now) if beat_due else None)
        )

    def _hear(self, member: Member) -> Verdict | None:
        rank = member.rank
        if rank in self.lost_ranks:
            return Verdict(rank, f"rank {rank} is lost")  # whatever it still said
        try:
            message = decode_message(bytes(member.control.receive().body))
        except GroupError as error:
            return Verdict(rank, f"rank {rank} is gone: {error}")
        except (WireError, IntegrityError) as error:
            return Verdict(rank, f"rank {rank} sent what cannot be read: {error}")
        match message:
            case Beat():
                self._watch.heard(rank, message, time.monotonic())
            case SessionOver():
                self.on_session_over(rank, message)
            case Joined():
                with self._news:
                    self._joined[rank] = message
                    self._news.notify_all()
            case RankFailed(kind, text, key):
                if not self._watch.armed:
                    self._start_error = ConfigError(f"rank {rank}: {text}", key or None)
                return Verdict(rank, f"rank {rank} failed: {kind}: {text}")
            case _:
                return Verdict(rank, f"rank {rank} sent {type(message).__name__}, which is not for it to say")
        return None

    def _found(self, verdict: Verdict) -> None:
        if self._stopped:
            return
        if self._watch.armed and verdict.rank and self.can_lose_ranks:
            self.let_go(verdict.rank, verdict.reason)
            return
        if self._watch.armed:
            self._end(verdict)
        with self._news:
            self._start_error = error = self._start_error or GroupError(verdict.reason, verdict.rank)
            self._news.notify_all()
        self._tell_all(Stop(False, verdict.rank, str(error)))
        if self.on_start_failure is not None:
            self.on_start_failure(error)

    def _tell(self, message: GroupMessage) -> None:
        for member in self._members.values():
            member.control.send(CONTROL, encode_message(message))

    def _tell_all(self, message: GroupMessage) -> None:
        """Those that can still be told."""
        for member in self._members.values():
            try:
                member.control.send(CONTROL, encode_message(message))
            except GroupError:  # its end is noticed where it is read from
                log.debug("rank %d cannot be told %s", member.rank, type(message).__name__)


def _ignore(rank: int, over: SessionOver) -> None:
    log.warning("rank %d: a KV session ended before there were any: %s", rank, over.event)
