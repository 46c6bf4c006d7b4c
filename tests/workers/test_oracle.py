"""The oracle reads its blocks and nothing else, and says what `expected_tokens` says, however a sequence is cut."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import ConfigError
from penstock.workers.oracle import OracleRunner, expected_tokens, oracle_layout
from penstock.workers.parallel.shards import TensorShard
from penstock.workers.protocol import SamplingParams
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan, StepResult
from penstock.workers.settings import KVSettings, RunnerSettings

VOCAB, BLOCK, BLOCKS = 700, 4, 64


def make(**changed: Any) -> OracleRunner:
    runner = RunnerSettings(kind="oracle", oracle_vocab=VOCAB, **changed)
    layout = oracle_layout(runner, KVSettings(block_size=BLOCK))
    return OracleRunner(runner, layout, np.zeros((BLOCKS, layout.block_bytes), np.uint8))


def step(runner: OracleRunner, rows: list[dict[str, Any]], copies: Any = ()) -> StepResult:
    """Rows: tokens, start, blocks, and `sample` (None: a chunk in the middle, else SamplingParams)."""
    counts = [len(row["tokens"]) for row in rows]
    width = max(len(row["blocks"]) for row in rows)
    tables = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        tables[index, : len(row["blocks"])] = row["blocks"]
    sampled = [(index, row["sample"]) for index, row in enumerate(rows) if row["sample"] is not None]
    asks = [ask for _, ask in sampled]
    lengths = [rows[index]["start"] + counts[index] for index, _ in sampled]
    plan = StepPlan(
        step=1,
        slots=np.arange(len(rows), dtype=np.int32),
        starts=np.array([row["start"] for row in rows], np.int32),
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int32),
        token_ids=np.array([token for row in rows for token in row["tokens"]], np.int32),
        block_tables=tables,
        sample_rows=np.array([index for index, _ in sampled], np.int32),
        sampling=SamplingBatch(
            np.array([ask.temperature for ask in asks], np.float32),
            np.array([ask.top_k for ask in asks], np.int32),
            np.array([ask.top_p for ask in asks], np.float32),
            np.array([ask.min_p for ask in asks], np.float32),
            np.array([ask.seed for ask in asks], np.uint64),
            np.array([ask.choice for ask in asks], np.int32),
            np.array(lengths, np.int32),
            np.array([-1 if ask.logprobs is None else ask.logprobs for ask in asks], np.int32),
        ),
        num_decode=0,
        copies=np.array(copies, np.int32).reshape(-1, 2),
    )
    return runner.run(plan)


GREEDY = SamplingParams(1)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=60),
    st.lists(st.integers(1, 17), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from([GREEDY, SamplingParams(1, temperature=0.7, seed=2**64 - 5, choice=3)]),
)
def test_any_chunking_over_any_blocks_gives_the_expected_token(
    prompt: list[int], chunks: list[int], random: Any, ask: SamplingParams
) -> None:
    runner = make()
    blocks = random.sample(range(BLOCKS), 16)
    start, number = 0, 0
    while start < len(prompt):
        count = min(chunks[number % len(chunks)], len(prompt) - start)
        last = start + count == len(prompt)
        row = {"tokens": prompt[start : start + count], "start": start, "blocks": blocks}
        result = step(runner, [row | {"sample": ask if last else None}])
        start, number = start + count, number + 1
    assert tuple(result.token_ids.tolist()) == expected_tokens(prompt, ask, VOCAB)


def test_rows_of_a_batch_do_not_disturb_each_other() -> None:
    runner = make()
    prompts = [[index * 7 + offset for offset in range(3 + index)] for index in range(10)]
    rows = [
        {"tokens": prompt, "start": 0, "blocks": list(range(index * 4, index * 4 + 4)), "sample": GREEDY}
        for index, prompt in enumerate(prompts)
    ]
    assert step(runner, rows).token_ids.tolist() == [expected_tokens(prompt, GREEDY, VOCAB)[0] for prompt in prompts]


def prepared() -> tuple[OracleRunner, list[int], dict[str, Any]]:
    """A runner with 12 of 13 tokens of a sequence in blocks 5, 9, 2, and the row that adds the last one."""
    runner, prompt = make(), list(range(100, 113))
    step(runner, [{"tokens": prompt[:12], "start": 0, "blocks": [5, 9, 2, 7], "sample": None}])
    return runner, prompt, {"tokens": prompt[12:], "start": 12, "blocks": [5, 9, 2, 7], "sample": GREEDY}


def test_undamaged_blocks_give_the_expected_token() -> None:
    runner, prompt, row = prepared()
    assert tuple(step(runner, [row]).token_ids.tolist()) == expected_tokens(prompt, GREEDY, VOCAB)


@pytest.mark.parametrize("damage", ["lost", "doubled", "swapped", "foreign", "one bit", "stale position"])
def test_any_damage_to_a_block_changes_the_token(damage: str) -> None:
    runner, prompt, row = prepared()
    match damage:
        case "lost":
            runner._kv[9] = 0
        case "doubled":
            row["blocks"] = [5, 5, 2, 7]
        case "swapped":
            row["blocks"] = [9, 5, 2, 7]
        case "foreign":
            step(runner, [{"tokens": [1, 2, 3, 4], "start": 4, "blocks": [0, 9], "sample": None}])
        case "one bit":
            runner._kv[2, 0, 0, 3, 0] ^= 1
        case "stale position":
            runner._kv[2, 1, 0, 1, 0] += 4
    assert tuple(step(runner, [row]).token_ids.tolist()) != expected_tokens(prompt, GREEDY, VOCAB)


def test_copies_happen_before_the_step() -> None:
    runner, prompt, row = prepared()
    row["blocks"] = [5, 9, 30, 7]
    assert tuple(step(runner, [row], copies=[(2, 30)]).token_ids.tolist()) == expected_tokens(prompt, GREEDY, VOCAB)


def test_expected_tokens_goes_on_from_emitted_ones_and_stops() -> None:
    whole = expected_tokens((1, 2, 3), SamplingParams(30), VOCAB)
    assert len(set(whole)) > 25
    assert expected_tokens((1, 2, 3), SamplingParams(30), VOCAB, emitted=whole[:11]) == whole[11:]
    assert expected_tokens((1, 2, 3), SamplingParams(30, stop_token_ids=(whole[4],)), VOCAB) == whole[:5]


def test_seed_and_choice_matter_for_sampled_requests_only() -> None:
    def text(**sampling: Any) -> tuple[int, ...]:
        return expected_tokens((1, 2, 3), SamplingParams(10, **sampling), VOCAB)

    assert text(seed=1) == text(seed=2, choice=1)
    assert len({text(temperature=1.0, seed=seed, choice=choice) for seed in (1, 2) for choice in (0, 1)}) == 4


def test_logprobs_are_well_formed() -> None:
    rows = [
        {"tokens": [index], "start": 0, "blocks": [index], "sample": SamplingParams(1, logprobs=ask)}
        for index, ask in enumerate([None, 0, 3])
    ]
    logprobs = step(make(), rows).logprobs
    assert logprobs is not None
    assert np.isnan(logprobs.chosen).tolist() == [True, False, False]
    assert logprobs.top_counts.tolist() == [0, 0, 3]
    assert len(set(logprobs.top_ids[2].tolist())) == 3
    assert float(np.exp(logprobs.top_logprobs[2]).sum()) <= 1.0
    assert (np.diff(logprobs.top_logprobs[2]) < 0).all()


def test_wide_blocks_for_transfer_measurements() -> None:
    runner = make(oracle_block_bytes=64 << 10)
    assert runner.layout.block_bytes == 64 << 10
    row = {"tokens": [3, 1, 4, 1, 5], "start": 0, "blocks": [8, 3], "sample": GREEDY}
    assert tuple(step(runner, [row]).token_ids.tolist()) == expected_tokens([3, 1, 4, 1, 5], GREEDY, VOCAB)


def test_pace() -> None:
    slept: list[float] = []
    settings = RunnerSettings(kind="oracle", oracle_vocab=VOCAB, oracle_step_s=0.5, oracle_token_s=0.1)
    layout = oracle_layout(settings, KVSettings(block_size=BLOCK))
    data = np.zeros((BLOCKS, layout.block_bytes), np.uint8)
    runner = OracleRunner(settings, layout, data, lambda: 1.0, slept.append)
    step(runner, [{"tokens": [1, 2, 3], "start": 0, "blocks": [0], "sample": GREEDY}])
    assert slept == [pytest.approx(0.8)]


class Summing:
    """Ranks of one process: each but the first leaves its sums here, and the first adds them up."""

    def __init__(self) -> None:
        self.left: list[np.ndarray] = []

    def add_up(self, sums: np.ndarray) -> np.ndarray:
        if self.first:
            return sum(self.left, sums)
        self.left.append(sums)
        return sums

    first = False


class OracleRanks:
    """A group of oracles as one runner; the followers run first, so that their sums are there."""

    def __init__(self, width: int, heads: int = 0) -> None:
        settings = RunnerSettings(kind="oracle", oracle_vocab=VOCAB, oracle_kv_heads=heads)
        self.sums = Summing()
        self.ranks = []
        for rank in range(width):
            shard = TensorShard(rank, width)
            layout = oracle_layout(settings, KVSettings(block_size=BLOCK), shard)
            data = np.zeros((BLOCKS, layout.block_bytes), np.uint8)
            self.ranks.append(OracleRunner(settings, layout, data, shard=shard, group=self.sums))

    def run(self, plan: StepPlan) -> StepResult:
        self.sums.left.clear()
        self.sums.first = False
        for rank in self.ranks[1:]:
            rank.run(plan)
        self.sums.first = True
        return self.ranks[0].run(plan)


PROMPT = [(index * 37 + 5) % VOCAB for index in range(21)]
ROW = {"tokens": PROMPT, "start": 0, "blocks": [3, 9, 2, 7, 5, 1], "sample": GREEDY}


@pytest.mark.parametrize(("width", "heads"), [(2, 0), (4, 0), (2, 4), (4, 2), (1, 4), (3, 6), (8, 2)])
def test_ranks_together_say_what_one_oracle_says(width: int, heads: int) -> None:
    group = OracleRanks(width, heads)
    (expected,) = expected_tokens(PROMPT, GREEDY, VOCAB)
    assert step(group, [ROW]).token_ids.tolist() == [expected]  # type: ignore[arg-type]
    copied = {**ROW, "tokens": PROMPT[-1:], "start": len(PROMPT) - 1, "blocks": [3, 9, 2, 7, 30, 1]}
    assert step(group, [copied], copies=[(5, 30)]).token_ids.tolist() == [expected]  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["one rank's block is empty", "it is another rank's", "one of them is stale"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_needs_its_own_heads(damage: str, rank: int) -> None:
    group = OracleRanks(2)
    step(group, [ROW])  # type: ignore[arg-type]
    mine, other = group.ranks[rank]._kv, group.ranks[1 - rank]._kv
    if damage == "one rank's block is empty":
        mine[9] = 0
    elif damage == "it is another rank's":
        mine[9] = other[9]
    else:
        mine[9, 0] += 1
    again = {**ROW, "tokens": PROMPT[-1:], "start": len(PROMPT) - 1}
    (expected,) = expected_tokens(PROMPT, GREEDY, VOCAB)
    assert step(group, [again]).token_ids.tolist() != [expected]  # type: ignore[arg-type]


def test_widths_that_do_not_fit_the_heads() -> None:
    with pytest.raises(ConfigError, match="3 ranks neither divide the oracle's 4 KV heads nor are a multiple of them"):
        OracleRanks(3, 4)
