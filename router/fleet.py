"""What the router believes about each worker, how old that belief is, and what the router itself has added since.

Links report (through `router.py`), placement and admission read. A heartbeat is up to half a second old, so the
router counts its own work in flight exactly and takes from the heartbeat only what others put there. Knows no
transport and no clock: every call that needs the time gets it.

A worker whose KV cannot be exchanged with the other phase's workers is known but refused: it has no view, so nobody
places anything there, until those others have been gone for a while.

Invariants: the widths of every prefill worker and every decode worker go together; a worker's own counters are the
sums over its open stakes; a stake is closed once, also when the worker was lost in between; with no stake open all own
counters are zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from penstock.router.breaker import Breaker
from penstock.router.pairs import Pairs
from penstock.router.quarantine import Quarantine
from penstock.router.settings import HealthSettings
from penstock.workers.protocol import Load, Role, Welcome
from penstock.workers.transfer.head_slices import reason_against

_EXPECTED_BACK_S = 60.0  # a lost worker is being restarted: so long nobody who does not fit takes its place
_LEAST_LOOKS = 6  # at a worker, all of which find it silent, before it is given up
_RATE_MEMORY = 0.9  # weight of the past in the measured prefill rate, per completed prompt


@dataclass(slots=True)
class WorkerView:
    """One living worker as the router sees it; a worker that comes back gets a new view."""

    welcome: Welcome
    joined_at: float
    breaker: Breaker
    load: Load | None = None
    quiet_s: float = 0.0  # since it was last heard, as far as this process listened
    sequences: int = 0  # own, in flight
    prefill_tokens: int = 0  # own, sent and not yet computed
    blocks: int = 0  # own, asked for
    others_sequences: int = 0  # of other routers, as of the last heartbeat
    others_prefill_tokens: int = 0
    others_blocks: int = 0  # also what own sequences have grown by
    prefill_sent: int = 0  # cumulative tokens, to tell what stands before a stake
    prefill_done: int = 0
    work: float = 0.0  # recently placed work in tokens, decaying
    work_at: float = 0.0
    claimed_by: str | None = None  # a suspect request that must run here alone
    draining: bool = False
    prefill_per_s: float | None = None  # in full steps, beside the sequences that decode there; None while unknown
    rate_tokens: float = 0.0
    rate_seconds: float = 0.0
    prefill_busy_since: float = 0.0

    @property
    def worker_id(self) -> str:
        return self.welcome.worker_id

    @property
    def all_sequences(self) -> int:
        """Sequences running and waiting there, all routers'."""
        return self.sequences + self.others_sequences

    @property
    def queued_tokens(self) -> int:
        """Prefill tokens ahead of a newcomer, all routers'."""
        return self.prefill_tokens + self.others_prefill_tokens

    @property
    def free_blocks(self) -> int:
        """Blocks that a newcomer could get: the last heartbeat's, less what was sent there since."""
        return max(0, self.welcome.num_blocks - self.blocks - self.others_blocks)

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt tokens per second that came of what was sent there, waits for grants and all: what it has done, not
        what it can do. None until a prompt has been computed."""
        return self.rate_tokens / self.rate_seconds if self.rate_seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker that is not taken in, and why."""

    welcome: Welcome
    reason: str


@dataclass(slots=True, eq=False)
class Stake:
    """What one attempt holds at one worker, so that it can be given back exactly once."""

    view: WorkerView
    blocks: int
    prefill_tokens: int  # still to be computed there
    sent_mark: int  # the worker's `prefill_sent` before this stake
    started: bool = False
    open: bool = True

    @property
    def tokens_ahead(self) -> int:
        """Prefill tokens this router sent there earlier that are still to be computed."""
        return max(0, self.sent_mark - self.view.prefill_done)


class Fleet:
    """All living workers, by id."""

    def __init__(self, settings: HealthSettings, work_half_life_s: float) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.refused: dict[str, Refusal] = {}
        self.pairs = Pairs(settings)
        self.quarantine = Quarantine(settings)
        self._expected: dict[str, tuple[Welcome, float]] = {}  # lost workers, and until when they count
        self.version = 0  # grows with every join, loss and drain
        self._settings = settings
        self._half_life_s = work_half_life_s
        self._breakers: dict[str, Breaker] = {}  # outlive their workers, so that a crash loop stays visible
        self._judged_at: float | None = None

    def join(self, welcome: Welcome, now: float) -> bool:
        """A worker is there (again). Its breaker remembers the past, its counters start fresh. False: it is refused."""
        self.refused.pop(welcome.worker_id, None)
        reason = self._reason_against(welcome, now)
        if reason is not None:
            self.refused[welcome.worker_id] = Refusal(welcome, reason)
            return False
        self._expected.pop(welcome.worker_id, None)
        settings = self._settings
        if welcome.worker_id not in self._breakers and len(self._breakers) > 4 * len(self.workers) + 64:
            self._breakers = {worker_id: view.breaker for worker_id, view in self.workers.items()}
        breaker = self._breakers.setdefault(
            welcome.worker_id, Breaker(settings.breaker_failures, settings.breaker_open_s, settings.breaker_max_s)
        )
        average = self._average_work(now)  # a newcomer starts level, or it would get everything at first
        self.workers[welcome.worker_id] = WorkerView(welcome, now, breaker, work=average, work_at=now)
        self.version += 1
        return True

    def reconsider(self, now: float) -> list[Welcome]:
        """Refused workers that nothing speaks against any more, in the order in which they came; they are in now."""
        return [refusal.welcome for refusal in list(self.refused.values()) if self.join(refusal.welcome, now)]

    def expect_back(self, view: WorkerView, now: float) -> None:
        """A lost worker counts for a while when others join: it is probably being restarted."""
        self._expected = {name: entry for name, entry in self._expected.items() if entry[1] > now}
        self._expected[view.worker_id] = (view.welcome, now + _EXPECTED_BACK_S)

    def lose(self, worker_id: str) -> WorkerView | None:
        """The worker is gone; returns the last view of it."""
        self.refused.pop(worker_id, None)
        self.pairs.forget(worker_id)
        view = self.workers.pop(worker_id, None)
        if view is not None:
            self.version += 1
        return view

    def load_arrived(self, worker_id: str, load: Load) -> None:
        """Take in a heartbeat. What exceeds the router's own counters belongs to other routers."""
        view = self.workers.get(worker_id)
        if view is None:
            return
        used = view.welcome.num_blocks - load.free_blocks
        view.others_sequences = max(0, load.running + load.waiting - view.sequences)
        view.others_prefill_tokens = max(0, load.queued_prefill_tokens - view.prefill_tokens)
        view.others_blocks = max(0, min(used, view.welcome.num_blocks) - view.blocks)
        if load.draining and not view.draining:  # for good: a heartbeat from just before may come just after
            view.draining = True
            self.version += 1
        view.load = load
        view.quiet_s = 0.0
        view.prefill_per_s = _prefill_per_s(view.welcome, load)

    def heard(self, worker_id: str) -> None:
        """The worker said something, whatever it was."""
        view = self.workers.get(worker_id)
        if view is not None:
            view.quiet_s = 0.0

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """Workers to give up, with the reason: nothing heard of them, or work whose step does not move.

        A process that slept, or gets little of its cores, has what they say unread in its sockets and must not blame
        them: between two looks no more counts as silence than a look should take, and only the next look judges it.
        """
        last, self._judged_at = self._judged_at, now
        verdicts = [(view.worker_id, self._verdict(view)) for view in self.workers.values()]
        if last is not None:
            listened_s = min(now - last, self._settings.heartbeat_timeout_s / _LEAST_LOOKS)
            for view in self.workers.values():
                view.quiet_s += listened_s
        return [(worker_id, reason) for worker_id, reason in verdicts if reason is not None]

    def stake(self, worker_id: str, prefill_tokens: int, blocks: int, now: float) -> Stake:
        """Count a newly sent attempt. Raises KeyError if the worker is gone."""
        view = self.workers[worker_id]
        stake = Stake(view, blocks, prefill_tokens, view.prefill_sent)
        view.sequences += 1
        view.blocks += blocks
        view.prefill_sent += prefill_tokens
        if prefill_tokens and view.prefill_tokens == 0:
            view.prefill_busy_since = now
        view.prefill_tokens += prefill_tokens
        self.add_work(view, prefill_tokens, now)
        return stake

    def computed(self, stake: Stake, now: float) -> None:
        """The stake's prompt has been computed: its first token came."""
        if not stake.open or not stake.prefill_tokens:
            return
        view = stake.view
        view.rate_tokens = view.rate_tokens * _RATE_MEMORY + stake.prefill_tokens
        view.rate_seconds = view.rate_seconds * _RATE_MEMORY + max(0.0, now - view.prefill_busy_since)
        view.prefill_busy_since = now
        self._settle_prefill(stake)

    def close(self, stake: Stake) -> None:
        """The attempt holds nothing there any more."""
        if not stake.open:
            return
        self._settle_prefill(stake)
        stake.open = False
        stake.view.sequences -= 1
        stake.view.blocks -= stake.blocks

    def add_work(self, view: WorkerView, tokens: float, now: float) -> None:
        """Count work towards the decaying sum that evens out the long run."""
        view.work = self.recent_work(view, now) + tokens
        view.work_at = now

    def recent_work(self, view: WorkerView, now: float) -> float:
        """Tokens of work placed there, halved every half-life."""
        return float(view.work * 0.5 ** (max(0.0, now - view.work_at) / self._half_life_s))

    def usable(self, roles: Iterable[Role], now: float) -> list[WorkerView]:
        """Living workers of these roles that take new work."""
        wanted = frozenset(roles)
        return [
            view
            for view in self.workers.values()
            if view.welcome.role in wanted
            and not view.draining
            and view.claimed_by is None
            and view.breaker.closed(now)
        ]

    def alive(self, roles: Iterable[Role]) -> list[WorkerView]:
        """Living workers of these roles, whether or not they take work at the moment."""
        wanted = frozenset(roles)
        return [view for view in self.workers.values() if view.welcome.role in wanted and not view.draining]

    def check_integrity(self, stakes: Iterable[Stake]) -> None:
        """Raises ValueError unless own counters equal the sums over the open stakes."""
        held: dict[int, list[int]] = {id(view): [0, 0, 0] for view in self.workers.values()}
        for stake in stakes:
            sums = held.get(id(stake.view))
            if stake.open and sums is not None:
                sums[0] += 1
                sums[1] += stake.prefill_tokens
                sums[2] += stake.blocks
        for view in self.workers.values():
            if held[id(view)] != [view.sequences, view.prefill_tokens, view.blocks]:
                raise ValueError(f"{view.worker_id}: counters differ from the open stakes {held[id(view)]}")

    def _reason_against(self, newcomer: Welcome, now: float) -> str | None:
        """Why its blocks cannot go to, or come from, a worker of the other phase that was here first."""
        other = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}.get(newcomer.role)
        known = [view.welcome for view in self.workers.values()]
        known += [welcome for welcome, until in self._expected.values() if until > now]
        for welcome in known:
            if welcome.role is other and welcome.worker_id != newcomer.worker_id:
                reason = reason_against(newcomer.width, welcome.width)
                if reason is not None:
                    return f"no KV can be exchanged with {welcome.worker_id}: {reason}"
        return None

    def _settle_prefill(self, stake: Stake) -> None:
        view = stake.view
        view.prefill_tokens -= stake.prefill_tokens
        view.prefill_done += stake.prefill_tokens
        stake.prefill_tokens = 0

    def _average_work(self, now: float) -> float:
        views = self.workers.values()
        return sum(self.recent_work(view, now) for view in views) / len(views) if views else 0.0

    def _verdict(self, view: WorkerView) -> str | None:
        settings = self._settings
        if view.quiet_s > settings.heartbeat_timeout_s:
            return f"silent for {view.quiet_s:.1f} s"
        load = view.load
        if load is None:
            return None
        allowed = settings.first_step_s
        if load.predicted_step_s > 0:
            allowed = max(settings.step_floor_s, settings.step_factor * load.predicted_step_s)
        if load.step_age_s > allowed:
            return f"step {load.step} has not moved for {load.step_age_s:.1f} s"
        return None


def _prefill_per_s(welcome: Welcome, load: Load) -> float | None:
    """Prompt tokens per second by the line that the worker has fitted to its steps."""
    budget = welcome.max_num_batched_tokens
    if load.step_base_s + load.step_token_s <= 0:
        return None
    decodes = 0 if welcome.role is Role.PREFILL else min(load.running, budget - 1)
    return (budget - decodes) / (load.step_base_s + load.step_token_s * budget)
