"""Conversations, shared system prompts, and what an endless cache would find in them."""

from __future__ import annotations

from penstock.cluster.bench.ideal_cache import infinite_cache_tokens
from penstock.cluster.bench.sessions import SessionShape, with_shared_prefixes, with_turns
from penstock.cluster.bench.workload import fixed_plan, prompt_tokens


def test_turns_follow_each_other() -> None:
    plan = with_turns(fixed_plan(3, 20, 5, [0.0, 1.0, 2.0]), SessionShape(turns=4, think_s=2.0), seed=7)
    assert [p.after for p in plan] == [None, 0, 1, 2, None, 4, 5, 6, None, 8, 9, 10]
    thinking = [p.think_s for p in plan if p.after is not None]
    assert all(s > 0 for s in thinking)
    assert plan == with_turns(fixed_plan(3, 20, 5, [0.0, 1.0, 2.0]), SessionShape(turns=4, think_s=2.0), seed=7)


def test_shared_prefixes_stand_before_opening_turns_only() -> None:
    plan = with_turns(fixed_plan(60, 20, 5, [0.0] * 60), SessionShape(turns=2), seed=7)
    shared = with_shared_prefixes(plan, groups=3, tokens=32, seed=7)
    openings = [prompt_tokens(p, i, 500, 0) for i, p in enumerate(shared) if p.after is None]
    assert {len(tokens) for tokens in openings} == {52}
    heads = [tuple(tokens[:32]) for tokens in openings]
    assert len(set(heads)) == 3
    assert len({tuple(tokens[32:]) for tokens in openings}) == 60
    assert [p for p in shared if p.after is not None] == [p for p in plan if p.after is not None]
    assert with_shared_prefixes(plan, 0, 32, 7) == plan


def test_infinite_cache_by_hand() -> None:
    one = list(range(40))
    assert infinite_cache_tokens([one], 16) == (0, 40)
    assert infinite_cache_tokens([one, one], 16) == (32, 80)
    assert infinite_cache_tokens([one[:32], one[:32]], 16) == (31, 64)  # the last token is always computed
    assert infinite_cache_tokens([one, one[:16] + [99] * 24], 16) == (16, 80)
    assert infinite_cache_tokens([[99] * 16 + one[16:], one], 16) == (0, 80)  # a chain, not a set of blocks
