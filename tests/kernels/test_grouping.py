"""How rows are grouped: a partition, little padding, bounded memory."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.kernels.cpu import grouping
from penstock.kernels.cpu.grouping import group_rows


def group(rows, token_bytes=256):
    starts, counts = np.array(rows, np.int32).T
    return group_rows(starts, counts, token_bytes)


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 600)), min_size=1, max_size=40),
    st.sampled_from([256, 65536]),
)
@settings(max_examples=100, deadline=None)
def test_groups_partition_the_rows_and_fit(rows, token_bytes):
    groups = group(rows, token_bytes)
    assert sorted(int(row) for g in groups for row in g.rows) == list(range(len(rows)))
    for g in groups:
        assert (np.diff(g.rows) > 0).all()
        assert g.num_queries == max(rows[row][1] for row in g.rows)
        assert g.num_keys == max(sum(rows[row]) for row in g.rows)
        assert g.causal == all(start == 0 for start, _ in (rows[r] for r in g.rows)) or g.num_queries == 1
        if g.causal:
            assert g.num_queries == g.num_keys
        if len(g.rows) > 1:
            assert len(g.rows) * g.num_keys * token_bytes <= grouping.GATHER_BYTES


def test_decodes_of_like_length_are_one_group():
    assert len(group([(300 + k, 1) for k in range(20)])) == 1


def test_one_long_context_does_not_pad_the_short_ones():
    groups = group([(4000, 1)] + [(40, 1)] * 31)
    assert [g.num_keys for g in groups] == [4001, 41]
