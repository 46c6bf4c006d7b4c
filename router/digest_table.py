"""A compact hash table from 64-bit digests to bit sets of workers, worked on in whole batches.

Used by `prefix_index.py` only. Open addressing with linear probing over numpy arrays; a batch of digests is found or
inserted in a few vector operations. A key is never removed singly: rows without bits are dropped when the table is
rebuilt, which happens when it fills up. Knows nothing of blocks, sequences or time.

Invariants: at most 60 % of the rows are used; `max_entries` bounds the live rows, and what does not fit is counted.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
Rows = NDArray[np.int64]

_FILL = 0.6
_EMPTY = np.uint64(0)
_ONE = np.uint64(1)
_FIRST_CAPACITY = 1 << 10


class DigestTable:
    """Keys with several uint64 bit columns each; a batch operation answers with row numbers (-1 = absent)."""

    def __init__(self, columns: int, max_entries: int, multiplier: int) -> None:
        self._multiplier = np.uint64(multiplier | 1)  # secret per process: crafted digests cannot pile up in one place
        self._max_entries = max_entries
        self._keys: U64 = np.zeros(_FIRST_CAPACITY, np.uint64)
        self.bits: U64 = np.zeros((columns, _FIRST_CAPACITY), np.uint64)
        self._used = 0
        self._patience = 0  # digests to turn away before a full table is swept again
        self.dropped = 0  # digests that found no room

    def __len__(self) -> int:
        """Rows in use, those without bits included."""
        return self._used

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self._keys.nbytes + self.bits.nbytes

    def find(self, digests: U64) -> Rows:
        """Row of each digest, -1 where absent. Shape [N] -> [N]."""
        keys = _non_zero(digests)
        rows = np.full(len(keys), -1, np.int64)
        pending = np.arange(len(keys))
        places = self._home(keys)
        last = len(self._keys) - 1
        while len(pending):
            seen = self._keys[places]
            hit = seen == keys[pending]
            rows[pending[hit]] = places[hit]
            going = ~hit & (seen != _EMPTY)
            pending = pending[going]
            places = (places[going] + 1) & last
        return rows

    def insert(self, digests: U64) -> Rows:
        """Row of each digest, made where absent; -1 where the table is full. Earlier row numbers lose their meaning."""
        if self._used + len(digests) > _FILL * len(self._keys):
            if self._patience <= 0:
                self._rebuild(len(digests))
            self._patience -= len(digests)
        room = int(_FILL * len(self._keys)) - self._used
        if len(digests) <= room:
            return self._place(_non_zero(digests))
        rows = self.find(digests)
        absent = np.flatnonzero(rows < 0)
        rows[absent[:room]] = self._place(_non_zero(digests[absent[:room]]))
        self.dropped += max(0, len(absent) - room)
        return rows

    def clear_bits(self, column: int, mask: int) -> None:
        """Take bits away everywhere in one column."""
        self.bits[column] &= ~np.uint64(mask)

    def holding(self, column: int, mask: int) -> set[int]:
        """All keys with one of these bits in a column; a scan."""
        return set(self._keys[(self.bits[column] & np.uint64(mask)) != 0].tolist())

    def _place(self, keys: U64) -> Rows:
        rows = np.empty(len(keys), np.int64)
        pending = np.arange(len(keys))
        places = self._home(keys)
        last = len(self._keys) - 1
        while len(pending):
            wanted = keys[pending]
            empty = self._keys[places] == _EMPTY
            self._keys[places[empty]] = wanted[empty]  # of several that claim one place, the last wins; look again
            won = self._keys[places] == wanted
            if empty.any():
                self._used += len(np.unique(places[empty]))
            rows[pending[won]] = places[won]
            pending = pending[~won]
            places = (places[~won] + 1) & last
        return rows

    def _home(self, keys: U64) -> Rows:
        shift = np.uint64(64 - (len(self._keys).bit_length() - 1))
        return ((keys * self._multiplier) >> shift).astype(np.int64)

    def _rebuild(self, coming: int) -> None:
        """Drop rows without bits, and double until the rest and the newcomers fill half of the allowed share."""
        live = np.flatnonzero(np.bitwise_or.reduce(self.bits, axis=0))
        keys, bits = self._keys[live], self.bits[:, live]
        capacity = _FIRST_CAPACITY
        largest = 1 << max(10, int(self._max_entries / _FILL).bit_length())
        while capacity < largest and (len(live) + coming) > _FILL * capacity / 2:
            capacity *= 2
        self._keys = np.zeros(capacity, np.uint64)
        self.bits = np.zeros((len(bits), capacity), np.uint64)
        self._used = 0
        self.bits[:, self._place(keys)] = bits
        full = self._used + coming > _FILL * capacity
        self._patience = capacity // 8 if full else 0


def _non_zero(digests: U64) -> U64:
    return np.maximum(digests, _ONE)
