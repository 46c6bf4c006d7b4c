"""A plan's arrays as tensors: equal to the plain loop for any plan, in place for plans of one shape, padded rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.plan import SamplingBatch, ScoredPrompt, StepPlan
from penstock.workers.static_memory import StaticMemory
from penstock.workers.step_inputs import StepInputs, StepLimits, _write_sampling

LIMITS = StepLimits(max_rows=8, max_tokens=40, table_width=6)


def make_inputs(limits=LIMITS):
    return StepInputs(limits, StaticMemory(torch.device("cpu")))


def make_plan(counts, starts, sample_rows, scored=(), seed=0):
    rng = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    rows, total = len(sample_rows), int(offsets[-1])

    def ints(high):
        return rng.integers(0, high, rows).astype(np.int32)

    def floats():
        return rng.random(rows, dtype=np.float32)

    seed = rng.integers(0, 1 << 64, rows, np.uint64)
    unused = np.zeros(len(scored), np.int32)
    return StepPlan(
        step=1,
        slots=np.arange(len(counts), dtype=np.int32),
        starts=np.array(starts, np.int32),
        offsets=offsets,
        token_ids=rng.integers(0, 1000, total).astype(np.int32),
        block_tables=rng.integers(0, 50, (len(counts), 3)).astype(np.int32),
        sample_rows=np.array(sample_rows, np.int32),
        sampling=SamplingBatch(floats(), ints(50), floats(), floats(), seed, ints(9), ints(99), ints(2)),
        num_decode=0,
        scored=ScoredPrompt(np.array(scored, np.int32), unused, unused) if len(scored) else None,
    )


def plain(plan):
    """Token ids, positions and wanted rows by a loop over rows and tokens."""
    positions, wanted = [], []
    for row, start in enumerate(plan.starts.tolist()):
        positions += [start + j for j in range(int(plan.offsets[row + 1] - plan.offsets[row]))]
    wanted = [int(plan.offsets[row + 1]) - 1 for row in plan.sample_rows.tolist()]
    wanted += [] if plan.scored is None else plan.scored.token_rows.tolist()
    return plan.token_ids.tolist(), positions, wanted


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_plan_equals_the_plain_loop(data):
    inputs = make_inputs()
    for _ in range(3):  # buffers are used again, by steps of other shapes
        counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
        starts = [data.draw(st.integers(0, 90)) for _ in counts]
        rows = sorted(data.draw(st.sets(st.integers(0, len(counts) - 1))))
        scored = data.draw(st.lists(st.integers(0, sum(counts) - 1), max_size=4))
        plan = make_plan(counts, starts, rows, scored, seed=data.draw(st.integers(0, 9)))
        found = inputs.fill(plan)
        assert [found.token_ids.tolist(), found.positions.tolist(), found.wanted.tolist()] == list(plain(plan))
        assert all(each.dtype == torch.int64 for each in (found.token_ids, found.positions, found.wanted))


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_padded_rows_feed_token_0_and_are_wanted(rows):
    inputs = make_inputs()
    plan = make_plan([1], [17], [0])
    found = inputs.fill(plan, rows)
    padding = rows - 1
    assert found.token_ids.tolist() == [*plan.token_ids.tolist(), *[0] * padding]
    assert found.positions.tolist() == [17, *[0] * padding]
    assert found.wanted.tolist() == list(range(rows))
    batch = inputs.padded_batch(plan, rows, scratch_block=77)
    assert batch.starts.tolist() == [17, *[0] * padding]
    assert batch.offsets.tolist() == list(range(rows + 1))
    assert batch.block_tables[0, :3].tolist() == plan.block_tables[0].tolist()
    assert (batch.block_tables[1:] == 77).all()
    assert batch.block_tables.shape == (rows, LIMITS.table_width)


def test_padded_rows_of_a_smaller_step_do_not_keep_a_larger_ones_blocks():
    inputs = make_inputs()
    inputs.padded_batch(make_plan([1] * 8, [40] * 8, range(8)), 8, 99)
    batch = inputs.padded_batch(make_plan([1, 1], [4, 5], [0, 1]), 8, 99)
    assert (batch.block_tables[2:] == 99).all()
    assert not batch.starts[2:].any()


def test_a_bucket_keeps_its_addresses_whatever_it_holds():
    inputs = make_inputs()
    first = inputs.fill(make_plan([], [], []), 4)
    addresses = [each.data_ptr() for each in (first.token_ids, first.positions, first.wanted)]
    inputs.fill(make_plan([5, 2], [0, 3], [1]))
    plan = make_plan([1, 1, 1], [3, 8, 2], [0, 1, 2])
    again = inputs.fill(plan, 4)
    assert [each.data_ptr() for each in (again.token_ids, again.positions, again.wanted)] == addresses
    assert first.token_ids.tolist() == [*plan.token_ids.tolist(), 0]


def test_sampling_parameters_arrive_bit_for_bit():
    inputs = make_inputs()
    plan = make_plan([2, 1, 3], [0, 4, 9], [0, 2])
    tensors = inputs.fill(plan)
    _write_sampling(inputs._hosts[0].arrays((6, 2, 2)), plan.sampling)
    for name in ("temperature", "top_p", "min_p", "top_k", "choice", "position"):
        assert getattr(tensors.sampling, name).tolist() == getattr(plan.sampling, name).tolist(), name
    assert tensors.sampling.seed.numpy().view(np.uint64).tolist() == plan.sampling.seed.tolist()
    dtypes = [torch.float32, torch.int64, torch.float64, torch.float32, torch.int64, torch.int64, torch.int64]
    assert [column.dtype for column in tensors.sampling.columns] == dtypes


@pytest.mark.parametrize(
    "plan",
    [make_plan([1] * 9, [0] * 9, [0]), make_plan([41], [0], [0])],
)
def test_a_step_beyond_the_limits_is_refused(plan):
    with pytest.raises(IntegrityError, match="the runner holds 8 rows and 40 tokens"):
        make_inputs().fill(plan)


def test_a_table_wider_than_the_longest_sequence_is_refused():
    with pytest.raises(IntegrityError, match="3 wide; the runner holds 2"):
        make_inputs(StepLimits(8, 40, 2)).fill(make_plan([1], [0], [0]))


def test_the_largest_step_fits():
    plan = make_plan([5] * 8, [0] * 8, range(8), scored=range(40))
    assert len(make_inputs().fill(plan).wanted) == 48
