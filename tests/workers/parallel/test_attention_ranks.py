"""The parts of a plan, each run on its own rank's storage, do what the whole plan does on one storage of all blocks."""

from __future__ import annotations

import numpy as np
import pytest
from fakes.content_runner import ContentRunner, expected_tokens, slot_values
from fakes.scheduler_stand import BLOCK
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.kv.banks import make_banks
from penstock.workers.kv.layout import KVLayout
from penstock.workers.parallel.attention_ranks import PlanParts
from penstock.workers.parallel.context_parallel import SharedChunk
from penstock.workers.parallel.shared_prompts import Banks
from penstock.workers.protocol import EndReason, GenerateRequest, SamplingParams
from penstock.workers.scheduler.plan import StepPlan, StepResult
from penstock.workers.scheduler.scheduler import Scheduler, SequenceKey, Work
from penstock.workers.settings import SchedulerSettings

SIZE, SCRATCH = 16, 20  # blocks of a bank, and for prompts that all ranks compute


class RankedRunner:
    """Runs every part on a runner of its own, and the whole plan on one beside them."""

    def __init__(self, ranks: int, threshold: int = 0) -> None:
        self.parts = PlanParts(tuple(range(ranks)), Banks(SIZE, SCRATCH, threshold), BLOCK)
        self.whole = ContentRunner(ranks * SIZE, BLOCK)
        self.ranks = [ContentRunner(SIZE + SCRATCH, BLOCK) for _ in range(ranks)]
        self.rows_of_rank = [0] * ranks
        self.shared: list[SharedChunk] = []

    def run(self, plan: StepPlan) -> StepResult:
        expected = self.whole.run(plan)
        tokens = np.full(len(plan.sample_rows), -7, np.int32)
        cut = self.parts.cut(plan)
        wanted = cut.wanted
        for place, chunk in enumerate(cut.shared):
            self.exchange(plan, chunk, [cut.tables_of_shared(rank)[place] for rank in range(len(self.ranks))])
        for number, runner in enumerate(self.ranks):
            part = cut.part(number)
            sampled, scored = wanted[number]
            self.rows_of_rank[number] += len(part.slots)
            assert part.num_tokens == len(part.token_ids)
            assert (np.diff(part.offsets)[: part.num_decode] == 1).all()
            # This runner samples in the order of rows; pieces of shared prompts stand behind those of whole rows.
            tokens[sampled[np.argsort(part.sample_rows)]] = runner.run(part).token_ids
            if part.scored is not None:
                self.check_scored(plan, part, scored)
        np.testing.assert_array_equal(tokens, expected.token_ids)
        np.testing.assert_array_equal(np.concatenate([r.blocks[:SIZE] for r in self.ranks]), self.whole.blocks)
        return expected

    def exchange(self, plan: StepPlan, chunk: SharedChunk, tables: list[np.ndarray]) -> None:
        """What ranks give each other: the beginning that they lack, and what each computes."""
        self.shared.append(chunk)
        begin, end = chunk.held // BLOCK, -(-chunk.start // BLOCK)
        owners = self.ranks[chunk.owner].blocks[tables[chunk.owner][begin:end]]
        positions = np.concatenate([chunk.positions(rank) for rank in range(len(self.ranks))])
        tokens = plan.token_ids[positions - chunk.start + plan.offsets[chunk.row]]
        for runner, table in zip(self.ranks, tables, strict=True):
            if chunk.held < chunk.start:
                runner.blocks[table[begin:end]] = owners
            values = [
                slot_values([token], at)[0] for token, at in zip(tokens.tolist(), positions.tolist(), strict=True)
            ]
            runner.blocks[table[positions // BLOCK], positions % BLOCK] = values

    def check_scored(self, plan, part, scored):
        assert plan.scored is not None
        np.testing.assert_array_equal(part.scored.targets, plan.scored.targets[scored])
        fed = part.token_ids[part.scored.token_rows]
        np.testing.assert_array_equal(fed, plan.token_ids[plan.scored.token_rows[scored]])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0, 6])
@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_parts_do_what_the_whole_does(ranks, threshold, data):
    banks = make_banks(ranks, SIZE, np.zeros(ranks * SIZE, np.uint64), prefix_caching=True)
    limits = SchedulerSettings(max_num_seqs=6, max_num_batched_tokens=24, max_model_len=64, watermark=0.0)
    layout = KVLayout(1, 1, 1, BLOCK, "float32")
    scheduler, runner = Scheduler(limits, layout, *banks), RankedRunner(ranks, threshold)
    expected, produced, ended = {}, {}, {}
    for slot in range(data.draw(st.integers(1, 9))):
        family, length = data.draw(st.integers(0, 2)), data.draw(st.sampled_from([1, 4, 8, 8, 13, 30]))
        prompt = [(family * 7 + i * i) % 50 for i in range(length)]
        logprobs = data.draw(st.sampled_from([None, None, 0]))
        output = data.draw(st.integers(1, 12))
        sampling = SamplingParams(max_tokens=output, prompt_logprobs=logprobs)
        expected[slot], produced[slot] = expected_tokens(prompt, output), []
        request = GenerateRequest("r", tuple(prompt), sampling, prefix_root=bytes([family]) * 32)
        scheduler.submit(SequenceKey("a", slot, 0), Work.GENERATE, request, 0.0)
        for _ in range(data.draw(st.integers(0, 3))):
            step(scheduler, runner, produced, ended)
    while step(scheduler, runner, produced, ended):
        pass
    assert produced == expected
    assert set(ended) == set(expected)
    if len(expected) >= 6 and ranks > 1:
        assert sum(rows > 0 for rows in runner.rows_of_rank) > 1  # the work is shared


def test_sharing_meets_every_case():
    """That the cases above are not idle: beginnings found in the cache, gone on with, and several prompts at once."""
    banks = make_banks(2, SIZE, np.zeros(2 * SIZE, np.uint64), prefix_caching=True)
    limits = SchedulerSettings(max_num_seqs=6, max_num_batched_tokens=24, max_model_len=64, watermark=0.0)
    scheduler, runner = Scheduler(limits, KVLayout(1, 1, 1, BLOCK, "float32"), *banks), RankedRunner(2, 6)
    produced, ended, most = {}, {}, 0
    prompts = [[i * i % 50 for i in range(length)] for length in (30, 38, 31, 40, 12, 13)]
    for slot, prompt in enumerate(prompts):
        produced[slot] = []
        request = GenerateRequest("r", tuple(prompt), SamplingParams(max_tokens=2), prefix_root=bytes([slot // 2]) * 32)
        scheduler.submit(SequenceKey("a", slot, 0), Work.GENERATE, request, 0.0)
        if slot % 2 == 0 and slot < 4:
            while step(scheduler, runner, produced, ended):
                pass
    while True:
        before = len(runner.shared)
        if not step(scheduler, runner, produced, ended):
            break
        most = max(most, len(runner.shared) - before)
    assert list(produced.values()) == [expected_tokens(prompt, 2) for prompt in prompts]
    assert most > 1
    assert any(0 < chunk.start == chunk.held for chunk in runner.shared)
    assert any(chunk.held == 0 < chunk.start for chunk in runner.shared)


def step(scheduler, runner, produced, ended) -> bool:
    plan = scheduler.plan(0.0)
    scheduler.take_events()
    if plan is None:
        return False
    result = runner.run(plan)
    scored = None
    if plan.scored is not None:
        count = len(plan.scored.targets)
        scored = type(result.logprobs)(
            np.zeros(count, np.float32),
            np.zeros(count, np.int32),
            np.zeros((count, 0), np.int32),
            np.zeros((count, 0), np.float32),
        )
    outcome = scheduler.commit(plan, StepResult(result.token_ids, result.logprobs, scored), 0.0)
    scheduler.take_events()
    for row, token in enumerate(outcome.tokens.tolist()):
        produced[int(outcome.slots[row])].append(token)
        if outcome.ends[row] != EndReason.NONE:
            ended[int(outcome.slots[row])] = True
    return True
