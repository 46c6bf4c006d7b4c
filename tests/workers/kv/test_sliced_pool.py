"""Slices of blocks hold the wanted heads of every piece, in host memory and on a device, and write nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from penstock.workers.errors import IntegrityError, WireError
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.sliced_pool import HeadSlice
from penstock.workers.kv.storage import KVStorage

PIECES, HEADS, HEAD_BYTES, BLOCKS = 6, 4, 24, 5
PART = HeadSlice(PIECES, HEADS, 1, 2)
SIZE = PIECES * HEADS * HEAD_BYTES


@pytest.fixture(params=["host", "device"])
def storage(request):
    rows = np.random.default_rng(3).integers(0, 256, (BLOCKS, SIZE), np.uint8)
    if request.param == "host":
        made = KVStorage.create(BLOCKS, SIZE)
        made.data[:] = rows
    else:
        made = DeviceKVStorage.create(BLOCKS, SIZE, torch.device("cpu"))
        made.tensor[:BLOCKS] = torch.from_numpy(rows)
    made.generations[2] = 7
    yield made
    made.close()


def content(storage) -> np.ndarray:
    data = storage.data if isinstance(storage, KVStorage) else storage.tensor[:BLOCKS].numpy()
    return data.reshape(BLOCKS, PIECES, HEADS, HEAD_BYTES).copy()


def test_gather_packs_the_heads(storage):
    pool, before = storage.slice_pool(PART), content(storage)
    assert (pool.num_blocks, pool.block_bytes, pool.generations[2]) == (BLOCKS, SIZE // 2, 7)
    buffer = bytearray(3 * pool.block_bytes)
    pool.gather([3, 0], memoryview(buffer))()
    packed = np.frombuffer(buffer, np.uint8).reshape(3, PIECES, 2, HEAD_BYTES)
    np.testing.assert_array_equal(packed[:2], before[[3, 0], :, 1:3])
    assert not packed[2].any()


def test_scatter_writes_those_heads_only(storage):
    pool, before = storage.slice_pool(PART), content(storage)
    packed = np.random.default_rng(5).integers(0, 256, (3, PIECES, 2, HEAD_BYTES), np.uint8)
    pool.scatter(memoryview(packed).cast("B"), [2, 0], [4, 1])
    before[[4, 1], :, 1:3] = packed[[2, 0]]
    np.testing.assert_array_equal(content(storage), before)


def test_a_peer_reads_copies():
    storage = KVStorage.create(BLOCKS, SIZE)
    found = storage.slice_pool(PART).read([1, 2])
    storage.data[:] = 1
    assert [len(block) for block in found.blocks] == [SIZE // 2] * 2
    assert not any(map(any, found.runs))
    with pytest.raises(IntegrityError):
        found.commit([0])
    storage.close()


def test_a_block_that_has_no_such_heads(storage):
    with pytest.raises(WireError, match="no 5 runs of 4 heads"):
        storage.slice_pool(HeadSlice(5, 4, 0, 1))
