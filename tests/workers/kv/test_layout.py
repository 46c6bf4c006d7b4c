"""Sizes of a block, and which workers may exchange blocks."""

from dataclasses import replace

from penstock.workers.kv.layout import KVLayout

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype="bfloat16", revision="a")


def test_sizes():
    assert LAYOUT.token_bytes == 3 * 2 * 2 * 8 * 2
    assert LAYOUT.block_bytes == LAYOUT.token_bytes * 16
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_any_difference_makes_blocks_incompatible():
    changes = ({"num_layers": 4}, {"num_kv_heads": 1}, {"head_dim": 4}, {"block_size": 8}, {"dtype": "float16"})
    others = [replace(LAYOUT, **change).compatibility for change in (*changes, {"revision": "b"})]
    assert LAYOUT.compatibility == replace(LAYOUT).compatibility
    assert len({LAYOUT.compatibility, *others}) == 7
