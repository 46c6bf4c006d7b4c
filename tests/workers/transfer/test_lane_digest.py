"""Every changed number, shifted or foreign block has another digest."""

from __future__ import annotations

import pytest
import torch

from penstock.workers.transfer.lane_digest import WeightedDigest
from penstock.workers.transfer.messages import OFFER_DTYPE

SESSION, OTHER = b"s" * 16, b"t" * 16
CPU = torch.device("cpu")


def frame_of(block_bytes: int, count: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(block_bytes)
    return torch.randint(0, 256, (count, block_bytes), generator=draw, dtype=torch.uint8)


@pytest.mark.parametrize("block_bytes", [1, 7, 8, 640, 4099])
def test_both_ends_agree_and_every_byte_counts(block_bytes: int) -> None:
    frame = frame_of(block_bytes)
    stated = WeightedDigest(block_bytes, CPU).of(frame, SESSION, [0, 1, 2])
    ours = WeightedDigest(block_bytes, CPU)
    assert ours.of(frame.clone(), SESSION, [0, 1, 2]) == stated
    assert all(0 <= digest <= torch.iinfo(torch.uint64).max for digest in stated)
    assert OFFER_DTYPE["digest"].itemsize == 8
    for place in {0, block_bytes // 2, block_bytes - 1}:
        for bit in (1, 128):
            damaged = frame.clone()
            damaged[1, place] ^= bit
            found = ours.of(damaged, SESSION, [0, 1, 2])
            assert [one == other for one, other in zip(found, stated, strict=True)] == [True, False, True]


def test_a_block_that_belongs_elsewhere_is_another() -> None:
    frame, digest = frame_of(64), WeightedDigest(64, CPU)
    (right,) = digest.of(frame[:1], SESSION, [0])
    assert right not in digest.of(frame[:1], SESSION, [1]) + digest.of(frame[:1], OTHER, [0])
    assert right not in digest.of(frame[1:2], SESSION, [0]) + digest.of(frame[:1].roll(8, 1), SESSION, [0])
    assert right not in digest.of(torch.zeros(1, 64, dtype=torch.uint8), SESSION, [0])
