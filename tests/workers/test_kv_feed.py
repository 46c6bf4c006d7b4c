"""Cache events leave in sequence, gathered while the loop is busy, at once when it idles; a snapshot includes them."""

import pytest

from penstock.workers.kv.block_pool import BlockPool
from penstock.workers.kv.prefix_cache import PrefixCache
from penstock.workers.kv_feed import KVEventFeed
from penstock.workers.protocol import KVEvents, KVSnapshot, ToRouter


class Told:
    def __init__(self) -> None:
        self.messages: list[tuple[str, ToRouter]] = []

    def send(self, router_id: str, message: ToRouter) -> None:
        self.messages.append((router_id, message))

    def broadcast(self, message: ToRouter) -> None:
        self.messages.append(("*", message))

    def cut(self, router_id: str) -> None:
        raise AssertionError(router_id)


@pytest.fixture
def told() -> Told:
    return Told()


def publish(cache: PrefixCache, pool: BlockPool, letter: bytes) -> bytes:
    digest = letter * 32
    cache.publish(cache.root, digest, pool.allocate(1))
    return digest[:8]


def test_events_gather_while_busy_and_leave_when_idle(told: Told) -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool)
    feed = KVEventFeed(cache, told)
    a = publish(cache, pool, b"a")
    feed.flush(10.0, idle=False)
    b = publish(cache, pool, b"b")
    feed.flush(10.001, idle=False)
    assert told.messages == [("*", KVEvents(1, a, b""))]
    feed.flush(10.002, idle=True)
    feed.flush(10.003, idle=True)
    assert told.messages[1:] == [("*", KVEvents(2, b, b""))]
    c = publish(cache, pool, b"c")
    feed.flush(10.1, idle=False)
    assert told.messages[2:] == [("*", KVEvents(3, c, b""))]


def test_a_snapshot_comes_after_the_events_it_contains(told: Told) -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool)
    feed = KVEventFeed(cache, told)
    a, b = publish(cache, pool, b"a"), publish(cache, pool, b"b")
    feed.snapshot("r")
    assert told.messages == [("*", KVEvents(1, a + b, b"")), ("r", KVSnapshot(1, a + b))]


def test_without_a_cache_there_is_nothing_to_know(told: Told) -> None:
    feed = KVEventFeed(None, told)
    feed.flush(1.0, idle=True)
    feed.snapshot("r")
    assert told.messages == [("r", KVSnapshot(0, b""))]
