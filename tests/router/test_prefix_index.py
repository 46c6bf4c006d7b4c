"""The index against the caches themselves, under lost, repeated and late events; and what is merely assumed."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.router.prefix_index import PrefixIndex, short_digests
from penstock.router.settings import IndexSettings
from penstock.workers.protocol import KVEvents, KVSnapshot

WORKERS = ["a", "b", "c"]
CHAIN = np.arange(1, 13, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
INDICES = st.lists(st.integers(0, len(CHAIN) - 1), max_size=6, unique=True)


def pack(digests: list[int]) -> bytes:
    return np.array(digests, "<u8").tobytes()


class Worker:
    """A cache, its event log, and what of it has not reached the router."""

    def __init__(self) -> None:
        self.cache: set[int] = set()
        self.sequence = 0
        self.wire: list[KVEvents | KVSnapshot] = []
        self.events: list[KVEvents] = []

    def change(self, stored: list[int], evicted: list[int]) -> KVEvents:
        self.sequence += 1
        new = [d for d in stored if d not in self.cache]
        old = [d for d in evicted if d in self.cache and d not in stored]
        self.cache = (self.cache | set(new)) - set(old)
        event = KVEvents(self.sequence, pack(new), pack(old))
        self.events.append(event)
        return event


class IndexMachine(RuleBasedStateMachine):
    """Streams are ordered, but messages may be lost or repeated, and workers come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(IndexSettings(), seed=3)
        self.workers: dict[str, Worker] = {}

    def deliver(self, name: str) -> None:
        worker = self.workers[name]
        message = worker.wire.pop(0)
        if isinstance(message, KVSnapshot):
            self.index.apply_snapshot(name, message)
        elif self.index.apply_events(name, message):
            worker.wire.append(KVSnapshot(worker.sequence, pack(sorted(worker.cache))))

    @rule(name=st.sampled_from(WORKERS))
    def join(self, name: str) -> None:
        worker = self.workers[name] = Worker()
        self.index.track(name)
        worker.wire.append(KVSnapshot(0, b""))

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        del self.workers[name]
        self.index.forget(name)
        assert name not in self.index.match(CHAIN, 0.0)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), stored=INDICES, evicted=INDICES, lost=st.booleans(), repeat=st.booleans())
    def change(self, data: st.DataObject, stored: list[int], evicted: list[int], lost: bool, repeat: bool) -> None:
        worker = self.workers[data.draw(st.sampled_from(sorted(self.workers)))]
        event = worker.change([int(CHAIN[i]) for i in stored], [int(CHAIN[i]) for i in evicted])
        if not lost:
            worker.wire.append(event)
        if repeat:
            worker.wire.append(worker.events[len(worker.events) // 2])

    @precondition(lambda self: any(worker.wire for worker in self.workers.values()))
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        self.deliver(data.draw(st.sampled_from(sorted(n for n, w in self.workers.items() if w.wire))))

    @rule()
    def settle(self) -> None:
        """Once everything has arrived and one more event has shown any loss, the view is the truth."""
        for name, worker in self.workers.items():
            worker.wire.append(worker.change([], []))
            while worker.wire:
                self.deliver(name)
            assert self.index.confirmed(name) == worker.cache
            assert name not in self.index.degraded()
        held = self.index.match(CHAIN, 0.0)
        for name, worker in self.workers.items():
            length = 0
            while length < len(CHAIN) and int(CHAIN[length]) in worker.cache:
                length += 1
            assert held.get(name, 0) == length

    @invariant()
    def known_workers_only(self) -> None:
        assert set(self.index.match(CHAIN, 0.0)) <= set(self.workers)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


def snapshotted(*names: str, **limits: float) -> PrefixIndex:
    index = PrefixIndex(IndexSettings(**limits))  # type: ignore[arg-type]
    for name in names:
        index.track(name)
        index.apply_snapshot(name, KVSnapshot(0, b""))
    return index


def test_a_gap_is_noticed_once_and_the_index_goes_on_degraded() -> None:
    index = snapshotted("a")
    assert not index.apply_events("a", KVEvents(1, pack(CHAIN[:2].tolist()), b""))
    assert index.apply_events("a", KVEvents(3, pack(CHAIN[2:4].tolist()), b""))
    assert index.degraded() == ["a"]
    assert not index.apply_events("a", KVEvents(4, b"", b""))
    assert index.match(CHAIN, 0.0) == {"a": 4}
    index.apply_snapshot("a", KVSnapshot(4, pack(CHAIN[:3].tolist())))
    assert index.degraded() == []
    assert index.match(CHAIN, 0.0) == {"a": 3}


def test_events_before_the_first_snapshot_ask_for_nothing() -> None:
    index = PrefixIndex(IndexSettings())
    index.track("a")
    assert index.degraded() == ["a"]
    assert not index.apply_events("a", KVEvents(17, pack(CHAIN[:1].tolist()), b""))
    assert index.match(CHAIN, 0.0) == {"a": 1}


def test_a_missing_block_ends_the_match() -> None:
    index = snapshotted("a", "b")
    index.apply_events("a", KVEvents(1, pack(CHAIN.tolist()), b""))
    index.apply_events("b", KVEvents(1, pack(CHAIN[[0, 1, 3, 4]].tolist()), b""))
    index.apply_events("a", KVEvents(2, b"", pack([int(CHAIN[0])])))
    assert index.match(CHAIN, 0.0) == {"b": 2}
    assert index.match(CHAIN[:0], 0.0) == {}


def test_assumptions_fade_unless_confirmed() -> None:
    index = snapshotted("a", "b", assume_s=10.0)
    index.assume("a", CHAIN[:6], 100.0)
    assert index.match(CHAIN, 101.0) == {"a": 6}
    index.apply_events("a", KVEvents(1, pack(CHAIN[:4].tolist()), b""))
    assert index.match(CHAIN, 109.0) == {"a": 6}
    assert index.match(CHAIN, 111.0) == {"a": 6}
    assert index.match(CHAIN, 131.0) == {"a": 4}


def test_an_eviction_ends_an_assumption() -> None:
    index = snapshotted("a")
    index.assume("a", CHAIN[:6], 100.0)
    index.apply_events("a", KVEvents(1, b"", pack([int(CHAIN[2])])))
    assert index.match(CHAIN, 100.0) == {"a": 2}


def test_a_worker_that_comes_back_holds_nothing() -> None:
    index = snapshotted("a")
    index.apply_events("a", KVEvents(1, pack(CHAIN.tolist()), b""))
    index.assume("a", CHAIN, 0.0)
    index.track("a")
    assert index.match(CHAIN, 0.0) == {}


def test_more_workers_than_one_shard_holds() -> None:
    names = [f"w{number}" for number in range(150)]
    index = snapshotted(*names)
    for number, name in enumerate(names):
        index.apply_events(name, KVEvents(1, pack(CHAIN[: number % 12 + 1].tolist()), b""))
    assert index.match(CHAIN, 0.0) == {name: number % 12 + 1 for number, name in enumerate(names)}


def test_unknown_workers_change_nothing() -> None:
    index = snapshotted("a")
    assert not index.apply_events("x", KVEvents(1, pack(CHAIN.tolist()), b""))
    index.apply_snapshot("x", KVSnapshot(1, pack(CHAIN.tolist())))
    index.assume("x", CHAIN, 0.0)
    assert index.match(CHAIN, 0.0) == {}


def test_short_digests_are_the_first_8_bytes() -> None:
    raw = bytes(range(64)) + b"tail"
    assert short_digests(raw).tolist() == [
        int.from_bytes(bytes(range(8)), "little"),
        int.from_bytes(bytes(range(32, 40)), "little"),
    ]
