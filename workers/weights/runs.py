"""Which bytes of a file a piece of a tensor is: equally long runs at equal distances, as peers are asked for them.

Used by both ends. Pure: shapes and offsets in, numbers out. A rank's columns of a matrix are many short runs, its rows
one long one, so that of both only what the rank needs travels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_RUN_BYTES = 1 << 20  # of one request's answer
MAX_SPAN_BYTES = 8 << 20  # of the file, from the first byte to the last; what a source reads to answer


@dataclass(frozen=True, slots=True)
class Run:
    """`count` times `length` bytes, `stride` apart, the first at byte `begin` of the file."""

    begin: int
    length: int
    stride: int = 0
    count: int = 1

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.length * self.count

    @property
    def end(self) -> int:
        """The byte behind the last one."""
        return self.begin + (self.count - 1) * self.stride + self.length

    @property
    def span(self) -> int:
        """Bytes from the first to the last."""
        return self.end - self.begin

    @property
    def allowed(self) -> bool:
        """Whether one request may ask for it, of a file that is long enough."""
        apart = self.count == 1 or self.stride >= self.length
        return (
            self.length > 0 and self.count > 0 and apart and self.size <= MAX_RUN_BYTES and self.span <= MAX_SPAN_BYTES
        )


def runs_of(begin: int, shape: Sequence[int], strides: Sequence[int], itemsize: int) -> Iterator[Run]:
    """The bytes of a tensor whose first is at `begin`, in the tensor's own order; `strides` in bytes."""
    if 0 in shape:
        return
    outer = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size > 1]
    length = itemsize
    while outer and outer[-1][1] == length:
        length *= outer.pop()[0]
    if length > MAX_RUN_BYTES:
        for first in _firsts(begin, outer):
            yield from contiguous(first, length)
        return
    count, stride = outer.pop() if outer else (1, 0)
    rows = max(1, min(MAX_RUN_BYTES // length, (MAX_SPAN_BYTES - length) // max(1, stride)))
    for first in _firsts(begin, outer):
        for row in range(0, count, rows):
            number = min(rows, count - row)
            yield Run(first + row * stride, length, stride if number > 1 else 0, number)


def contiguous(begin: int, size: int) -> Iterator[Run]:
    """`size` bytes from `begin` on."""
    for first in range(begin, begin + size, MAX_RUN_BYTES):
        yield Run(first, min(MAX_RUN_BYTES, begin + size - first))


def _firsts(begin: int, outer: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Where each combination of the outer dimensions begins, in order."""
    for place in itertools.product(*(range(0, size * stride, stride) for size, stride in outer)):
        yield begin + sum(place)
