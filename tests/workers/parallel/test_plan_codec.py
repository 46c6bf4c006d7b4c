"""Plans survive the way to another rank bit by bit; bytes that are no plan are refused before anything is built."""

import struct
from dataclasses import fields, replace

import numpy as np
import pytest
from fakes.random_plans import assert_equal, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import WireError
from penstock.workers.parallel import plan_codec
from penstock.workers.parallel.plan_codec import decode_plan, encode_plan
from penstock.workers.scheduler.plan import SamplingBatch, StepPlan


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(0, 40), edits=st.booleans(), scored=st.booleans())
def test_plans_come_back_as_they_were(seed: int, rows: int, edits: bool, scored: bool) -> None:
    plan = make_plan(seed, rows, edits=edits, scored=scored)
    assert_equal(plan, decode_plan(bytearray(encode_plan(plan))))


def test_every_field_of_a_plan_travels() -> None:
    plain = {"step", "num_decode", "num_continued", "sampling", "scored", "follows"}
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
        {"num_continued": 5},
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
    struct.pack_into("<I", data, 24, 2**32 - 1)
    with pytest.raises(WireError, match="add up to"):
        decode_plan(data)
