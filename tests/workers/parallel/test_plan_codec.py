"""Plans survive the way to another rank bit by bit; bytes that are no plan are refused before anything is built."""

import struct
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.parallel import plan_codec
from penstock.workers.parallel.plan_codec import decode_plan, encode_plan
from penstock.workers.scheduler.plan import LogitEdits, SamplingBatch, ScoredPrompt, StepPlan


def i32(rng: np.random.Generator, *shape: int, high: int = 2**31 - 1) -> np.ndarray:
    return rng.integers(0, high, shape).astype(np.int32)


def make_plan(seed: int, rows: int, *, edits: bool = False, scored: bool = False) -> StepPlan:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, rows)
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    sample_rows = np.flatnonzero(rng.random(rows) < 0.7).astype(np.int32)
    sampled = len(sample_rows)
    logit_edits = None
    if edits:
        columns = {}
        for field in fields(LogitEdits):
            real = field.name in ("presence", "frequency", "repetition", "bias_values")
            length = int(rng.integers(0, 9))
            columns[field.name] = rng.random(length).astype(np.float32) if real else i32(rng, length)
        logit_edits = LogitEdits(**columns)
    sampling = SamplingBatch(
        temperature=rng.random(sampled).astype(np.float32),
        top_k=i32(rng, sampled),
        top_p=rng.random(sampled).astype(np.float32),
        min_p=rng.random(sampled).astype(np.float32),
        seed=rng.integers(0, 2**64 - 1, sampled, np.uint64),
        choice=i32(rng, sampled),
        position=i32(rng, sampled),
        logprobs=rng.integers(-1, 20, sampled).astype(np.int32),
        edits=logit_edits,
    )
    kept = i32(rng, rows, 40, high=4096)
    return StepPlan(
        step=int(rng.integers(0, 2**40)),
        slots=i32(rng, rows),
        starts=i32(rng, rows),
        offsets=offsets,
        token_ids=i32(rng, int(offsets[-1])),
        block_tables=kept[:, : int(rng.integers(1, 41))],  # a view with gaps, as the scheduler's is
        sample_rows=sample_rows,
        sampling=sampling,
        num_decode=int(rng.integers(0, rows + 1)),
        copies=i32(rng, int(rng.integers(0, 3)), 2),
        scored=ScoredPrompt(i32(rng, 3), i32(rng, 3), i32(rng, 3)) if scored else None,
        embed_rows=sample_rows[:1],
    )


def assert_equal(one: object, other: object) -> None:
    for field in fields(one):  # type: ignore[arg-type]
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert left.shape == right.shape, field.name
            assert left.tobytes() == right.tobytes(), field.name
        elif hasattr(left, "__dataclass_fields__"):
            assert_equal(left, right)
        else:
            assert left == right, field.name


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(0, 40), edits=st.booleans(), scored=st.booleans())
def test_plans_come_back_as_they_were(seed: int, rows: int, edits: bool, scored: bool) -> None:
    plan = make_plan(seed, rows, edits=edits, scored=scored)
    assert_equal(plan, decode_plan(bytearray(encode_plan(plan))))


def test_every_field_of_a_plan_travels() -> None:
    plain = {"step", "num_decode", "sampling", "scored"}
    assert {field.name for field in fields(StepPlan)} == set(plan_codec._PLAN) | plain
    assert {field.name for field in fields(SamplingBatch)} == set(plan_codec._SAMPLING) | {"edits"}


def test_columns_can_be_written() -> None:
    """Runners hand them to torch, which warns of memory that it may not write."""
    plan = decode_plan(bytearray(encode_plan(make_plan(1, 5))))
    assert plan.token_ids.flags.writeable
    assert plan.sampling.seed.flags.aligned


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_plans_are_refused_or_stay_plans(data: st.DataObject) -> None:
    whole = encode_plan(make_plan(data.draw(st.integers(0, 50)), 6, edits=data.draw(st.booleans())))
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))] + data.draw(st.binary(max_size=12)))
    if broken:
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= data.draw(st.integers(0, 255))
    try:
        plan = decode_plan(broken)
    except WireError:
        return
    assert len(plan.offsets) == len(plan.slots) + 1 == len(plan.block_tables) + 1
    assert plan.offsets[-1] == len(plan.token_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"starts": np.zeros(3, np.int32)},
        {"offsets": np.array([0, 2, 1, 4, 5], np.int32)},
        {"offsets": np.array([1, 2, 3, 4, 5], np.int32)},
        {"sample_rows": np.array([-1], np.int32)},
        {"sample_rows": np.array([4], np.int32)},
        {"num_decode": 5},
        {"copies": np.zeros(3, np.int32)},
        {"block_tables": np.zeros((3, 2), np.int32)},
    ],
)
def test_columns_that_do_not_fit_each_other(change: dict) -> None:
    one = np.zeros(1, np.float32), np.zeros(1, np.int32)
    sampling = SamplingBatch(one[0], one[1], one[0], one[0], np.zeros(1, np.uint64), one[1], one[1], one[1])
    four = np.zeros(4, np.int32)
    offsets = np.array([0, 1, 2, 3, 5], np.int32)
    tables = np.zeros((4, 2), np.int32)
    good = StepPlan(1, four, four, offsets, np.zeros(5, np.int32), tables, np.array([3], np.int32), sampling, 2)
    decode_plan(encode_plan(good))
    with pytest.raises(WireError):
        decode_plan(encode_plan(replace(good, **change)))


def test_lengths_that_promise_more_than_came_allocate_nothing() -> None:
    data = bytearray(encode_plan(make_plan(3, 4)))
    struct.pack_into("<I", data, 16, 2**32 - 1)
    with pytest.raises(WireError, match="add up to"):
        decode_plan(data)
