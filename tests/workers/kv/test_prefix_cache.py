"""Digest chains, matching, publishing, eviction and the events that routers live on."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import IntegrityError
from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.prefix_cache import PrefixCache, chain_digests, split_digests

ROOT = b"r" * 32


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


def filled(num_blocks: int, tokens: list[int]) -> tuple[BlockPool, PrefixCache, list[int], list[bytes]]:
    pool = BlockPool(num_blocks)
    cache = PrefixCache(pool)
    chain = split_digests(chain_digests(ROOT, tokens, 4))
    blocks = pool.allocate(len(chain))
    cache.publish(chain, blocks)
    return pool, cache, blocks, chain


def test_match_walks_to_the_first_miss():
    _, cache, blocks, chain = filled(8, list(range(16)))
    other = split_digests(chain_digests(ROOT, [0, 1, 2, 3, 9, 9, 9, 9], 4))
    assert cache.match(chain) == blocks
    assert cache.match(other) == blocks[:1]
    assert cache.match(chain[1:2]) == blocks[1:2]
    assert cache.match(split_digests(chain_digests(b"salt" * 8, list(range(16)), 4))) == []
    cache.check_integrity()


def test_first_of_equal_blocks_stays():
    pool, cache, blocks, chain = filled(8, list(range(8)))
    twin = pool.allocate(2)
    cache.publish(chain, twin)
    assert cache.match(chain) == blocks
    pool.release(twin)
    assert pool.num_cached_free == 0
    cache.check_integrity()


def test_a_block_with_another_digest_cannot_be_published():
    _, cache, blocks, _ = filled(8, list(range(8)))
    with pytest.raises(IntegrityError, match="another digest"):
        cache.publish([b"x" * 32], [blocks[0]])


def test_events_are_net_and_bounded():
    pool, cache, blocks, chain = filled(2, list(range(8)))
    assert cache.take_events() == (b"".join(d[:8] for d in chain), b"")
    assert cache.take_events() == (b"", b"")
    assert cache.snapshot() == b"".join(d[:8] for d in chain)
    pool.release(blocks)
    again = pool.allocate(2)
    assert len(cache) == 0
    cache.publish(chain[:1], again[:1])
    cache.check_integrity()
    assert cache.take_events() == (b"", chain[1][:8])
    pool.release(again)
    for _ in range(100):
        churn = pool.allocate(2)
        cache.publish(chain, churn)
        pool.release(churn)
    cache.check_integrity()
    stored, evicted = cache.take_events()
    assert len(stored) + len(evicted) <= 2 * 8 * 2


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 4)), max_size=60))
def test_a_listener_always_knows_what_the_cache_holds(operations):
    pool = BlockPool(8)
    cache = PrefixCache(pool)
    heard: set[bytes] = set()
    for listen, family, length in operations:
        chain = split_digests(chain_digests(bytes([family]) * 32, list(range(4 * length)), 4))
        hits = cache.match(chain)
        pool.share(hits)
        fresh = pool.allocate(length - len(hits))
        blocks = hits + fresh
        cache.publish(chain, blocks)
        pool.release(blocks)
        pool.check_integrity()
        cache.check_integrity()
        if listen:
            stored, evicted = ({events[i : i + 8] for i in range(0, len(events), 8)} for events in cache.take_events())
            assert not stored & heard
            assert evicted <= heard
            heard = (heard | stored) - evicted
            snapshot = cache.snapshot()
            assert heard == {snapshot[i : i + 8] for i in range(0, len(snapshot), 8)}


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda cache: cache._digests.__setitem__(0, None),
        lambda cache: cache._blocks.popitem(),
        lambda cache: cache._pool._cached.__setitem__(7, True),
        lambda cache: cache._evicted.__setitem__(next(iter(cache._blocks)), None),
        lambda cache: cache._stored.__setitem__(b"x" * 32, None),
    ],
)
def test_check_integrity_finds_corruption(corrupt):
    _, cache, _, _ = filled(8, list(range(8)))
    cache.check_integrity()
    corrupt(cache)
    with pytest.raises(IntegrityError):
        cache.check_integrity()
