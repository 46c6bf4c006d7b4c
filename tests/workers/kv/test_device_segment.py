"""The file that names a device's pool: round trip, damage, and the checked copy out of a pool that is mapped."""

import os
import struct

import numpy as np
import pytest
import torch

from penstock.workers.errors import WireError
from penstock.workers.kv.device_segment import (
    MemoryHandle,
    PeerPool,
    PoolDescription,
    publish,
    read_description,
)
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.storage import KVStorage

CPU = torch.device("cpu")
MEMORY = MemoryHandle(b"h" * 66, 4096, 512, b"/torch_1_2_3", 8, b"e" * 64, True)
DESCRIPTION = PoolDescription(6, 64, b"GPU-1234", "/proc/1/fd/3", MEMORY)


def path_of(descriptor):
    return f"/proc/self/fd/{descriptor}"


def write(raw):
    descriptor = os.memfd_create("test")
    os.write(descriptor, raw)
    return path_of(descriptor)


def raw_file():
    descriptor = publish(DESCRIPTION)
    return os.pread(descriptor, 10_000, 0)


def test_round_trip():
    descriptor = publish(DESCRIPTION)
    assert read_description(path_of(descriptor)) == DESCRIPTION
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(descriptor, 1)
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)


def test_a_host_pool_is_none():
    storage = KVStorage.create(4, 64)
    assert read_description(storage.path) is None
    storage.close()


@pytest.mark.parametrize(
    "raw",
    [
        raw_file()[:40],
        raw_file()[:-1],
        raw_file() + b"x",
        raw_file() + b"x" * 100_000,
        raw_file()[:8] + struct.pack("<Q", 0) + raw_file()[16:],
        raw_file()[:16] + struct.pack("<Q", 0) + raw_file()[24:],
        raw_file()[:24] + struct.pack("<H", 60_000) + raw_file()[26:],
        raw_file().replace(b"/proc/1/fd/3", b"/proc/1/fd/\xff"),
    ],
)
def test_damage_is_told(raw):
    with pytest.raises(WireError):
        read_description(write(raw))


def test_no_file():
    with pytest.raises(OSError, match="No such file"):
        read_description("/proc/self/fd/9999")


def test_blocks_are_copied_out_of_a_mapped_pool():
    owner, mine = (DeviceKVStorage.create(6, 64, CPU) for _ in range(2))
    owner.tensor.copy_(torch.arange(7)[:, None].expand(7, 64) + 1)
    owner.generations[:] = np.arange(6) * 10
    peer = PeerPool(owner.tensor.flatten(), KVStorage.attach(owner.counters_path), mine)
    assert (peer.num_blocks, peer.block_bytes) == (6, 64)
    peer.copy([2, 5], [0, 1])
    assert mine.tensor[:3, 0].tolist() == [3, 6, 0]
    owner.generations[5] = 51
    assert peer.generations.tolist() == [0, 10, 20, 30, 40, 51]
    peer.close()
    peer.close()
    owner.close()
