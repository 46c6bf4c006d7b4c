"""A scheduler over a content-checking runner, small enough to drive by hand in unit tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fakes.content_runner import ContentRunner

from penstock.workers.kv.banks import Bank
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.prefix_cache import PrefixCache
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.scheduler.adapters import Adapters
from penstock.workers.scheduler.events import SchedulerEvent, StepOutcome
from penstock.workers.scheduler.grammars import Guides
from penstock.workers.scheduler.scheduler import Scheduler, SequenceKey, Work
from penstock.workers.settings import SchedulerSettings

BLOCK = 4


def make_request(prompt: list[int], max_tokens: int = 8, **changes: Any) -> GenerateRequest:
    """A request with greedy sampling; `changes` go to GenerateRequest, `stop` and `sampling` to its sampling."""
    sampling = changes.pop("sampling", None) or SamplingParams(max_tokens, stop_token_ids=changes.pop("stop", ()))
    return GenerateRequest("r", tuple(prompt), sampling, **changes)


def held_blocks(pool: BlockPool, cache: PrefixCache | None) -> set[int]:
    """Blocks that some sequence, peer or copy holds."""
    runs = [] if cache is None else [run for run in cache.runs() if run.holders]
    return set(pool.private_blocks().tolist()).union(*(run.blocks.tolist() for run in runs))


@dataclass
class Stand:
    """Scheduler, pool, cache and runner, with what came out so far."""

    scheduler: Scheduler
    pool: BlockPool
    cache: PrefixCache | None
    runner: ContentRunner
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by router slot
    ends: dict[int, int] = field(default_factory=dict)
    events: list[SchedulerEvent] = field(default_factory=list)
    outcomes: list[StepOutcome] = field(default_factory=list)

    def submit(self, slot: int, work: Work, request: GenerateRequest, **options: Any) -> SequenceKey:
        key = SequenceKey("a", slot, 0)
        self.scheduler.submit(key, work, request, 0.0, **options)
        self.take()
        return key

    def take(self) -> list[SchedulerEvent]:
        """New events; all are kept in `events` too."""
        new = self.scheduler.take_events()
        self.events.extend(new)
        return new

    def step(self, now: float = 0.0) -> StepOutcome | None:
        plan = self.scheduler.plan(now)
        self.take()
        if plan is None:
            return None
        outcome = self.scheduler.commit(plan, self.runner.run(plan), now)
        self.take()
        self.scheduler.check_integrity()
        for slot, token, end in zip(
            outcome.slots.tolist(), outcome.tokens.tolist(), outcome.ends.tolist(), strict=True
        ):
            self.tokens.setdefault(slot, []).append(token)
            if end:
                self.ends[slot] = end
        self.outcomes.append(outcome)
        return outcome

    def run(self, limit: int = 500) -> int:
        """Step until nothing can be computed; returns the number of steps."""
        for count in range(limit):
            if self.step() is None:
                return count
        raise AssertionError("the scheduler never comes to rest")

    def of_kind(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


Below = Callable[[ContentRunner, BlockPool], Any]  # makes what a Scheduler takes as its tiers


def make_stand(
    num_blocks: int = 64,
    caching: bool = True,
    below: Below | None = None,
    grammars: Guides | None = None,
    adapters: Adapters | None = None,
    **limits: Any,
) -> Stand:
    """`limits` are SchedulerSettings fields; small defaults. `below` makes the tiers below the pool."""
    defaults = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 128, "watermark": 0.0}
    pool, runner = BlockPool(num_blocks), ContentRunner(num_blocks, BLOCK)
    cache = PrefixCache(pool) if caching else None
    layout = KVLayout(1, 1, 1, BLOCK, "float32")
    tiers = None if below is None else below(runner, pool)
    settings, given = SchedulerSettings(**{**defaults, **limits}), {"grammars": grammars, "adapters": adapters}
    scheduler = Scheduler(settings, layout, Bank(pool, cache), tiers=tiers, **given)
    return Stand(scheduler, pool, cache, runner)
