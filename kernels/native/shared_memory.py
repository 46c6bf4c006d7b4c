"""Sums, joins and exchanges of tensors among processes of one host that map the same memory; see `shared_memory.cpp`.

Called by `workers/parallel/shared_collectives.py`, which brings the processes together and gives the memory. Knows only
tensors in host memory and the mapping. Every element of a sum is added in the order of the ranks, so results are the
same on all ranks and do not depend on what else is summed with it.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from penstock.kernels.native.library import answering_function, load

BUFFER_BYTES = 512 << 10  # of one turn of one rank: two of them and the partner's stay in the cores' caches
_COUNTERS = 64  # bytes of a rank's counters, before the sizes that it tells the others
_LINE = 128
_SUMS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float64: "f64", torch.int64: "i64"}


class Outcome(IntEnum):
    """How an exchange ended."""

    FINE = 0
    LATE = 1  # a rank did not come in time
    LEFT = 2  # a rank has left
    ENDED = 3  # a rank's process has ended
    OTHER = 4  # a rank made another call, or one of another size


class ExchangeError(Exception):
    """An exchange that did not come to its end: the memory is of no use any more. `rank` is the one at fault."""

    def __init__(self, outcome: Outcome, rank: int) -> None:
        super().__init__(f"{outcome.name.lower()}, rank {rank}")
        self.outcome = outcome
        self.rank = rank


class _Exchange(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("line_bytes", ctypes.c_int64),
        ("turn", ctypes.c_uint64),
        ("timeout_ns", ctypes.c_int64),
        ("processes", ctypes.c_void_p),
        ("culprit", ctypes.c_int64),
    )


def available() -> bool:
    """Whether the compiled library is there."""
    return load() is not None


def memory_bytes(width: int) -> int:
    """Bytes that a group of `width` ranks maps; they begin as zeros."""
    return width * (_line_bytes(width) + 2 * BUFFER_BYTES)


def _line_bytes(width: int) -> int:
    return -(-(_COUNTERS + 8 * width) // _LINE) * _LINE


def sums(dtype: torch.dtype) -> bool:
    """Whether `SharedExchange.all_reduce` takes this dtype."""
    return dtype in _SUMS


class SharedExchange:
    """One rank's side. Calls are made by one thread at a time, the same ones in the same order by every rank.

    Tensors are contiguous and in host memory. Every call raises ExchangeError where a rank is gone, late, or of another
    mind.
    """

    def __init__(
        self, memory: mmap.mmap, rank: int, width: int, *, timeout_s: float, processes: Sequence[int] = ()
    ) -> None:
        """`memory` of `memory_bytes(width)`; `processes`: a pidfd for each rank, negative for none."""
        if len(memory) < memory_bytes(width) or not 0 <= rank < width:
            raise ValueError(f"rank {rank} of {width} in {len(memory)} bytes")
        self._memory = memory
        watched = (ctypes.c_int * width)(*(processes or [-1] * width))
        self._watched = watched
        self._exchange = _Exchange(
            ctypes.addressof(ctypes.c_char.from_buffer(memory)),
            rank,
            width,
            BUFFER_BYTES,
            _line_bytes(width),
            0,
            int(timeout_s * 1e9),
            ctypes.addressof(watched),
            -1,
        )
        self._address = ctypes.addressof(self._exchange)
        self._sums = {dtype: answering_function(f"shared_sum_{name}") for dtype, name in _SUMS.items()}

    def all_reduce(self, x: Tensor) -> None:
        """Semantics: x = sum over ranks of x, in place."""
        self._call(self._sums[x.dtype], x.data_ptr(), x.numel())

    def gather(self, part: Tensor, rows: int, joined: Tensor | None) -> None:
        """`joined` [rows, width, n] gets all ranks' parts [rows, n], where it is given."""
        row_bytes = part.numel() // max(1, rows) * part.element_size()
        target = 0 if joined is None else joined.data_ptr()
        self._call(answering_function("shared_gather"), part.data_ptr(), rows, row_bytes, target)

    def broadcast(self, x: Tensor, source: int) -> None:
        """Semantics: x = x of rank `source`, in place."""
        size = x.numel() * x.element_size()
        self._call(answering_function("shared_broadcast"), x.data_ptr(), size, source)

    def all_to_all(self, rows: Tensor, send: Sequence[int], received: Tensor, receive: Sequence[int]) -> None:
        """Rows [sum(send), ...] go to their ranks, those of every rank come into `received` [sum(receive), ...]."""
        size = rows[:1].numel() if len(rows) else received[:1].numel()
        size *= rows.element_size()
        width = self._exchange.width
        sizes = [(ctypes.c_int64 * width)(*(count * size for count in counts)) for counts in (send, receive)]
        own, theirs = (ctypes.addressof(each) for each in sizes)
        self._call(answering_function("shared_all_to_all"), rows.data_ptr(), own, received.data_ptr(), theirs)

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self._call(answering_function("shared_barrier"))

    def leave(self) -> None:
        """Tell the others that no call will come any more."""
        answering_function("shared_leave")(self._address)

    def _call(self, call: Callable[..., int], *arguments: int) -> None:
        outcome = call(self._address, *arguments)
        if outcome:
            raise ExchangeError(Outcome(outcome), int(self._exchange.culprit))
