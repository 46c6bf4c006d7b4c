"""A pool in a device's memory, here the CPU's: blocks out and in, the block behind the pool, generations for others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.workers.errors import ConfigError
from penstock.workers.kv.device_storage import DeviceKVStorage
from penstock.workers.kv.storage import KVStorage

CPU = torch.device("cpu")


def make(num_blocks=6, block_bytes=24):
    storage = DeviceKVStorage.create(num_blocks, block_bytes, CPU)
    values = torch.arange((num_blocks + 1) * block_bytes) % 251
    storage.tensor.copy_(values.view(num_blocks + 1, block_bytes).to(torch.uint8))
    return storage


def test_sizes_and_the_block_behind():
    storage = make()
    assert (storage.num_blocks, storage.block_bytes, storage.scratch_block) == (6, 24, 6)
    assert storage.tensor.shape == (7, 24)
    assert storage.generations.shape == (6,)
    storage.close()
    storage.close()


@pytest.mark.parametrize(("blocks", "size"), [(0, 8), (4, 0)])
def test_an_empty_pool_is_a_mistake(blocks, size):
    with pytest.raises(ConfigError) as caught:
        DeviceKVStorage.create(blocks, size, CPU)
    assert caught.value.key == "kv.num_blocks"


@pytest.mark.parametrize("block_bytes", [24, 7])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_blocks_go_out_and_come_in(block_bytes, data):
    source, target = make(block_bytes=block_bytes), make(block_bytes=block_bytes)
    blocks = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    buffer = memoryview(bytearray(block_bytes * 8))
    source.gather(blocks, buffer)()
    for place, block in enumerate(blocks):
        assert bytes(buffer[place * block_bytes : (place + 1) * block_bytes]) == source.tensor[block].numpy().tobytes()
    count = data.draw(st.integers(1, min(6, len(blocks))))
    places = data.draw(st.lists(st.integers(0, len(blocks) - 1), min_size=count, max_size=count, unique=True))
    into = data.draw(st.permutations(range(6)))[:count]
    before = target.tensor.clone()
    target.scatter(buffer, places, into)
    expected = before.clone()
    for place, block in zip(places, into, strict=True):
        expected[block] = source.tensor[blocks[place]]
    assert torch.equal(target.tensor, expected)
    source.close()
    target.close()


def test_copies_between_pools():
    source, target = make(), DeviceKVStorage.create(6, 24, CPU)
    target.copy_from(source.tensor, [4, 1], [0, 5])
    assert torch.equal(target.tensor[0], source.tensor[4])
    assert torch.equal(target.tensor[5], source.tensor[1])
    assert not target.tensor[1:5].any()


def test_other_processes_see_the_generations():
    storage = make()
    seen = KVStorage.attach(storage.counters_path)
    storage.generations[3] = 17
    assert seen.generations.tolist() == [0, 0, 0, 17, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        seen.generations[0] = np.uint64(1)
    seen.close()
