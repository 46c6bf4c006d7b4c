"""Between any two widths that go together, every head reaches every rank that holds it, once, from one that has it."""

from __future__ import annotations

import itertools

import pytest

from penstock.workers.transfer.head_slices import ALONE, HeadRange, HeadShare, reason_against

WIDTHS = (1, 2, 3, 4, 6, 8, 16)


def fits(total: int, width: int) -> bool:
    return total % width == 0 or width % total == 0


CASES = [
    (total, source, target)
    for total, source, target in itertools.product((1, 2, 3, 4, 6, 8, 12), WIDTHS, WIDTHS)
    if fits(total, source) and fits(total, target) and reason_against(source, target) is None
]


@pytest.mark.parametrize(("total", "source", "target"), CASES)
def test_every_head_arrives_once(total, source, target):
    for rank in range(target):
        own = HeadShare(total, target, rank)
        found = own.sources(source)
        heads = [head for _, part in found for head in range(part.first, part.end)]
        assert heads == list(range(own.heads.first, own.heads.end))
        for sender, part in found:
            assert HeadShare(total, source, sender).heads.holds(part)
            assert (rank, part) in HeadShare(total, source, sender).deliveries(target)
    sent = [part for rank in range(source) for part in HeadShare(total, source, rank).deliveries(target)]
    assert len(sent) == sum(len(HeadShare(total, target, rank).sources(source)) for rank in range(target))


def test_copies_share_the_work():
    """Four ranks hold the one head; of eight receivers each of them serves two."""
    assert [len(HeadShare(1, 4, rank).deliveries(8)) for rank in range(4)] == [2, 2, 2, 2]
    assert [len(HeadShare(1, 4, rank).deliveries(1)) for rank in range(4)] == [1, 0, 0, 0]


def test_a_connection_between_two_ranks_carries_one_range():
    for total, source, target in CASES:
        for rank in range(source):
            receivers = [receiver for receiver, _ in HeadShare(total, source, rank).deliveries(target)]
            assert len(receivers) == len(set(receivers))


def test_widths_that_do_not_go_together():
    assert reason_against(2, 8) is None
    assert reason_against(8, 2) is None
    assert "2 and 3: neither divides the other" in str(reason_against(2, 3))


def test_ranges():
    assert HeadRange(2, 4).holds(HeadRange(3, 2))
    assert not HeadRange(2, 4).holds(HeadRange(5, 2))
    assert not HeadRange(2, 4).holds(HeadRange(3, 0))
    assert HeadRange(2, 2).meets(HeadRange(3, 4))
    assert not HeadRange(2, 2).meets(HeadRange(4, 1))
    assert ALONE.heads == HeadRange(0, 1)
