"""A device's pool behind the transfer sessions, here the CPU's: staged over TCP, and copied directly by who maps it."""

import dataclasses

import pytest
import torch
from fakes.transfer_pair import Worker, make_session

from penstock.workers.device_transfer import CardStorage
from penstock.workers.errors import WireError
from penstock.workers.kv.device_segment import PeerPool
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.storage import KVStorage
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.port import Arrived, DirectPeerPool, IncomingFailed, OutgoingDone, OutgoingFailed, Tail

CPU = torch.device("cpu")
NUM_BLOCKS, BLOCK_BYTES = 12, 4096
PATH = "/proc/1/fd/77"  # of the owner's pool, as the fake driver below names it


class MappedStorage(CardStorage):
    """Lends its pool to `peers`, as a card's driver would."""

    def __init__(self, storage, peers):
        super().__init__(storage)
        self.peers = peers
        self.copies = 0

    @property
    def segment(self):
        return PATH

    def attach(self, path):
        if path not in self.peers:
            raise WireError("no pool")
        owner = self.peers[path]
        peer = PeerPool(owner.tensor.flatten(), KVStorage.attach(owner.counters_path), self._storage)
        plain, copying = peer.copy, self.before_copy

        def copy(sources, targets):
            self.copies += 1
            copying(owner)
            plain(sources, targets)

        peer.copy = copy
        return peer

    def before_copy(self, owner):
        """What the owner does just before blocks are copied."""


def filled(seed):
    pool = DeviceKVStorage.create(NUM_BLOCKS, BLOCK_BYTES, CPU)
    pool.tensor.copy_(torch.randint(0, 256, pool.tensor.shape, generator=torch.Generator().manual_seed(seed)))
    pool.generations[:] = range(100, 100 + NUM_BLOCKS)
    return pool


@pytest.fixture
def pair():
    """(sender's pool, receiver's pool, run(transport, make) -> events of both)."""
    source, target = filled(1), filled(2)
    workers = []

    def run(transport, storages, blocks=(3, 0, 7), sources=(5, 2, 9), digest="full"):
        settings = TransferSettings(transport=transport, digest=digest)
        names = zip("pd", storages, strict=True)
        sender, receiver = (Worker(name, storage, settings) for name, storage in names)
        workers.extend([sender, receiver])
        granted, grant = make_session(target, blocks, receiver.engine.address)
        grant = dataclasses.replace(grant, worker_id="d")
        receiver.engine.expect(granted)
        sender.engine.start(grant)
        sender.engine.offer(grant.session_id, list(enumerate(sources)))
        sender.engine.finish(grant.session_id, Tail((4, 2)))
        return sender, receiver

    yield source, target, run
    for worker in workers:
        worker.engine.stop()
    source.close()
    target.close()


@pytest.mark.parametrize("digest", ["full", "off"])
def test_staged_over_tcp(pair, digest):
    source, target, run = pair
    before = target.tensor.clone()
    sender, receiver = run("tcp", [CardStorage(source), CardStorage(target)], digest=digest)
    (arrived,), (done,) = receiver.wait(1), sender.wait(1)
    assert isinstance(arrived, Arrived)
    assert arrived.tail.tokens == (4, 2)
    assert isinstance(done, OutgoingDone)
    before[[3, 0, 7]] = source.tensor[[5, 2, 9]]
    assert torch.equal(target.tensor, before)


def test_from_a_host_pool_to_a_device(pair):
    _, target, run = pair
    host = KVStorage.create(NUM_BLOCKS, BLOCK_BYTES)
    host.data[:] = 7
    sender, receiver = run("auto", [host, CardStorage(target)])
    assert isinstance(receiver.wait(1)[0], Arrived)
    assert (target.tensor[[3, 0, 7]] == 7).all()
    assert isinstance(sender.wait(1)[0], OutgoingDone)
    host.close()


def test_a_mapped_pool_is_copied_from_directly(pair):
    source, target, run = pair
    before = target.tensor.clone()
    storages = [MappedStorage(source, {}), MappedStorage(target, {PATH: source})]
    sender, receiver = run("shared_memory", storages)
    assert isinstance(receiver.wait(1)[0], Arrived)
    assert isinstance(sender.wait(1)[0], OutgoingDone)
    assert storages[1].copies >= 1
    before[[3, 0, 7]] = source.tensor[[5, 2, 9]]
    assert torch.equal(target.tensor, before)


def test_a_block_reused_while_it_is_copied_fails_the_session(pair):
    source, target, run = pair

    class Reusing(MappedStorage):
        def before_copy(self, owner):
            owner.generations[2] += 1

    storages = [MappedStorage(source, {}), Reusing(target, {PATH: source})]
    sender, receiver = run("shared_memory", storages)
    failed = receiver.wait(1)[0]
    assert isinstance(failed, IncomingFailed)
    assert "reused" in failed.reason
    assert isinstance(sender.wait(1)[0], OutgoingFailed)


def test_a_pool_that_cannot_be_mapped_goes_by_tcp(pair):
    source, target, run = pair
    storages = [MappedStorage(source, {}), MappedStorage(target, {})]
    _, receiver = run("auto", storages)
    assert isinstance(receiver.wait(1)[0], Arrived)
    assert storages[1].copies == 0
    assert torch.equal(target.tensor[3], source.tensor[5])


def test_what_the_transfer_asks_of_it(pair):
    source, target, _ = pair
    storage = CardStorage(source)
    assert (storage.num_blocks, storage.block_bytes, storage.segment) == (NUM_BLOCKS, BLOCK_BYTES, "")
    assert isinstance(PeerPool(source.tensor.flatten(), KVStorage.attach(source.counters_path), target), DirectPeerPool)
    assert not isinstance(KVStorage.attach(source.counters_path), DirectPeerPool)
    with pytest.raises(OSError, match="No such file"):
        storage.attach("/proc/self/fd/9999")


def test_two_sessions_at_once_share_the_buffers(pair):
    source, target, run = pair
    sender, receiver = run("tcp", [CardStorage(source), CardStorage(target)])
    granted, grant = make_session(target, (1, 2), receiver.engine.address)
    receiver.engine.expect(granted)
    sender.engine.start(grant)
    sender.engine.offer(grant.session_id, [(0, 0), (1, 1)])
    sender.engine.finish(grant.session_id, Tail((1,)))
    assert {type(event) for event in receiver.wait(2)} == {Arrived}
    assert torch.equal(target.tensor[[1, 2]], source.tensor[[0, 1]])
