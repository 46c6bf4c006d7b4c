"""The collectives of ranks on one host, through memory that all of them map: microseconds where sockets take hundreds.

Made by `process_group.py` where every rank shares the host and the compiled kernels are there. The memory is anonymous
(memfd): it lives as long as a rank holds it, needs no room in a mounted file system and leaves nothing behind. Other
dtypes than the kernels add go over the group's sockets. It does not know models.

Invariant: whether memory or sockets serve a call depends only on what all ranks know alike.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from penstock.kernels.native.shared_memory import (
    ExchangeError,
    Outcome,
    SharedExchange,
    available,
    memory_bytes,
    sums,
)
from penstock.workers.errors import GroupError, IntegrityError
from penstock.workers.parallel.collectives import Collectives, check_counts
from penstock.workers.transfer.host import host_id

_REASONS = {
    Outcome.LATE: "did not come in time",
    Outcome.LEFT: "has left",
    Outcome.ENDED: "has ended",
    Outcome.OTHER: "made another call",
}
_PLACE = re.compile(r"[1-9][0-9]{0,9}/[0-9]{1,9}")  # process and descriptor of the memory


class SharedCollectives:
    """Several ranks on one host. `sockets` are the same ranks' other way to each other."""

    def __init__(self, exchange: SharedExchange, sockets: Collectives, name: str, processes: Sequence[int]) -> None:
        """`processes` are pidfds, closed with the group; `name` is for messages."""
        self._exchange: SharedExchange | None = exchange
        self._sockets = sockets
        self._name = name
        self._processes = list(processes)
        self.rank, self.width = sockets.rank, sockets.width

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives.all_reduce`. Narrow floats are added in float32 and rounded once."""
        if not sums(x.dtype):
            return self._sockets.all_reduce(x)
        with self._calling("all_reduce") as exchange:
            dense = x.contiguous()
            exchange.all_reduce(dense)
        return x if dense is x else x.copy_(dense)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """See `Collectives.gather_columns`."""
        joined = None
        with self._calling("gather_columns") as exchange:
            rows = x.numel() // max(1, x.shape[-1])
            if self.rank == 0:
                joined = x.new_empty(*x.shape[:-1], self.width * x.shape[-1])
            exchange.gather(x.contiguous(), rows, joined)
        return joined

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives.all_gather`."""
        joined = x.new_empty(self.width * x.shape[0], *x.shape[1:])
        with self._calling("all_gather") as exchange:
            exchange.gather(x.contiguous(), 1, joined)
        return joined

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Collectives.all_to_all`."""
        check_counts(rows, send_counts, receive_counts, self.width)
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        with self._calling("all_to_all") as exchange:
            exchange.all_to_all(rows.contiguous(), send_counts, received, receive_counts)
        return received

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See `Collectives.broadcast`."""
        if not 0 <= source < self.width:
            raise IntegrityError(f"group {self._name} of {self.width} ranks has no rank {source}")
        with self._calling("broadcast") as exchange:
            dense = x.contiguous()
            exchange.broadcast(dense, source)
        return x if dense is x else x.copy_(dense)

    def barrier(self) -> None:
        """See `Collectives.barrier`."""
        with self._calling("barrier") as exchange:
            exchange.barrier()

    def close(self) -> None:
        """See `Collectives.close`."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.leave()
            for process in self._processes:
                os.close(process)
        self._sockets.close()

    @contextlib.contextmanager
    def _calling(self, what: str) -> Iterator[SharedExchange]:
        if self._exchange is None:
            raise GroupError(f"group {self._name}, rank {self.rank}: {what} after the group was closed")
        try:
            yield self._exchange
        except ExchangeError as error:
            reason = f"rank {error.rank} {_REASONS[error.outcome]}"
            raise GroupError(f"group {self._name}, rank {self.rank}: {what} failed: {reason}", error.rank) from error


def share_memory(sockets: Collectives, store: Store, name: str, timeout_s: float) -> Collectives:
    """The same group through shared memory where every rank can, else `sockets`; all ranks call it and agree."""
    rank, width = sockets.rank, sockets.width
    # Without the kernels a rank is nobody's neighbour.
    store.set(f"place/{rank}", f"{host_id() if available() else rank} {os.getpid()}")
    places = [store.get(f"place/{peer}").decode("ascii", "replace").split(" ") for peer in range(width)]
    if any(place[0] != places[0][0] for place in places):
        return sockets
    found: tuple[mmap.mmap, list[int]] | None = None
    with contextlib.suppress(OSError, ValueError):
        found = _map_memory(store, rank, width), [os.pidfd_open(int(place[1])) for place in places]
    # Everybody must have it, or nobody uses it.
    votes = torch.tensor([int(found is not None)])
    if int(sockets.all_reduce(votes)) < width or found is None:
        return sockets
    memory, processes = found
    exchange = SharedExchange(memory, rank, width, timeout_s=timeout_s, processes=processes)
    return SharedCollectives(exchange, sockets, name, processes)


def _map_memory(store: Store, rank: int, width: int) -> mmap.mmap:
    """The memory that rank 0 makes. Raises OSError and ValueError where it cannot be had."""
    size = memory_bytes(width)
    if rank == 0:
        descriptor = -1
        try:
            descriptor = os.memfd_create("penstock-group", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
            memory = mmap.mmap(descriptor, size)
        finally:
            # Said in any case: the others wait for it. The descriptor stays open until they have it; see below.
            store.set("memory", f"{os.getpid()}/{descriptor}" if descriptor >= 0 else "none")
        _await_mapped(store, width)
        os.close(descriptor)
        return memory
    try:
        place = store.get("memory").decode("ascii", "replace")
        if not _PLACE.fullmatch(place):
            raise ValueError(place)
        process, descriptor_number = place.split("/")
        with open(f"/proc/{process}/fd/{descriptor_number}", "r+b") as file:
            return mmap.mmap(file.fileno(), size)
    finally:
        store.set(f"mapped/{rank}", "1")


def _await_mapped(store: Store, width: int) -> None:
    for peer in range(1, width):
        store.get(f"mapped/{peer}")
