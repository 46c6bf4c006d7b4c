"""The step loop of one worker: inbox -> transfer events -> plan -> run -> commit -> report.

Runs on the worker's engine thread (`assembly.py` starts it); `service.py` posts what routers ask, the transfer thread
wakes it, the heartbeat thread reads `load`. It takes its runner through a small protocol and its reporter as a
parameter, so the whole loop runs without torch and without a network. It knows neither streams nor processes.

Invariants:
- everything but `post`, `load`, `drained` and `stop` happens on the engine thread;
- every request that was accepted from the inbox ends in a frame with an end reason, in one `Failed`, or by `Cancel`;
- a runner that raises costs the sequences of its steps, typed, and nothing else; three times in a row end the loop;
- banks of blocks that go with their ranks cost no sequence that can be computed again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from penstock.workers import fault_points
from penstock.workers.audit import EngineAccount, account_of
from penstock.workers.errors import BanksLostError
from penstock.workers.fault_points import FaultPlan, Point
from penstock.workers.frames import frame_of_arrived, prompt_logprobs_of, split_by_router
from penstock.workers.handover import HandOver
from penstock.workers.inbox import Attached, Detached, Drain, Inbox, Inspect, Post
from penstock.workers.kv_feed import KVEventFeed, Reporter
from penstock.workers.leases import RouterLeases
from penstock.workers.observation import Observation
from penstock.workers.protocol import (
    Cancel,
    Embedding,
    Failed,
    FailureCode,
    Generate,
    Granted,
    KeepAlive,
    Load,
    Move,
    Prefill,
    Queued,
    RequestSnapshot,
    Reserve,
    Started,
    Stays,
    TokenFrame,
    Tokens,
    ToRouter,
)
from penstock.workers.request_check import problem_with_tokens
from penstock.workers.scheduler.events import (
    EndedEvent,
    GrantedEvent,
    PreemptedEvent,
    QueuedEvent,
    RefusedEvent,
    SchedulerEvent,
    SequenceKey,
    StartedEvent,
    StaysEvent,
    StepOutcome,
    TakenOverEvent,
    Work,
)
from penstock.workers.scheduler.moving import MoveTerms
from penstock.workers.scheduler.plan import Runner, StartStep, StepPlan
from penstock.workers.scheduler.scheduler import Scheduler
from penstock.workers.step_runs import Landed, StepRuns
from penstock.workers.step_time import StepTimeModel

log = logging.getLogger(__name__)

_IDLE_S = 0.25  # longest sleep of an idle loop: leases are looked at so often
_STATS_EVERY_S = 0.05
_REQUESTS = (Reserve, Prefill, Generate)  # a union would be built anew for every message
_WORK: Mapping[type, Work] = {Reserve: Work.RESERVE, Prefill: Work.PREFILL, Generate: Work.GENERATE}


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What the loop drives; each knows nothing of the others."""

    scheduler: Scheduler
    runner: Runner
    handover: HandOver
    feed: KVEventFeed
    reporter: Reporter
    observation: Observation = field(default_factory=Observation)
    prepare: Callable[[], bool] | None = None  # one piece of work for idle moments; False: there is none
    start: StartStep | None = None  # of the runner, where it computes beside the host: then steps are planned ahead
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    name: str = ""  # the worker's id


class Engine:
    """One worker's step loop. `router_id` names one attached stream, never to be used again for another."""

    def __init__(self, parts: EngineParts, clock: Callable[[], float], awake: threading.Event) -> None:
        """`awake` is what the transfer thread sets when it has an event."""
        self._scheduler = parts.scheduler
        self._vocab_size = parts.runner.vocab_size
        self._handover = parts.handover
        self._feed = parts.feed
        self._reporter = parts.reporter
        self._observation = parts.observation
        self._prepare = parts.prepare
        self._clock = clock
        self._name = parts.name
        self._leases = RouterLeases()
        self._inbox = Inbox(awake)
        self._awake = awake
        self._stopping = False
        self._steps = StepRuns(
            parts.scheduler, parts.runner, parts.start, parts.observation, clock, parts.step_time, parts.name
        )
        self._stats = parts.scheduler.stats()
        self._stats_due = 0.0

    # --- any thread ---

    def post(self, router_id: str, message: Post) -> bool:
        """Hand in a message; False when the inbox is full (a stuck step), which holds for requests only."""
        return self._inbox.put(router_id, message, self._clock())

    def inspect(self, ended_after: int) -> Future[EngineAccount]:
        """What the engine has and holds, between two steps, with a page of ends (`AuditLog.page`)."""
        answer: Future[EngineAccount] = Future()
        self._inbox.put("", Inspect(answer, ended_after), self._clock())
        return answer

    def stop(self) -> None:
        """Leave the loop after the current step."""
        self._stopping = True
        self._awake.set()

    @property
    def drained(self) -> bool:
        """New work is refused and no sequence or session is left."""
        stats = self._stats
        busy = stats.running + stats.waiting + stats.sending + stats.quarantined_blocks + len(self._handover)
        return stats.draining and busy == 0

    def load(self) -> Load:
        """The heartbeat's content; figures are at most a step or 50 ms old."""
        stats, progress = self._stats, self._steps.progress
        age_s = 0.0 if progress.since is None else max(0.0, self._clock() - progress.since)
        return Load(
            progress.step,
            age_s,
            progress.predicted_s,
            stats.running,
            stats.waiting,
            stats.queued_prefill_tokens,
            stats.free_blocks,
            stats.cached_blocks,
            stats.quarantined_blocks,
            len(self._handover),
            stats.preemptions,
            stats.draining,
            self._observation.totals(stats.reserved, stats.lost_blocks),
            max(0.0, progress.base_s),
            progress.token_s,
        )

    # --- engine thread ---

    def run(self) -> None:
        """Step until stopped; sleep while there is nothing to do."""
        while not self._stopping:
            self._awake.clear()
            if self.step() or self._use_idle_time():
                continue
            self._awake.wait(self._sleep_s())
        self._take_in(self._steps.turn(None))

    def step(self) -> bool:
        """One turn of the loop; False when there was nothing to compute."""
        now = self._clock()
        self._take_inbox(now)
        self._handover.poll(self._scheduler, now)
        self._handover.move(*self._scheduler.moves.collect())
        plan = self._scheduler.plan(now)
        self._report_events()  # what was granted or started is said before its first token
        try:
            landed = self._steps.turn(plan)
        except BanksLostError as error:
            landed = []
            self._go_on_without(error.banks, plan)
        self._take_in(landed)
        self._handover.move(*self._scheduler.moves.collect())
        idle = plan is None and not landed
        self._feed.flush(now, idle=idle)
        if idle or now >= self._stats_due:
            self._stats = self._scheduler.stats()
            self._stats_due = now + _STATS_EVERY_S
        return not idle

    def _sleep_s(self) -> float:
        deadline = self._scheduler.next_deadline
        return _IDLE_S if deadline is None else min(_IDLE_S, max(0.0, deadline - self._clock()))

    def _take_in(self, landed: list[Landed]) -> None:
        """What steps brought goes to those who wait for it."""
        for step, outcome, lost, reason in landed:
            if outcome is not None:
                self._report_tokens(step, outcome)
                self._handover.offer(outcome.offers, outcome.sent_tails)
                self._report_events()
            for key in lost:
                self._handover.drop(key, "the step failed")
                self._fail(key, FailureCode.INTERNAL, reason)

    def _use_idle_time(self) -> bool:
        """One piece of work for idle moments; False where there is none."""
        if self._prepare is None:
            return False
        try:
            return self._prepare()
        except BanksLostError as error:
            self._go_on_without(error.banks)
            return True

    def _go_on_without(self, banks: Tokens, plan: StepPlan | None = None) -> None:
        """Ranks are gone with their blocks: first their transfers end, then what they computed moves elsewhere."""
        self._handover.poll(self._scheduler, self._clock())
        self._scheduler.lose_banks(banks, plan)
        self._report_events()

    # --- what comes in ---

    def _take_inbox(self, now: float) -> None:
        while (post := self._inbox.take()) is not None:
            self._receive(*post, now)
        for router_id in self._leases.expired(now):
            log.warning("router %s did not renew its lease", router_id)
            self._observation.lease_expired()
            self._reporter.cut(router_id)
            self._end_router(router_id, now)

    def _receive(self, router_id: str, message: Post, came: float, now: float) -> None:
        if isinstance(message, _REQUESTS):
            if router_id in self._leases:
                self._leases.renew(router_id, now)
                # Its patience began when it came, however long a step kept it from being read.
                for _ in range(fault_points.times(Point.SUBMIT_TAKE, self._name)):
                    self._submit(SequenceKey(router_id, message.slot, message.attempt), message, came)
            return
        if isinstance(message, Attached):
            return self._leases.begin(router_id, message.lease_s, now)
        if isinstance(message, Drain):
            self._scheduler.drain()
            self._stats = self._scheduler.stats()
            return self._reporter.broadcast(self.load())  # routers need not wait for a beat to move what runs here
        if isinstance(message, Inspect):
            return message.answer.set_result(self._account(message.ended_after))
        if router_id not in self._leases:
            return  # its stream ended before this was read
        self._leases.renew(router_id, now)
        match message:
            case Cancel(slot, attempt):
                key = SequenceKey(router_id, slot, attempt)
                self._scheduler.cancel(key, now)
                self._handover.drop(key, "cancelled")
                self._observation.over(key, FailureCode.CANCELLED)
            case Move():
                self._move(SequenceKey(router_id, message.slot, message.attempt), message)
            case RequestSnapshot():
                self._feed.snapshot(router_id)
            case Detached():
                self._end_router(router_id, now)
            case KeepAlive():
                pass  # renewed above
            case _:
                log.warning("router %s sent %s in the middle of its stream", router_id, type(message).__name__)

    def _account(self, ended_after: int) -> EngineAccount:
        return account_of(self._scheduler, len(self._handover), self._observation.audit, ended_after)

    def _submit(self, key: SequenceKey, message: Reserve | Prefill | Generate, now: float) -> None:
        request, work = message.request, _WORK[type(message)]
        unknown = problem_with_tokens(request, self._vocab_size)
        if unknown is not None:
            self._fail(key, FailureCode.BAD_REQUEST, unknown)
            return
        grant = message.grant if isinstance(message, Prefill) else None
        problem = self._handover.problem_with(key, grant)
        if problem is not None:
            self._fail(key, *problem)
            return
        self._observation.received(key, work, request, now)
        if grant is None:
            takes_over = isinstance(message, Reserve) and message.takes_over
            self._scheduler.submit(key, work, request, now, takes_over=takes_over)
        else:
            bank = self._scheduler.bank_for(request)
            if self._handover.open(key, grant, bank):
                self._scheduler.submit(key, work, request, now, sends_kv=True, first_block=grant.first_block, bank=bank)

    def _move(self, key: SequenceKey, message: Move) -> None:
        grant = message.grant
        unfit = self._handover.problem_with(key, grant)
        terms = MoveTerms(grant.first_block, len(grant.blocks), message.emitted)
        problem = unfit[1] if unfit is not None else self._scheduler.moves.begin(key, terms)
        if problem:
            self._reporter.send(key.router_id, Stays(key.slot, key.attempt, problem))
        else:
            self._handover.open_move(key, grant, self._scheduler.moves.bank_of(key))
            self._handover.move(*self._scheduler.moves.collect())
            self._handover.probe(key)

    def _end_router(self, router_id: str, now: float) -> None:
        self._leases.end(router_id)
        for key in self._scheduler.cancel_router(router_id, now):
            self._handover.drop(key, "the router is gone")
            self._observation.over(key, FailureCode.CANCELLED)

    # --- what goes out ---

    def _report_tokens(self, step: int, outcome: StepOutcome) -> None:
        """What is known of prompts goes before the tokens: with the first of them, a reader has everything."""
        for chunk in outcome.scored:
            self._reporter.send(chunk.key.router_id, prompt_logprobs_of(chunk))
        for key, values in outcome.embedded:
            self._reporter.send(key.router_id, Embedding(key.slot, key.attempt, values))
        for router_id, frame in split_by_router(step, outcome):
            if fault_points.plan is None:
                self._reporter.send(router_id, frame)
            else:
                self._send_breakably(fault_points.plan, router_id, frame)

    def _send_breakably(self, plan: FaultPlan, router_id: str, frame: TokenFrame) -> None:
        if (frame.starts == 0).any():
            plan.reach(Point.FIRST_TOKEN, self._name)
        for _ in range(fault_points.times(Point.FRAME_OUT, self._name)):
            self._reporter.send(router_id, frame)
        plan.reach(Point.FRAME_SENT, self._name)

    def _report_events(self) -> None:
        for event in self._scheduler.take_events():
            self._report(event)

    def _report(self, event: SchedulerEvent) -> None:
        key, send = event.key, self._answer
        self._observation.happened(event)
        match event:
            case GrantedEvent():
                send(key.router_id, Granted(key.slot, key.attempt, self._handover.grant(event)))
            case StartedEvent(cached_tokens=cached_tokens):
                send(key.router_id, Started(key.slot, key.attempt, cached_tokens))
            case QueuedEvent(position=position):
                send(key.router_id, Queued(key.slot, key.attempt, position))
            case RefusedEvent(code=code, message=message, retry_after_s=retry_after_s):
                self._handover.drop(key, message)
                self._fail(key, code, message, retry_after_s)
            case StaysEvent(reason=reason):
                send(key.router_id, Stays(key.slot, key.attempt, reason))
            case EndedEvent() | TakenOverEvent():
                send(key.router_id, frame_of_arrived(self._steps.progress.step, event))
            case PreemptedEvent():
                log.info("preempted slot %d of %s", key.slot, key.router_id)

    def _answer(self, router_id: str, message: ToRouter) -> None:
        for _ in range(fault_points.times(Point.SUBMIT_REPLY, self._name)):
            self._reporter.send(router_id, message)

    def _fail(self, key: SequenceKey, code: FailureCode, message: str, retry_after_s: float | None = None) -> None:
        self._observation.over(key, code)
        self._reporter.send(key.router_id, Failed(key.slot, key.attempt, code, message, retry_after_s))
