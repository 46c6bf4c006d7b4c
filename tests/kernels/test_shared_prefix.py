"""Groups of rows that share leading blocks: found exactly, worth it, and only what is full."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.shared_prefix import SharingRule, find_shared, private_begins


def tables_of(rows, width=40):
    """Distinct blocks, then `rows`: (members, blocks) that share their first member's first blocks, outermost first."""
    count = 1 + max((max(members) for members, _ in rows), default=0)
    tables = np.arange(count * width, dtype=np.int32).reshape(count, width)
    for members, blocks in rows:
        tables[list(members), :blocks] = tables[members[0], :blocks]
    return tables


def found(tables, full, rule, slots=16):
    runs = find_shared(tables, np.asarray(full, np.int64), slots, 100, rule)
    return [(run.rows.tolist(), run.begin, run.end) for run in runs]


def test_the_rule_of_four_sharers_and_256_tokens():
    tables = tables_of([(range(4), 16), (range(4, 7), 30), (range(7, 11), 15)])
    assert found(tables, [40] * 11, SharingRule()) == [([0, 1, 2, 3], 0, 16)]
    assert found(tables, [40] * 11, SharingRule(min_sharers=3)) == [([0, 1, 2, 3], 0, 16), ([4, 5, 6], 0, 30)]
    assert len(found(tables, [40] * 11, SharingRule(min_tokens=240))) == 2


def test_bytes_saved_count_all_sharers_but_one():
    tables = tables_of([(range(5), 16)])
    assert found(tables, [40] * 5, SharingRule(min_saved_bytes=4 * 256 * 100)) == [([0, 1, 2, 3, 4], 0, 16)]
    assert found(tables, [40] * 5, SharingRule(min_saved_bytes=4 * 256 * 100 + 1)) == []


def test_a_tree_has_parents_before_children():
    tables = tables_of([(range(9), 4), (range(6), 9), (range(4), 20), (range(4, 6), 30)])
    runs = found(tables, [40] * 9, SharingRule(2, 16))
    assert runs[0] == (list(range(9)), 0, 4)
    assert set(map(str, runs[1:])) == {
        str(([0, 1, 2, 3, 4, 5], 4, 9)),
        str(([0, 1, 2, 3], 9, 20)),
        str(([4, 5], 9, 30)),
    }
    order = [rows for rows, _, _ in runs]
    assert order.index([0, 1, 2, 3, 4, 5]) < order.index([0, 1, 2, 3])


def test_a_short_trunk_is_joined_to_its_branches():
    tables = tables_of([(range(9), 1), (range(5), 20)])
    assert found(tables, [40] * 9, SharingRule(4, 64)) == [([0, 1, 2, 3, 4], 0, 20)]


def test_only_full_blocks_and_rows_that_take_part():
    tables = tables_of([(range(6), 30)])
    assert found(tables, [40, 17, 40, 40, 0, 40], SharingRule(4, 64)) == [
        ([0, 1, 2, 3, 5], 0, 17),
        ([0, 2, 3, 5], 17, 30),
    ]
    assert found(tables, [0] * 6, SharingRule(2, 1)) == []


def test_equal_numbers_behind_a_difference_are_no_prefix():
    tables = tables_of([(range(4), 30)])
    tables[:, 0] = [900, 901, 902, 903]
    assert found(tables, [40] * 4, SharingRule(2, 16)) == []


def test_no_rows_and_bounded_work():
    assert find_shared(np.zeros((0, 4), np.int32), np.zeros(0, np.int64), 16, 1, SharingRule()) == ()
    tables = tables_of([(range(n + 1), 80 - n) for n in range(79, 0, -1)], width=90)
    runs = found(tables, [90] * 80, SharingRule(2, 1, max_nodes=5), slots=1)
    assert len(runs) == 5


@given(
    prefixes=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 8), st.integers(1, 30)), max_size=4),
    full=st.lists(st.integers(0, 40), min_size=16, max_size=16),
)
@settings(max_examples=100, deadline=None)
def test_runs_share_what_they_say_and_follow_one_another(prefixes, full):
    tables = tables_of([(range(16), 1), *((range(a, a + n), blocks) for a, n, blocks in prefixes)])
    full = np.array(full, np.int64)
    runs = find_shared(tables, full, 4, 100, SharingRule(2, 8))
    ends = np.zeros(16, np.int64)
    for run in runs:
        assert len(run.rows) >= 2
        assert (run.end - run.begin) * 4 >= 8
        assert (full[run.rows] >= run.end).all()
        assert (tables[run.rows, : run.end] == tables[run.rows[0], : run.end]).all()
        assert (ends[run.rows] == run.begin).all()
        ends[run.rows] = run.end
    assert np.array_equal(private_begins(runs, 16), ends)
