"""Sequences that wait for KV from host memory or disk: what they find, and that nobody waits too long for it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.content_runner import ContentRunner
from fakes.manual_tiers import ManualTiers
from fakes.scheduler_stand import BLOCK, Stand, make_request, make_stand

from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.scheduler.events import RefusedEvent, StartedEvent, Work
from penstock.workers.scheduler.tier_loads import Tiers

PROMPT = list(range(8 * BLOCK))
OTHER = [40 - number for number in range(8 * BLOCK)]


class Tiered:
    """A stand of 12 blocks with tiers below; one prompt's blocks fit into the pool, two prompts' do not."""

    def __init__(self, tmp_path: Path, host_blocks: int = 100, disk_blocks: int = 0, patience_s: float = 10.0) -> None:
        disk = (tmp_path / "kv", disk_blocks) if disk_blocks else None

        def below(runner: ContentRunner, pool: BlockPool) -> tuple[Tiers, Callable[[int], float]]:
            self.tiers = ManualTiers(runner, pool.generations, host_blocks, disk)
            return self.tiers.tiers, lambda tokens: patience_s

        self.stand: Stand = make_stand(num_blocks=12, below=below)
        self._slot = 0

    def serve(self, prompt: list[int]) -> int:
        """One request to its end, with the tiers at work; how many of its tokens were found."""
        slot = self.submit(prompt)
        for _ in range(50):
            self.tiers.work_all()
            self.stand.step()
            if slot in self.stand.ends:
                self.tiers.work_all()
                return self.found(slot)
        raise AssertionError("it does not end")

    def submit(self, prompt: list[int], **changes: object) -> int:
        self._slot += 1
        self.stand.submit(self._slot, Work.GENERATE, make_request(prompt, 3, **changes))
        return self._slot

    def found(self, slot: int) -> int:
        return next(e.cached_tokens for e in self.stand.of_kind(StartedEvent) if e.key.slot == slot)

    def step(self, now: float) -> None:
        self.stand.step(now)
        self.stand.scheduler.check_integrity()


def test_what_the_pool_let_go_comes_back_from_host_memory(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path)
    assert tiered.serve(PROMPT) == 0
    assert tiered.serve(OTHER) == 0
    tokens = tiered.stand.tokens[1]
    assert tiered.serve(PROMPT) == 8 * BLOCK - 1
    assert tiered.stand.tokens[3] == tokens
    totals = tiered.tiers.tiers.totals()
    assert totals.host.hits > 0
    assert totals.host.loaded == totals.host.hits * BLOCK * 8
    assert totals.disk.held == totals.slow == 0


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path, host_blocks=3, disk_blocks=100)
    assert tiered.serve(PROMPT) == 0
    tokens = tiered.stand.tokens[1]
    assert tiered.serve(OTHER) == 0
    assert tiered.serve(PROMPT) == 8 * BLOCK - 1
    assert tiered.stand.tokens[3] == tokens
    assert tiered.tiers.tiers.totals().disk.hits > 0


def test_nobody_waits_longer_than_computing_takes(tmp_path: Path) -> None:
    """And while the disk still hangs, nobody waits for it at all."""
    tiered = Tiered(tmp_path, host_blocks=1, disk_blocks=100, patience_s=2.0)
    tiered.serve(PROMPT)
    tiered.serve(OTHER)
    slot = tiered.submit(PROMPT)
    tiered.step(0.0)
    assert tiered.stand.scheduler.next_deadline == 2.0
    tiered.step(1.9)
    assert slot not in tiered.stand.tokens
    reads = next(thread for thread in tiered.tiers.threads if thread.name == "kv-read")
    hanging, _ = reads.jobs.pop()
    assert hanging.set_running_or_notify_cancel()
    tiered.step(2.0)
    assert tiered.found(slot) == 3 * BLOCK, "as much as the pool still had"
    tiered.stand.run()
    assert tiered.stand.tokens[slot] == tiered.stand.tokens[1]
    assert tiered.tiers.tiers.totals().slow == 1
    tiered.serve(OTHER)
    again = tiered.submit([*PROMPT, 1])
    tiered.step(3.0)
    assert tiered.found(again) == 3 * BLOCK


def test_others_are_admitted_meanwhile(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path)
    tiered.serve(PROMPT)
    tiered.serve(OTHER)
    waiting, short = tiered.submit(PROMPT), tiered.submit([7, 7])
    tiered.step(0.0)
    assert short in tiered.stand.tokens
    assert waiting not in tiered.stand.tokens
    tiered.step(0.0)
    tiered.tiers.work_all()
    tiered.stand.run()
    assert tiered.found(waiting) == 8 * BLOCK - 1


@pytest.mark.parametrize("landing", [False, True])
def test_a_cancelled_one_leaves_no_block_behind(tmp_path: Path, landing: bool) -> None:
    tiered = Tiered(tmp_path) if landing else Tiered(tmp_path, host_blocks=1, disk_blocks=100)
    tiered.serve(PROMPT)
    tiered.serve(OTHER)
    key = tiered.stand.submit(9, Work.GENERATE, make_request(PROMPT, 3))
    tiered.step(0.0)
    assert bool(tiered.stand.scheduler._memory.landings) == landing, "host memory gives at once"
    assert (tiered.stand.pool.num_owned > 0) == landing
    tiered.stand.scheduler.cancel(key, 0.0)
    tiered.step(0.0)
    tiered.tiers.work_all()
    tiered.step(0.0)
    assert tiered.stand.pool.num_free == 12
    assert tiered.stand.scheduler.next_deadline is None


def test_its_time_in_the_queue_may_end_first(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path, patience_s=100.0)
    tiered.serve(PROMPT)
    tiered.serve(OTHER)
    tiered.submit(PROMPT, queue_timeout_s=1.0)
    tiered.step(0.0)
    tiered.step(1.0)
    assert len(tiered.stand.of_kind(RefusedEvent)) == 1
    tiered.tiers.work_all()
    tiered.step(1.0)
    assert tiered.stand.pool.num_free == 12


def test_damage_ends_a_load_early_and_the_rest_is_computed(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path)
    tiered.serve(PROMPT)
    tokens = tiered.stand.tokens[1]
    tiered.serve(OTHER)
    host = tiered.tiers.tiers._host
    fifth = list(host._held)[4]
    host.read(fifth)[0] ^= 1
    assert tiered.serve(PROMPT) == 4 * BLOCK
    assert tiered.stand.tokens[3] == tokens
    assert tiered.tiers.tiers.totals().host.errors == 1


def test_a_preempted_one_looks_below_again(tmp_path: Path) -> None:
    tiered = Tiered(tmp_path)
    slot = tiered.submit(PROMPT)
    tiered.step(0.0)
    sequence = tiered.stand.scheduler._table.sequences[0]
    assert sequence is not None
    assert sequence.looked_below
    tiered.stand.scheduler._roster.preempt(sequence)
    assert not sequence.looked_below
    tiered.tiers.work_all()
    tiered.stand.run()
    assert len(tiered.stand.tokens[slot]) == 3
