"""A full digest notices every byte; a sampled one every block that is another, its end, and the share it looks at."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from penstock.workers.settings import TransferSettings
from penstock.workers.transfer import digests
from penstock.workers.transfer.digests import STRIPE_BYTES, block_digest, stride_of

SESSION = b"s" * 16


def view(data: np.ndarray) -> memoryview:
    return memoryview(data)


@pytest.mark.parametrize(
    ("digest", "share", "sent", "copied"),
    [("off", 1.0, 0, 0), ("full", 0.1, 1, 1), ("sampled", 0.25, 4, 4), ("sampled", 1.0, 1, 1), ("auto", 0.125, 1, 8)],
)
def test_what_the_settings_ask_for(monkeypatch, digest, share, sent, copied):
    monkeypatch.setattr(digests, "STORES_IN_ORDER", True)
    asked = TransferSettings(digest=digest, digest_sample=share)
    assert (stride_of(asked, inline=True), stride_of(asked, inline=False)) == (sent, copied)


def test_where_stores_may_swap_auto_reads_every_byte(monkeypatch):
    monkeypatch.setattr(digests, "STORES_IN_ORDER", False)
    assert stride_of(TransferSettings(digest="auto", digest_sample=0.125), inline=False) == 1


@given(size=st.integers(1, 5 * STRIPE_BYTES), stride=st.integers(1, 9), data=st.data())
@settings(deadline=None, max_examples=150)
def test_the_end_counts_always_and_small_blocks_wholly(size, stride, data):
    block = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    fragment = data.draw(st.integers(0, 1000))
    whole = stride == 1 or size < 2 * STRIPE_BYTES
    place = data.draw(st.integers(0 if whole else size - STRIPE_BYTES, size - 1))
    before = block_digest(view(block), stride, SESSION, fragment)
    block[place] ^= 1 << data.draw(st.integers(0, 7))
    assert block_digest(view(block), stride, SESSION, fragment) != before


def test_full_is_the_plain_digest():
    block = np.arange(9000, dtype=np.uint16).view(np.uint8)
    assert block_digest(view(block), 1, SESSION, 4) == xxh3_64_intdigest(block)


def test_other_content_is_another_digest_under_every_phase():
    rng = np.random.default_rng(1)
    one, two = (rng.integers(0, 256, 64 * STRIPE_BYTES, np.uint8) for _ in range(2))
    for fragment in range(100):
        assert block_digest(view(one), 32, SESSION, fragment) != block_digest(view(two), 32, SESSION, fragment)


def test_no_part_is_left_out_for_ever():
    """A byte that one session does not look at, another does: about one in `stride` of them."""
    block = np.zeros(64 * STRIPE_BYTES, np.uint8)
    damaged = block.copy()
    damaged[7 * STRIPE_BYTES + 11] = 1
    found = sum(
        block_digest(view(block), 8, bytes([n]) * 16, n) != block_digest(view(damaged), 8, bytes([n]) * 16, n)
        for n in range(200)
    )
    assert 8 <= found <= 60
