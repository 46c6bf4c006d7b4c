"""Digest chains, matching, publishing, eviction and the events that routers live on."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.prefix_cache import PrefixCache, Run, chain_digests

ROOT = b"r" * 32


def split_digests(digests: bytes) -> list[bytes]:
    """The digests of a chain, one by one."""
    return [digests[at : at + 32] for at in range(0, len(digests), 32)]


def test_chain_is_sha256_over_parent_and_tokens():
    tokens = list(range(9))
    raw = np.array(tokens, "<i4").tobytes()
    first = hashlib.sha256(ROOT + raw[:16]).digest()
    second = hashlib.sha256(first + raw[16:32]).digest()
    assert chain_digests(ROOT, tokens, 4) == first + second
    assert chain_digests(ROOT, tokens[:3], 4) == b""
    assert split_digests(first + second) == [first, second]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40), st.integers(1, 8), st.integers(0, 39))
def test_chain_splits_anywhere_and_depends_on_every_token(tokens, size, at):
    whole = split_digests(chain_digests(ROOT, tokens, size))
    cut = min(at, len(tokens)) // size
    head = whole[cut - 1] if cut else ROOT
    assert whole[:cut] + split_digests(chain_digests(head, tokens[cut * size :], size)) == whole
    if at < len(whole) * size:
        changed = [*tokens]
        changed[at] = changed[at] ^ 1
        other = split_digests(chain_digests(ROOT, changed, size))
        assert other[: at // size] == whole[: at // size]
        assert all(a != b for a, b in zip(other[at // size :], whole[at // size :], strict=True))
    assert not set(split_digests(chain_digests(b"s" * 32, tokens, size))) & set(whole)


def digests_of(tokens: list[int], root: bytes = ROOT) -> bytes:
    return chain_digests(root, tokens, 4)


class Holder:
    """What a sequence does with the cache: holds what is known of a chain, computes and publishes the rest."""

    def __init__(self, cache: PrefixCache, pool: BlockPool, digests: bytes, at_most: int | None = None) -> None:
        match = cache.match(digests)
        self.hits = match.num_blocks if at_most is None else min(at_most, match.num_blocks)
        self.cache, self.pool = cache, pool
        self.blocks = match.blocks[: self.hits]
        self.run: Run = cache.hold(match, self.hits)
        self.private = pool.allocate(len(digests) // 32 - self.hits)
        self.blocks = np.concatenate((self.blocks, self.private))
        self.digests = digests

    def publish(self) -> None:
        self.run, self.private = self.cache.publish(self.run, self.digests[self.hits * 32 :], self.private)

    def leave(self) -> None:
        self.cache.leave(self.run)
        self.pool.free(self.private)


def filled(num_blocks: int, tokens: list[int]) -> tuple[BlockPool, PrefixCache, Holder]:
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool)
    holder = Holder(cache, pool, digests_of(tokens))
    holder.publish()
    return pool, cache, holder


def check(pool: BlockPool, cache: PrefixCache, *holders: Holder) -> None:
    pool.check_integrity()
    cache.check_integrity(Counter(holder.run for holder in holders if holder.run.parent is not None))


def test_match_walks_to_the_first_miss():
    pool, cache, holder = filled(8, list(range(16)))
    assert cache.match(digests_of(list(range(16)))).blocks.tolist() == holder.blocks.tolist()
    assert cache.match(digests_of([0, 1, 2, 3, 9, 9, 9, 9])).blocks.tolist() == holder.blocks[:1].tolist()
    assert cache.match(digests_of(list(range(40)))).num_blocks == 4
    assert cache.match(digests_of(list(range(16)), b"salt" * 8)).num_blocks == 0
    assert cache.match(b"").num_blocks == 0
    check(pool, cache, holder)


def test_matches_part_runs_and_count_what_is_idle():
    pool, cache, holder = filled(8, list(range(16)))
    holder.leave()
    assert cache.match(digests_of(list(range(16)))).num_idle == pool.num_idle == 4
    head = Holder(cache, pool, digests_of(list(range(8))))
    assert (head.hits, pool.num_idle, pool.num_owned) == (2, 2, 2)
    assert cache.match(digests_of(list(range(16)))).num_idle == 2
    whole = Holder(cache, pool, digests_of(list(range(16))))
    assert whole.blocks.tolist() == holder.blocks.tolist()
    assert pool.num_idle == 0
    check(pool, cache, head, whole)
    head.leave()
    check(pool, cache, whole)
    assert pool.num_idle == 0
    whole.leave()
    assert pool.num_idle == 4
    check(pool, cache)


def test_first_of_equal_blocks_stays():
    pool, cache, first = filled(8, list(range(8)))
    twin = Holder(cache, pool, digests_of(list(range(12))), at_most=0)
    computed = twin.blocks.tolist()
    twin.publish()
    assert twin.private.tolist() == computed[:2]
    assert cache.match(digests_of(list(range(12)))).blocks.tolist() == [*first.blocks.tolist(), computed[2]]
    first.leave()
    assert pool.num_idle == 0, "the twin's third block keeps those before it"
    check(pool, cache, twin)
    twin.leave()
    assert (pool.num_idle, pool.num_free) == (3, 8)
    check(pool, cache)


def test_evicts_what_was_left_first_from_its_end_and_never_a_head_before_its_tail():
    pool, cache, first = filled(6, list(range(12)))
    second = Holder(cache, pool, digests_of([*range(4), *[9] * 8]))
    second.publish()
    first.leave()
    assert pool.num_idle == 2
    second.leave()
    order = [block for _ in range(6) for block in pool.allocate(1).tolist()]
    shared, mine, other = first.blocks[0], first.blocks[1:].tolist(), second.blocks[1:].tolist()
    assert order[1:] == [mine[1], mine[0], other[1], other[0], shared]
    assert len(cache) == 0
    check(pool, cache)


def test_a_prefix_that_is_used_again_moves_back_in_line():
    pool, cache, first = filled(4, list(range(8)))
    second = Holder(cache, pool, digests_of([9] * 8))
    second.publish()
    first.leave()
    second.leave()
    Holder(cache, pool, first.digests).leave()
    assert pool.allocate(2).tolist() == second.blocks[::-1].tolist()
    check(pool, cache)


def test_events_are_net_and_bounded():
    pool, cache, holder = filled(2, list(range(8)))
    whole = digests_of(list(range(8)))
    assert cache.take_events() == (b"".join(d[:8] for d in split_digests(whole)), b"")
    assert cache.take_events() == (b"", b"")
    assert cache.snapshot() == b"".join(d[:8] for d in split_digests(whole))
    holder.leave()
    pool.free(pool.allocate(2))
    assert len(cache) == 0
    again = Holder(cache, pool, whole[:32])
    again.publish()
    check(pool, cache, again)
    assert cache.take_events() == (b"", whole[32:40])
    again.leave()
    for _ in range(5000):
        churn = Holder(cache, pool, whole, at_most=0)
        churn.publish()
        churn.leave()
        pool.free(pool.allocate(2))
    check(pool, cache)
    stored, evicted = cache.take_events()
    assert len(stored) + len(evicted) <= 2 * 8 * 2


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["listen", "come", "go"]), st.lists(st.integers(0, 1), max_size=4), st.integers(0, 4)
        ),
        max_size=60,
    )
)
def test_a_listener_always_knows_what_the_cache_holds(operations):
    pool = BlockPool(12)
    cache = PrefixCache(pool)
    heard: set[bytes] = set()
    holders: list[Holder] = []
    known: dict[bytes, int] = {}
    for what, path, number in operations:
        digests = digests_of([token for step in path for token in [step] * 4])
        if what == "come" and len(path) <= pool.num_free - cache.match(digests).num_idle:
            expected = 0
            while expected < len(path) and split_digests(digests)[expected] in known:
                expected += 1
            assert cache.match(digests).num_blocks == expected
            holders.append(Holder(cache, pool, digests, at_most=number))
            hits = holders[-1].hits
            assert [known[digest] for digest in split_digests(digests)[:hits]] == holders[-1].blocks[:hits].tolist()
            holders[-1].publish()
        elif what == "go" and holders:
            holders.pop(number % len(holders)).leave()
        elif what == "listen":
            stored, evicted = ({part[i : i + 8] for i in range(0, len(part), 8)} for part in cache.take_events())
            assert not stored & heard
            assert evicted <= heard
            heard = (heard | stored) - evicted
            snapshot = cache.snapshot()
            assert heard == {snapshot[i : i + 8] for i in range(0, len(snapshot), 8)}
        check(pool, cache, *holders)
        known = {}
        for run in cache.runs():
            known |= dict(zip(split_digests(run.digests), run.blocks.tolist(), strict=True))
        assert len(known) == len(cache)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda cache, run: setattr(run, "blocks", run.blocks[:-1]),
        lambda cache, run: cache.root.children.clear(),
        lambda cache, run: setattr(run, "holders", 2),
        lambda cache, run: setattr(run, "digests", bytes(64)),
        lambda cache, run: setattr(run, "queued", True),
        lambda cache, run: setattr(cache, "_size", 1),
        lambda cache, run: cache._pool._state.__setitem__(5, 2),
        lambda cache, run: setattr(cache._pool, "num_idle", 1),
    ],
)
def test_check_integrity_finds_corruption(corrupt):
    pool, cache, holder = filled(8, list(range(8)))
    check(pool, cache, holder)
    corrupt(cache, holder.run)
    with pytest.raises(IntegrityError):
        cache.check_integrity({holder.run: 1})
