"""A rank above 0: does what rank 0 says, in order, and never plans. Ends when rank 0 says so, or is gone.

`process.py` or an actor makes it. The main thread takes plans and commands from the channel of steps; a control thread
tells rank 0 that this rank lives and how far it is, passes on how KV sessions ended, and listens for the end. It has a
model shard, KV storage and transfer engine of its own, and neither scheduler nor service.

Invariant: this process does not outlive its group: whoever notices the end first, it ends, with an exit code that says
whether it was this rank's fault. Where the group outlives other ranks it meets those that are left, and obeys on.
"""

from __future__ import annotations

import logging
import os
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import (
    ConfigError,
    ExpertsGoneError,
    GroupError,
    IntegrityError,
    PenstockError,
    WireError,
)
from penstock.workers.parallel.fence import EXIT_GROUP_LOST, EXIT_RANK_STUCK, RankProcess
from penstock.workers.parallel.group_messages import (
    AbandonSession,
    Beat,
    BlocksRenewed,
    ExpectSession,
    FinishSession,
    ForgetSession,
    GroupMessage,
    Joined,
    MeetAgain,
    OfferBlocks,
    PumpExperts,
    PutUpdate,
    RankFailed,
    Ready,
    StartSession,
    Stop,
    StoreOpen,
    decode_message,
    encode_message,
)
from penstock.workers.parallel.group_transfer import over_of
from penstock.workers.parallel.leader import LOOK_S
from penstock.workers.parallel.meeting import CONTROL, join
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.step_channel import StepReceiver
from penstock.workers.parallel.watch import silence_limit_s
from penstock.workers.protocol import Grant
from penstock.workers.scheduler.plan import Runner, StepPlan
from penstock.workers.settings import WorkerSettings
from penstock.workers.transfer.engine import TransferEngine
from penstock.workers.transfer.host import host_id
from penstock.workers.transfer.port import Incoming, Tail, TransferPort

log = logging.getLogger(__name__)

EXIT_FAILED = 3  # as of a worker whose engine failed
_CONTROL_TIMEOUT_S = 1.0


class Survival(Protocol):
    """What this rank does when others are lost and the group goes on (`rank_survival.SurvivingRank`)."""

    def go_on(self) -> tuple[int, ...]:
        """A call to other ranks failed: meet those that are left. Raises GroupError where there is no going on."""
        ...

    def meet_again(self, epoch: int) -> None:
        """Rank 0 says that ranks are lost. Raises GroupError."""
        ...

    def pump(self) -> None:
        """Bring the experts' rebalancing on without a step. Raises GroupError."""
        ...


@dataclass(frozen=True, slots=True)
class FollowerParts:
    """What a follower drives."""

    runner: Runner
    generations: NDArray[np.uint64]  # of its storage, as far as it is its bank
    transfer: TransferEngine
    bank: int = 0
    survival: Survival | None = None  # None: the group ends when a rank does
    weights_address: str = ""  # where it serves its part of the weights
    put_update: Callable[[PutUpdate], None] | None = None  # into its room for adapters, where it has some


class Follower:
    """`wait_store` where the runner needs collectives, `complete` once all is loaded, then `serve`."""

    def __init__(self, settings: WorkerSettings, leave: Callable[[int], NoReturn] = os._exit) -> None:
        """Join rank 0's meeting. Raises ConfigError, GroupError."""
        settings.group.check()
        own_host = host_id()
        joining = join(settings, own_host)
        self._settings = settings
        self._leave = leave
        self._control = joining.control
        self._control.socket.settimeout(_CONTROL_TIMEOUT_S)
        self._leader = RankProcess(0, joining.leader_pid) if joining.leader_host_id == own_host else None
        self.receiver = StepReceiver(joining.steps, joining.ring)
        self.progress = RankProgress()
        self.on_start_failure: Callable[[PenstockError], None] | None = None
        self._awake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._news = threading.Condition()
        self._store: str | None = None
        self._num_blocks: int | None = None
        self._start_error: PenstockError | None = None
        self._transfer: TransferPort | None = None
        self._heard = time.monotonic()
        self._stopped = False
        threading.Thread(target=self._listen, name="group-control", daemon=True).start()

    @property
    def rank(self) -> int:
        """This one's."""
        return self._settings.group.rank

    @property
    def width(self) -> int:
        """Ranks of the group."""
        return self._settings.group.width

    @property
    def serves(self) -> bool:
        """All ranks have loaded."""
        return self._num_blocks is not None

    # --- start ------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """The transfer engine has events; from any thread."""
        os.eventfd_write(self._awake, 1)

    def wait_store(self) -> str:
        """Address of the collectives' store. Raises GroupError, ConfigError."""
        self._wait_for(lambda: self._store is not None, "rank 0 opened no store for the collectives")
        return self._store or ""

    def complete(self, joined: Joined, transfer: TransferPort) -> int:
        """This rank has loaded: wait for the others; how many blocks are in use. Raises GroupError, ConfigError."""
        self._transfer = transfer
        self._control.send(CONTROL, encode_message(joined))
        self._wait_for(lambda: self._num_blocks is not None, "the group was not complete")
        return self._num_blocks or 0

    def abandon_start(self, error: Exception) -> None:
        """This rank cannot start: tell rank 0 why."""
        self._fail(error)
        self._stopped = True

    def _wait_for(self, ready: Callable[[], bool], otherwise: str) -> None:
        give_up_s = self._settings.group.start_timeout_s
        with self._news:
            self._news.wait_for(lambda: self._start_error or ready(), give_up_s)
            if self._start_error is not None:
                raise self._start_error
            if not ready():
                raise ConfigError(f"{otherwise} within {give_up_s:g} s", "group.start_timeout_s")

    # --- serving ----------------------------------------------------------------------------------------------------

    def serve(self, parts: FollowerParts) -> int:
        """Obey until the end; the exit code."""
        try:
            while True:
                message = self.receiver.receive()
                self.progress.begin(self.receiver.sequence)
                ended = self._act(message, parts)
                self.progress.end(step=ended and isinstance(message, StepPlan))
        except GroupError as error:
            return self._group_lost(error)
        except Exception as error:  # the edge of this rank: whatever it was, the group must hear of it and end
            log.exception("rank %d failed", self.rank)
            self._fail(error)
            return EXIT_FAILED

    def _act(self, message: StepPlan | GroupMessage, parts: FollowerParts) -> bool:
        """Do what rank 0 says; False where it came to no end, as on every other rank that is left."""
        try:
            if isinstance(message, StepPlan):
                parts.runner.run(message)
            else:
                self._obey(message, parts)
        except ExpertsGoneError as error:
            log.warning("rank %d: %s", self.rank, error)  # rank 0 says how to go on
            return False
        except GroupError as error:
            if parts.survival is None or self._stopped:
                raise
            self.progress.end(step=False)  # what follows is no part of the step
            log.warning("rank %d: %s", self.rank, error)
            parts.survival.go_on()
            return False
        return True

    def _obey(self, message: GroupMessage, parts: FollowerParts) -> None:
        transfer, survival = parts.transfer, parts.survival
        match message:
            case BlocksRenewed(blocks, generations):
                places = blocks.astype(np.int64) - parts.bank * len(parts.generations)
                own = (places >= 0) & (places < len(parts.generations))
                parts.generations[places[own]] = generations[own]
            case ExpectSession(bank=bank) | StartSession(bank=bank) if bank != parts.bank:
                pass  # what else is said of the session finds it unknown here
            case ExpectSession(_, session_id, epoch, blocks, generations, lease_s):
                transfer.expect(Incoming(session_id, epoch, blocks, generations, lease_s))
            case ForgetSession(session_id):
                transfer.forget(session_id)
            case StartSession():
                transfer.start(_grant(message))
            case OfferBlocks(session_id, fragments, blocks):
                transfer.offer(session_id, list(zip(fragments, blocks, strict=True)))
            case FinishSession(session_id, tokens, fragments):
                transfer.finish(session_id, Tail(tokens, fragments))
            case AbandonSession(session_id, reason):
                transfer.abandon(session_id, reason)
            case MeetAgain(epoch) if survival is not None:
                survival.meet_again(epoch)
            case PumpExperts() if survival is not None:
                survival.pump()
            case PutUpdate() if parts.put_update is not None:
                parts.put_update(message)
            case _:
                raise WireError(f"{type(message).__name__} on the channel of steps")

    def _group_lost(self, error: GroupError) -> int:
        """A collective or the channel broke: 0 where that was the end that rank 0 announced."""
        give_up = time.monotonic() + 2 * self._settings.group.silence_s
        while not self._stopped and time.monotonic() < give_up:
            time.sleep(LOOK_S)  # the control thread hears who is at fault, and then ends this process
        if self._stopped:
            return 0
        log.error("rank %d ends: %s", self.rank, error)
        return EXIT_GROUP_LOST

    def _fail(self, error: Exception) -> None:
        key = str(getattr(error, "key", "") or "")
        try:
            self._control.send(CONTROL, encode_message(RankFailed(type(error).__name__, str(error)[:4096], key)))
        except GroupError:
            log.warning("rank 0 cannot be told of it")

    # --- the control thread -----------------------------------------------------------------------------------------

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._control.socket, selectors.EVENT_READ)
        selector.register(self._awake, selectors.EVENT_READ)
        next_beat = 0.0
        try:
            while not self._stopped:
                for key, _ in selector.select(LOOK_S):
                    if key.fd == self._awake:
                        os.eventfd_read(self._awake)
                    else:
                        self._hear()
                self._report_sessions()
                now = time.monotonic()
                if now >= next_beat:
                    next_beat = now + self._settings.group.heartbeat_s / 2  # one that comes late is still in time
                    self._control.send(CONTROL, encode_message(self.progress.beat()))
                self._look(now)
        except (GroupError, WireError, IntegrityError) as error:
            if not self._stopped:
                self._end(EXIT_GROUP_LOST, GroupError(f"rank 0 is gone: {error}", 0))

    def _hear(self) -> None:
        message = decode_message(bytes(self._control.receive().body))
        self._heard = time.monotonic()
        match message:
            case Beat():
                pass
            case StoreOpen(address):
                with self._news:
                    self._store = address
                    self._news.notify_all()
            case Ready(num_blocks):
                with self._news:
                    self._num_blocks = num_blocks
                    self._news.notify_all()
            case Stop(orderly=True):
                log.info("rank 0 has stopped; rank %d ends", self.rank)
                self._stopped = True
                self.receiver.close()
            case Stop(rank=rank, message=text):
                code = EXIT_RANK_STUCK if rank == self.rank else EXIT_GROUP_LOST
                who = "unknown" if rank is None else f"rank {rank}"
                self._end(code, GroupError(f"the group ends; at fault: {who}; {text}", rank))
            case _:
                raise WireError(f"{type(message).__name__} from rank 0")

    def _report_sessions(self) -> None:
        if self._transfer is not None:
            for event in self._transfer.poll():
                self._control.send(CONTROL, encode_message(over_of(event)))

    def _look(self, now: float) -> None:
        """Rank 0 says that it lives as often as the others do."""
        silence_s = now - self._heard
        if self._num_blocks is None or silence_s <= silence_limit_s(self._settings.group):
            return
        if self._leader is not None:
            self._leader.kill()
        self._end(EXIT_GROUP_LOST, GroupError(f"rank 0 has given no sign of life for {silence_s:.1f} s", 0))

    def _end(self, code: int, error: GroupError) -> None:
        """Leave at once; before the group is complete, whoever started this process hears why."""
        log.error("rank %d ends: %s", self.rank, error)
        if self._num_blocks is not None:
            self._leave(code)
        with self._news:
            self._start_error = error
            self._news.notify_all()
        self._stopped = True
        if self.on_start_failure is not None:
            self.on_start_failure(error)


def _grant(message: StartSession) -> Grant:
    if not message.addresses:
        raise WireError("StartSession.addresses: empty")
    return Grant(
        message.session_id,
        message.worker_id,
        message.epoch,
        message.addresses[0],
        message.host_id,
        message.first_block,
        message.blocks,
        message.generations,
        message.lease_s,
        message.compatibility,
        message.addresses[1:],
    )
