import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.kv.host_tier import HostTier

SIZE = 64


def digest(number: int) -> bytes:
    return number.to_bytes(32, "little")


def block(number: int) -> memoryview:
    return memoryview(bytes([number % 256]) * SIZE)


def test_the_least_recently_used_block_gives_way() -> None:
    tier = HostTier(3 * SIZE + 5, SIZE)
    assert tier.capacity == 3
    assert [tier.store(digest(number), block(number)) for number in range(3)] == [None] * 3
    assert bytes(tier.read(digest(0))) == bytes(block(0))
    assert tier.store(digest(3), block(3)) == digest(1)
    assert [number for number in range(4) if digest(number) in tier] == [0, 2, 3]
    assert tier.read(digest(1)) is None
    assert len(tier) == 3


def test_storing_again_takes_no_second_place() -> None:
    tier = HostTier(2 * SIZE, SIZE)
    for number in (1, 2, 2, 1, 2):
        assert tier.store(digest(number), block(number)) is None
    tier.drop(digest(1))
    tier.drop(digest(1))
    assert tier.store(digest(3), block(3)) is None
    assert bytes(tier.read(digest(2))) == bytes(block(2))
    assert tier.store(digest(4), block(4)) == digest(3)


def test_damage_is_a_miss_and_the_block_is_dropped() -> None:
    tier = HostTier(2 * SIZE, SIZE)
    tier.store(digest(1), block(1))
    tier.store(digest(2), block(2))
    view = tier.read(digest(1))
    view[17] ^= 1
    assert tier.read(digest(1)) is None
    assert digest(1) not in tier
    assert bytes(tier.read(digest(2))) == bytes(block(2))


@pytest.mark.parametrize("size", [SIZE - 1, 1 << 60])
def test_a_size_that_cannot_be_names_its_key(size: int) -> None:
    with pytest.raises(ConfigError) as raised:
        HostTier(size, SIZE)
    assert raised.value.key == "kv.host_bytes"
