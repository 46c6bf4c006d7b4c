"""What the ranks of a group compute together: sums, joins and exchanges of tensors, behind one small protocol.

Called by the model's layers (`workers/model/`) and by expert dispatch; made by `process_group.py`. It does not know
models, steps or who else listens to the ranks. `Alone` is a group of one, where nothing happens and nothing is copied,
so that callers need no case for it. `GroupCollectives` runs over a torch.distributed backend, Gloo for tensors in host
memory and NCCL for those of GPUs, by the same code.

Invariants: every rank makes the same calls in the same order, with tensors of the same dtype; results that are said to
be equal on all ranks are equal bit by bit. No call outlasts the group's time-out: a peer that is gone, silent or of
another mind is a GroupError, after which the group is of no use any more.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllToAllOptions,
    Backend,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
)

from penstock.workers.errors import GroupError, IntegrityError


class Collectives(Protocol):
    """One rank's side of a group of `width` ranks."""

    @property
    def rank(self) -> int:
        """Of this process in the group, from 0."""
        ...

    @property
    def width(self) -> int:
        """Ranks of the group."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Semantics: x = sum over ranks of x, in place; equal on all ranks. Returns x. Same shape everywhere."""
        ...

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """Rank 0 gets all ranks' x [..., n] joined in their order on the last axis, [..., width n]; others None."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """All ranks' x [n, ...] joined in their order on the first axis, [width n, ...]; equal on all ranks."""
        ...

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Rows [sum(send_counts), ...], those for rank 0 first, go to their ranks.

        Returns [sum(receive_counts), ...], those from rank 0 first, each rank's in the order in which it had them.
        Raises IntegrityError where the counts do not fit rows or width.
        """
        ...

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Semantics: x = x of rank `source`, in place. Returns x. Same shape everywhere."""
        ...

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        ...

    def close(self) -> None:
        """Leave the group; harmless when repeated. Peers still in a call see a GroupError."""
        ...


class Alone:
    """The group of one rank."""

    rank = 0
    width = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives.all_reduce`."""
        return x

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """See `Collectives.gather_columns`."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives.all_gather`."""
        return x

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Collectives.all_to_all`."""
        check_counts(rows, send_counts, receive_counts, 1)
        if tuple(send_counts) != tuple(receive_counts):
            raise IntegrityError(f"a group of one rank sends {send_counts[0]} rows and receives {receive_counts[0]}")
        return rows

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See `Collectives.broadcast`."""
        if source != 0:
            raise IntegrityError(f"a group of one rank has no rank {source}")
        return x

    def barrier(self) -> None:
        """See `Collectives.barrier`."""
        return  # there is nobody to wait for

    def close(self) -> None:
        """See `Collectives.close`."""
        return  # nor to leave


class GroupCollectives:
    """Several ranks over one backend of torch.distributed, which nobody else uses."""

    def __init__(self, backend: Backend, name: str) -> None:
        """`name` is for messages."""
        self._backend: Backend | None = backend
        self._name = name
        self.rank, self.width = backend.rank(), backend.size()

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives.all_reduce`."""
        with self._calling("all_reduce") as backend:
            dense = x.contiguous()
            backend.allreduce([dense]).wait()
        return x if dense is x else x.copy_(dense)

    def gather_columns(self, x: Tensor) -> Tensor | None:
        """See `Collectives.gather_columns`."""
        options = GatherOptions()
        options.rootRank = 0
        with self._calling("gather_columns") as backend:
            dense = x.contiguous()
            parts = [torch.empty_like(dense) for _ in range(self.width)] if self.rank == 0 else []
            backend.gather([parts] if parts else [], [dense], options).wait()
        return torch.cat(parts, dim=-1) if parts else None

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives.all_gather`."""
        joined = x.new_empty(self.width * x.shape[0], *x.shape[1:])
        with self._calling("all_gather") as backend:
            backend._allgather_base(joined, x.contiguous(), AllgatherOptions()).wait()
        return joined

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Collectives.all_to_all`."""
        check_counts(rows, send_counts, receive_counts, self.width)
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        with self._calling("all_to_all") as backend:
            sent = rows.contiguous()
            backend.alltoall_base(received, sent, list(receive_counts), list(send_counts), AllToAllOptions()).wait()
        return received

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """See `Collectives.broadcast`."""
        if not 0 <= source < self.width:
            raise IntegrityError(f"group {self._name} of {self.width} ranks has no rank {source}")
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with self._calling("broadcast") as backend:
            dense = x.contiguous()
            backend.broadcast([dense], options).wait()
        return x if dense is x else x.copy_(dense)

    def barrier(self) -> None:
        """See `Collectives.barrier`."""
        with self._calling("barrier") as backend:
            backend.barrier(BarrierOptions()).wait()

    def close(self) -> None:
        """See `Collectives.close`."""
        backend, self._backend = self._backend, None
        if backend is not None:
            # A group whose peer is gone has nothing left to shut down in order.
            with contextlib.suppress(RuntimeError):
                backend.shutdown()

    @contextlib.contextmanager
    def _calling(self, what: str) -> Iterator[Any]:  # torch's stub of Backend lacks its calls
        if self._backend is None:
            raise GroupError(f"group {self._name}, rank {self.rank}: {what} after the group was closed")
        try:
            # Weak, since the frames of an error still in flight would keep the sockets open after `close`, and peers
            # in other calls waiting.
            yield weakref.proxy(self._backend)
        except RuntimeError as error:  # all that torch.distributed raises
            reason = str(error).splitlines()[0].split(". This is")[0]  # the rest is general advice
            raise GroupError(f"group {self._name}, rank {self.rank}: {what} failed: {reason}") from error


def check_counts(rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], width: int) -> None:
    """Raises IntegrityError unless the counts are `width` numbers each and those to send add up to `rows`."""
    if len(send_counts) != width or len(receive_counts) != width:
        raise IntegrityError(f"{len(send_counts)} and {len(receive_counts)} counts in a group of {width} ranks")
    if min(*send_counts, *receive_counts) < 0 or sum(send_counts) != rows.shape[0]:
        raise IntegrityError(f"rows to send are {list(send_counts)}, which is not {rows.shape[0]} in all")
