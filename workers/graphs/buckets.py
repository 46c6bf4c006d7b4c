"""Numbers of rows for which decode steps are captured; a step is padded up to the next one. Pure.

Called by `decode_graphs.py`. Source: Foundry's bucket table, which vLLM and nano-vllm use alike: powers of two up to 8,
then multiples of 8 up to 256, so that padding wastes at most 7 rows of a larger step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

_SMALL = (1, 2, 4, 8)
_STRIDE = 8
_LARGEST = 256


@dataclass(frozen=True, slots=True)
class BucketTable:
    """`sizes` ascending, none above the most rows of a step."""

    sizes: tuple[int, ...]

    @staticmethod
    def of(sizes: Sequence[int], max_rows: int) -> BucketTable:
        """The given sizes, or the usual ones where none are given; those above `max_rows` give way to `max_rows`."""
        wanted = set(sizes) or {*_SMALL, *range(_STRIDE, _LARGEST + 1, _STRIDE)}
        fitting = {size for size in wanted if 1 <= size <= max_rows}
        if max_rows > 0 and any(size > max_rows for size in wanted):
            fitting.add(max_rows)
        return BucketTable(tuple(sorted(fitting)))

    @property
    def largest(self) -> int:
        """Steps of more rows are never captured; 0 where the table is empty."""
        return self.sizes[-1] if self.sizes else 0

    def bucket_for(self, rows: int) -> int | None:
        """The least size that holds `rows`; None where none does."""
        place = bisect_left(self.sizes, rows)
        return self.sizes[place] if rows > 0 and place < len(self.sizes) else None
