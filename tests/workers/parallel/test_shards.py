"""Who holds what: every index once, or as often as it must be repeated."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.workers.errors import ConfigError
from penstock.workers.parallel.shards import WHOLE, TensorShard, Widths, fitting_widths, require_width

LLAMA = Widths(12, 4, (("the dense feed-forward block", 2048),))


def ranks(width):
    return [TensorShard(rank, width) for rank in range(width)]


@given(st.integers(1, 8), st.integers(8, 5000))
def test_columns_are_divided_without_gap_or_overlap(width, count):
    parts = [shard.columns(count) for shard in ranks(width)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert all(len(part) > 0 for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 16


@pytest.mark.parametrize(
    ("count", "width", "sizes"), [(2048, 2, {1024}), (40, 4, {10}), (1000, 3, {328, 336}), (10, 4, {2, 3}), (9, 9, {1})]
)
def test_columns_are_cut_between_runs_where_there_are_enough(count, width, sizes):
    assert {len(shard.columns(count)) for shard in ranks(width)} == sizes


@given(st.integers(1, 9), st.integers(1, 300))
def test_vocabulary_parts_are_of_one_size_up_to_the_end(width, count):
    parts = [shard.vocabulary(count) for shard in ranks(width)]
    assert list(itertools.chain(*parts)) == list(range(count))
    size = WHOLE.vocabulary_size(count) if width == 1 else ranks(width)[0].vocabulary_size(count)
    assert size * width >= count
    assert all(len(part) == size for part in parts if part.stop < count)
    assert all(part.start == rank * size for rank, part in enumerate(parts) if len(part))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(12, 4, 2), (12, 4, 4), (12, 4, 12), (6, 2, 6), (4, 1, 4), (8, 8, 2)]
)
def test_query_heads_find_their_key_heads_on_their_own_rank(heads, kv_heads, width):
    group = heads // kv_heads
    held = []
    for shard in ranks(width):
        queries, keys = shard.heads(heads), shard.kv_heads(kv_heads)
        held += queries
        assert {query // group for query in queries} == set(keys)
        # and in the same order, evenly: what a kernel takes for granted
        own = len(queries) // len(keys)
        assert [query // group - keys.start for query in queries] == [index // own for index in range(len(queries))]
    assert held == list(range(heads))


def test_one_rank_adds_the_bias():
    assert [shard.adds_bias for shard in ranks(4)] == [True, False, False, False]


def test_widths_that_fit():
    assert fitting_widths(LLAMA) == (1, 2, 4, 12)
    assert fitting_widths(Widths(6, 2, ())) == (1, 2, 6)
    assert fitting_widths(Widths(5, 5, ())) == (1, 5)
    assert fitting_widths(Widths(8, 8, (("an expert", 3),))) == (1, 2)


@pytest.mark.parametrize(
    ("widths", "width", "words"),
    [
        (LLAMA, 5, "5: does not divide the 12 attention heads; this model can be cut for 1, 2, 4, 12"),
        (LLAMA, 3, "neither divides the 4 key and value heads nor is a multiple of them"),
        (LLAMA, 24, "24: does not divide the 12 attention heads"),
        (LLAMA, 0, "must be 1 to 1024"),
        (
            Widths(8, 8, (("an expert", 3),)),
            4,
            "4: is above the 3 columns of an expert; this model can be cut for 1, 2",
        ),
    ],
)
def test_others_are_refused_with_the_numbers(widths, width, words):
    with pytest.raises(ConfigError, match="tensor_parallel_size") as refused:
        require_width(widths, width)
    assert words in str(refused.value)
    assert refused.value.key == "tensor_parallel_size"


def test_one_rank_is_always_possible():
    for widths in (LLAMA, Widths(1, 1, (("x", 1),))):
        require_width(widths, 1)
