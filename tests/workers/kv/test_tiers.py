"""The tiers with their own threads, over a pool in host memory and over a device's pool through staging buffers."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.workers.device_transfer import CardStorage
from penstock.workers.kv import spill
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.disk_tier import DiskTier
from penstock.workers.kv.host_tier import HostTier
from penstock.workers.kv.storage import KVStorage
from penstock.workers.kv.tier_feed import TierChanges, TieredCache
from penstock.workers.kv.tiers import KVTiers

BLOCKS, SIZE = 64, 4096


def digests(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(32, "big") for number in numbers)


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.002)


class Rig:
    def __init__(self, host_blocks: int, disk: Path | None, on_device: bool) -> None:
        self.storage: KVStorage | DeviceKVStorage
        if on_device:
            self.storage = DeviceKVStorage.create(BLOCKS, SIZE, torch.device("cpu"))
            pool = CardStorage(self.storage).beside()
            self.data = self.storage.tensor.numpy()
        else:
            self.storage = pool = KVStorage.create(BLOCKS, SIZE)
            self.data = self.storage.data
        self.changes = TierChanges()
        below = None if disk is None else DiskTier(disk, "model", SIZE, 1 << 30, self.changes.note)
        self.woken = threading.Event()
        self.tiers = KVTiers(pool, HostTier(host_blocks * SIZE, SIZE), below, self.changes, self.woken.set)

    def fill(self, numbers: range) -> None:
        for number in numbers:
            self.data[number] = np.random.default_rng(number).integers(0, 256, SIZE, np.uint8)

    def bring(self, chain: bytes, count: int, into: int) -> int:
        fetch = self.tiers.fetch(chain, 0, count)
        assert fetch is not None
        until(lambda: fetch.done)
        landed = self.tiers.land(fetch, 0, np.arange(into, into + count))
        assert landed is not None
        return landed.result(10)


@pytest.fixture(params=["host", "device"])
def on_device(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "device")


@pytest.fixture
def make(on_device: bool) -> Iterator[Callable[..., Rig]]:
    before = threading.active_count()
    rigs: list[Rig] = []

    def build(host_blocks: int = 100, disk: Path | None = None) -> Rig:
        rigs.append(Rig(host_blocks, disk, on_device))
        return rigs[-1]

    yield build
    for rig in rigs:
        rig.tiers.stop()
        rig.storage.close()
    assert threading.active_count() == before, "no thread is left"


@pytest.mark.parametrize("host_blocks", [100, 7])
def test_blocks_come_back_as_they_were(make: Callable[..., Rig], tmp_path: Path, host_blocks: int) -> None:
    rig = make(host_blocks, tmp_path)
    rig.fill(range(24))
    before, chain = rig.data[:24].copy(), digests(*range(24))
    rig.tiers.offer(chain, np.arange(24))
    until(lambda: rig.tiers.totals().disk.held == 24)
    assert rig.tiers.find(chain + digests(77), 0) == 24
    assert rig.bring(chain, 24, into=32) == 24
    assert np.array_equal(rig.data[32:56], before)
    assert rig.woken.is_set()
    host, disk = rig.tiers.totals().host, rig.tiers.totals().disk
    assert host.hits + disk.hits == 24
    assert (disk.hits > 0) == (host_blocks == 7)
    assert host.stored == disk.stored == 24 * SIZE
    assert host.misses + disk.misses >= 1


def test_the_next_worker_finds_them(make: Callable[..., Rig], tmp_path: Path) -> None:
    first = make(disk=tmp_path)
    first.fill(range(8))
    before, chain = first.data[:8].copy(), digests(*range(8))
    first.tiers.offer(chain, np.arange(8))
    until(lambda: first.tiers.totals().disk.held == 8)
    first.tiers.stop()
    second = make(disk=tmp_path)
    until(lambda: second.tiers.find(chain, 0) == 8)
    assert second.bring(chain, 8, into=8) == 8
    assert np.array_equal(second.data[8:16], before)


def test_a_block_given_to_others_before_its_copy_is_dropped(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.fill(range(3))
    gate = threading.Event()
    rig.tiers._copies.submit(lambda: gate.wait(10))
    rig.tiers.offer(digests(0, 1, 2), np.arange(3))
    rig.storage.generations[1] += 1
    gate.set()
    until(lambda: rig.tiers.totals().host.held + rig.tiers.totals().host.dropped == 3)
    assert [rig.tiers.holds(digests(number)) for number in range(3)] == [True, False, True]
    assert rig.tiers.find(digests(0, 1, 2), 0) == 1


def test_a_full_queue_drops_and_never_waits(make: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "MAX_IDLE_BLOCKS", 4)
    rig = make()
    gate = threading.Event()
    rig.tiers._copies.submit(lambda: gate.wait(10))
    for number in range(10):
        rig.tiers.offer(digests(number), np.array([number]))
    assert rig.tiers.totals().host.dropped == 6
    gate.set()
    until(lambda: rig.tiers.totals().host.held == 4)


def test_a_disk_that_hangs_is_waited_for_once(make: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make(host_blocks=1, disk=tmp_path)
    chain = digests(*range(4))
    rig.tiers.offer(chain, np.arange(4))
    until(lambda: rig.tiers.totals().disk.held == 4)
    disk, gate = rig.tiers._disk, threading.Event()
    assert disk is not None
    plain = disk.read

    def hang(digest: bytes) -> bytes | None:
        gate.wait(10)
        return plain(digest)

    disk.read = hang  # type: ignore[method-assign]
    fetch = rig.tiers.fetch(chain, 0, 4)
    assert fetch is not None
    until(lambda: fetch.from_disk.running())
    assert rig.tiers.find(chain, 0) == 4
    rig.tiers.give_up(fetch, slow=True)
    assert rig.tiers.find(chain, 0) == 0
    gate.set()
    until(lambda: rig.tiers.find(chain, 0) == 4)
    assert rig.tiers.totals().slow == 1


def test_routers_hear_of_a_block_until_no_tier_holds_it(make: Callable[..., Rig]) -> None:
    class Cache:
        many_events = False
        events = (b"", b"")

        def take_events(self) -> tuple[bytes, bytes]:
            taken, self.events = self.events, (b"", b"")
            return taken

        def snapshot(self) -> bytes:
            raise AssertionError("the tiers know what was told")

    rig, cache = make(host_blocks=2), Cache()
    told = TieredCache(cache, rig.tiers.holds, rig.changes)
    heads = [digest.to_bytes(32, "little")[:8] for digest in range(3)]
    chain = b"".join(number.to_bytes(32, "little") for number in range(3))
    cache.events = (heads[0] + heads[1], b"")
    assert told.take_events() == (b"".join(sorted(heads[:2])), b"")
    rig.tiers.offer(chain[:64], np.arange(2))
    until(lambda: rig.tiers.totals().host.held == 2)
    cache.events = (b"", heads[0] + heads[1])
    assert told.take_events() == (b"", b""), "evicted from the pool, and still held"
    assert told.snapshot() == b"".join(sorted(heads[:2]))
    rig.tiers.offer(chain[64:], np.array([2]))
    until(lambda: rig.tiers.totals().host.evictions == 1)
    assert told.take_events() == (heads[2], heads[0])
    assert told.take_events() == (b"", b"")
