"""The KV blocks of a worker, counted twice: by what was done with them, and by where they are.

Filled by `block_pool.py`, carried by `workers/audit.py` to a ledger, which compares the two. Plain data.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockAccount:
    """KV blocks of all banks: what was done with them since the start, and where they are now, counted anew."""

    total: int = 0
    allocated: int = 0  # handed out
    freed: int = 0  # given back blank
    adopted: int = 0  # given to the prefix cache
    reclaimed: int = 0  # taken back from it
    private: int = 0  # held by one sequence
    cached: int = 0
    idle: int = 0  # of these, held by nobody
    quarantined: int = 0
    blank: int = 0

    def __add__(self, other: BlockAccount) -> BlockAccount:
        names = self.__slots__
        return BlockAccount(*(getattr(self, name) + getattr(other, name) for name in names))
