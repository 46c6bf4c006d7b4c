"""The host half of attention: every (token, key) is covered once, within the maxima, evenly, and quickly."""

import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from penstock.kernels.gpu import attention_items as items
from penstock.kernels.gpu.attention_plan import (
    Geometry,
    PlanSettings,
    caps_for,
    fixed_caps,
    make_plan,
    query_tile_for,
    write_slots,
)
from penstock.kernels.ragged import RaggedBatch
from penstock.kernels.shared_prefix import SharingRule


def batch_of(rows, slots, seed=0, shared=()):
    starts, counts = np.array(rows, np.int32).reshape(-1, 2).T
    widths = -(-(starts + counts) // slots)
    tables = np.random.default_rng(seed).permutation(len(rows) * max(1, int(widths.max()))).astype(np.int32)
    tables = tables.reshape(len(rows), -1)
    for members, blocks in shared:
        tables[list(members), :blocks] = tables[members[0], :blocks]
    return RaggedBatch(starts.copy(), np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), tables)


def geometry(group=4, heads=2, slots=4):
    return Geometry(group * heads, heads, slots, 1024)


def covered(plan, batch, slots):
    """{token: sorted physical (block, slot) pairs that its items read}, from the plan alone."""
    found = {token: [] for token in range(batch.num_tokens)}
    tables = plan.tables.reshape(-1)
    for item in (*plan.decode_items, *plan.tile_items):
        keys = np.arange(item[items.KV_BEGIN], item[items.KV_END])
        places = tables[item[items.TABLE_BEGIN] + keys // slots].astype(np.int64) * slots + keys % slots
        begin = item[items.TOKEN_BEGIN]
        for n in range(item[items.NUM_TOKENS]):
            token = plan.tokens[begin + n]
            at = plan.positions[token]
            assert item[items.LOWEST] <= at
            found[int(token)] += places[keys <= at].tolist()
    return {token: sorted(places) for token, places in found.items()}


def expected(batch, slots):
    result = {}
    for row, (start, count) in enumerate(zip(batch.starts, batch.counts, strict=True)):
        for new in range(count):
            keys = np.arange(start + new + 1)
            places = batch.block_tables[row, keys // slots].astype(np.int64) * slots + keys % slots
            result[int(batch.offsets[row]) + new] = sorted(places.tolist())
    return result


def check_merges(plan):
    """Every partial state belongs to exactly one merge, in the order of its keys; other tokens are written directly."""
    states = {}
    for item in (*plan.tile_items, *plan.decode_items):
        for n in range(item[items.NUM_TOKENS]):
            token = int(plan.tokens[item[items.TOKEN_BEGIN] + n])
            first = item[items.PARTIAL_BEGIN]
            states.setdefault(token, []).append((int(item[items.KV_BEGIN]), None if first < 0 else int(first) + n))
    listed = {
        int(token): plan.merge_slots[plan.merge_indptr[m] : plan.merge_indptr[m + 1]].tolist()
        for m, token in enumerate(plan.merge_tokens)
    }
    for token, parts in states.items():
        if len(parts) == 1 and parts[0][1] is None:
            assert token not in listed
        else:
            assert listed.pop(token) == [slot for _, slot in sorted(parts)]
    assert listed == {}
    used = sorted(plan.merge_slots.tolist())
    assert used == list(range(plan.partial_tokens))


@given(
    rows=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=10),
    shared=st.lists(st.tuples(st.integers(0, 6), st.integers(2, 8), st.integers(1, 12)), max_size=2),
    group=st.integers(1, 9),
    query_tile=st.sampled_from([0, 16, 64]),
    fixed=st.sampled_from([0, 0, 16]),
    least=st.sampled_from([4, 16, 128]),
)
@example(rows=[(0, 0), (0, 2)], shared=[], group=1, query_tile=0, fixed=16, least=4)
@settings(max_examples=120, deadline=None)
def test_every_key_of_every_token_is_covered_once(rows, shared, group, query_tile, fixed, least):
    prefixes = [
        (range(a, min(a + n, len(rows))), blocks)
        for a, n, blocks in shared
        if a < len(rows) and all(start >= blocks * 4 for start, _ in rows[a : a + n])
    ]
    batch = batch_of(rows, 4, shared=prefixes)
    how = PlanSettings(sm_count=8, query_tile=query_tile, fixed_split=fixed, min_chunk=least, sharing=SharingRule(2, 4))
    plan = make_plan(batch, geometry(group), how)
    assert covered(plan, batch, 4) == expected(batch, 4)
    check_merges(plan)
    slots = write_slots(batch.starts, batch.counts, batch.block_tables, 4)
    assert np.array_equal(plan.write_slots, slots)
    assert [place[-1:] for place in ([int(slot)] for slot in slots)] == [
        [int(batch.block_tables[row, p // 4]) * 4 + p % 4]
        for row, (start, count) in enumerate(zip(batch.starts, batch.counts, strict=True))
        for p in range(start, start + count)
    ]


def test_random_batches_stay_within_the_bounds_of_their_maxima():
    rng = np.random.default_rng(1)
    geom = geometry(group=4, heads=8, slots=16)
    for fixed in (0, 64):
        how = PlanSettings(query_tile=64, fixed_split=fixed, min_chunk=32)
        caps = caps_for(32, 256, 64, geom, how) if not fixed else fixed_caps(32, 256, 1300, 64, 4, fixed)
        for _ in range(150):
            counts = np.where(rng.random(rng.integers(1, 33)) < 0.6, 1, rng.integers(1, 30))
            counts = counts[np.cumsum(counts) <= 256]
            rows = [(int(rng.integers(0, 1270 if rng.random() < 0.2 else 90)), int(n)) for n in counts]
            blocks = int(rng.integers(0, 70))
            members = [i for i, (start, _) in enumerate(rows) if start >= blocks * 16]
            batch = batch_of(rows, 16, shared=[(members, blocks)] if members else ())
            plan = make_plan(batch, geom, how, caps)  # raises where a bound is broken
            assert len(plan.tokens) <= caps.token_list


def test_a_batch_over_the_bounds_is_refused():
    caps = caps_for(2, 2, 16, geometry(), PlanSettings(sharing=None))
    with pytest.raises(ValueError, match="larger than the plan's maxima"):
        make_plan(batch_of([(3, 40)] * 3, 4), geometry(), PlanSettings(sharing=None), caps)


@pytest.mark.parametrize(("rows", "heads"), [(64, 8), (16, 8), (1, 8), (3, 1)])
def test_work_is_even_for_lengths_that_differ_much(rows, heads):
    lengths = np.minimum(np.random.default_rng(3).zipf(1.3, rows) * 200, 65536)
    lengths[0] = 65536
    batch = batch_of([(int(n) - 1, 1) for n in lengths], 16)
    plan = make_plan(batch, geometry(heads=heads, slots=16), PlanSettings())
    workers = np.zeros(264)
    for item in plan.decode_items:  # as the device starts them: each on the worker that is free first
        for _ in range(heads):
            workers[np.argmin(workers)] += item[items.KV_END] - item[items.KV_BEGIN]
    assert workers.max() <= 1.3 * workers.mean()


def test_short_and_many_rows_are_not_split():
    plan = make_plan(batch_of([(1000, 1)] * 256, 16), geometry(heads=8, slots=16), PlanSettings(sharing=None))
    assert len(plan.decode_items) == 256
    assert len(plan.merge_tokens) == 0
    plan = make_plan(batch_of([(0, 8192)], 16), geometry(heads=8, slots=16), PlanSettings())
    assert len(plan.merge_tokens) == 0
    assert plan.query_tile == 128


def test_the_longest_items_come_first():
    plan = make_plan(batch_of([(10, 1), (5000, 1), (300, 1), (0, 90)], 16), geometry(slots=16), PlanSettings())
    for listed in (plan.decode_items, plan.tile_items):
        assert (np.diff(listed[:, items.KV_END] - listed[:, items.KV_BEGIN]) <= 0).all()


def test_tiles_fit_the_mean_row():
    assert [query_tile_for(tokens, 2, 4) for tokens in (2, 8, 32, 33)] == [16, 16, 64, 128]
    assert query_tile_for(1, 1, 71) == 128


def test_a_step_is_planned_quickly():
    """Far above what it takes on an idle core (see the README), far below what loops over rows would."""
    rng = np.random.default_rng(0)
    batch = batch_of([(int(n), 1) for n in rng.integers(1900, 2100, 256)], 16)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        make_plan(batch, geometry(heads=8, slots=16), PlanSettings())
        times.append(time.perf_counter() - begin)
    assert min(times) < 2e-3
