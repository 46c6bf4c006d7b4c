"""The hash table against a dictionary, and its bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.digest_table import DigestTable

DIGESTS = st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=60)


@given(st.lists(st.tuples(st.sampled_from(["set", "clear"]), st.integers(0, 3), DIGESTS), max_size=25))
@settings(deadline=None, max_examples=60)
def test_like_a_dictionary(operations: list[tuple[str, int, list[int]]]) -> None:
    table = DigestTable(2, 1 << 12, 12345)
    model: dict[int, int] = {}
    for what, bit, keys in operations:
        digests = np.array(keys, np.uint64)
        if what == "set":
            rows = table.insert(digests)
            assert (rows >= 0).all()
            table.bits[0, rows] |= np.uint64(1 << bit)
            for key in keys:
                model[max(key, 1)] = model.get(max(key, 1), 0) | 1 << bit
        else:
            rows = table.find(digests)
            table.bits[0, rows[rows >= 0]] &= ~np.uint64(1 << bit)
            for key in keys:
                if max(key, 1) in model:
                    model[max(key, 1)] &= ~(1 << bit)
        wanted = np.array(sorted(model), np.uint64)
        rows = table.find(wanted)
        held = {int(k): int(table.bits[0, r]) for k, r in zip(wanted, rows, strict=True) if r >= 0}
        assert {k: v for k, v in held.items() if v} == {k: v for k, v in model.items() if v}
        assert table.holding(0, 2) == {k for k, v in model.items() if v & 2}
        assert len(table) <= 0.6 * len(table._keys)


def set_bit(table: DigestTable, digests: np.ndarray) -> None:
    rows = table.insert(digests)  # first: it may replace the arrays
    table.bits[0, rows[rows >= 0]] |= np.uint64(1)


def test_it_grows_and_forgets_rows_without_bits() -> None:
    table = DigestTable(1, 1 << 20, 7)
    rng = np.random.default_rng(0)
    for _ in range(50):
        digests = rng.integers(1, 2**63, 1000, dtype=np.uint64)
        set_bit(table, digests)
        table.clear_bits(0, 1)
    assert table.nbytes < 200_000
    digests = rng.integers(1, 2**63, 100_000, dtype=np.uint64)
    set_bit(table, digests)
    assert (table.find(digests) >= 0).all()
    assert (table.find(digests + np.uint64(1)) < 0).all()


def test_its_bound_bites_and_is_counted() -> None:
    """A table for 1,000 entries under 100,000 distinct digests stays small, keeps what it has and counts the rest."""
    table = DigestTable(1, 1000, 7)
    rng = np.random.default_rng(1)
    first = rng.integers(1, 2**63, 500, dtype=np.uint64)
    set_bit(table, first)
    for _ in range(100):
        set_bit(table, rng.integers(1, 2**63, 1000, dtype=np.uint64))
    assert table.nbytes <= 2 * 8 * 4096
    assert table.dropped > 90_000
    assert (table.find(first) >= 0).all()


def test_crafted_digests_do_not_pile_up() -> None:
    table = DigestTable(1, 1 << 20, 0x1234567890ABCDEF)
    digests = np.arange(1, 20_001, dtype=np.uint64) << np.uint64(32)  # equal low halves
    rows = table.insert(digests)
    home = table._home(digests)
    distance = (rows - home) % len(table._keys)
    assert distance.mean() < 3
