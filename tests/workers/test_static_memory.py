"""Static buffers: the log, its id, and an order that is kept."""

import pytest
import torch

from penstock.workers.static_memory import Allocation, LayoutError, StaticMemory, first_difference, layout_id

CPU = torch.device("cpu")
TAGS = ["tokens", "positions", "hidden"]


def allocate(tags, expected=None, seed=0):
    torch.manual_seed(seed)
    memory = StaticMemory(CPU, expected)
    for number, tag in enumerate(tags):
        tensor = memory.on_device(tag, (number + 1, 4), torch.float32)
        tensor.normal_()  # what the buffers hold is no part of the layout
    memory.finish()
    return memory


def test_ten_starts_have_one_layout():
    logs = [allocate(TAGS, seed=seed).log for seed in range(10)]
    assert len(set(logs)) == 1
    assert logs[0] == (Allocation("tokens", 16), Allocation("positions", 32), Allocation("hidden", 48))
    assert len({layout_id(log) for log in logs}) == 1


@pytest.mark.parametrize(
    "other",
    [["positions", "tokens", "hidden"], ["tokens", "hidden", "positions"], TAGS[:2], [*TAGS, "more"], ["tokens"] * 3],
)
def test_another_order_has_another_id(other):
    assert allocate(other).layout_id != allocate(TAGS).layout_id


@pytest.mark.parametrize(
    ("other", "tag"),
    [
        (["positions", "tokens", "hidden"], "positions"),
        (["tokens", "hidden", "positions"], "hidden"),
        ([*TAGS, "more"], "more"),
        (TAGS[:2], "hidden"),
        ([], "tokens"),
    ],
)
def test_a_changed_order_names_the_first_tag_that_differs(other, tag):
    expected = allocate(TAGS).log
    with pytest.raises(LayoutError) as caught:
        allocate(other, expected)
    assert caught.value.tag == tag
    assert tag in str(caught.value)
    assert first_difference(expected, allocate(other).log) == tag


def test_a_changed_size_is_a_change():
    expected = allocate(TAGS).log
    memory = StaticMemory(CPU, expected)
    with pytest.raises(LayoutError, match="'tokens' of 20 bytes, and was 'tokens' of 16 bytes"):
        memory.on_host("tokens", (5,), torch.int32)
    assert memory.log == ()


def test_the_same_order_passes_and_buffers_are_zeroed():
    expected = allocate(TAGS).log
    assert allocate(TAGS, expected).log == expected
    assert first_difference(expected, expected) is None
    assert not StaticMemory(CPU).on_host("a", (3,), torch.uint8).any()


def test_tags_cannot_be_mistaken_for_sizes():
    assert layout_id([Allocation("a", 1), Allocation("b", 2)]) != layout_id([Allocation("a=1;1:b", 2)])
