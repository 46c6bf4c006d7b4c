"""Two processes that send each other tensors through one backend of torch.distributed: NCCL between GPUs, or Gloo.

Opened by `lane.py` on a thread of its own, since meeting, sending and receiving all wait. Which backend it is follows
from where the tensors live and changes nothing above: production moves blocks of GPUs by NCCL, tests those of host
memory by Gloo. It knows neither blocks nor sessions.

Invariants: no call outlasts `timeout_s`; after `abort`, or any error, the pair is of no use any more. NCCL's calls are
watched by asking whether they are done, as its own time-out would end the whole process; `abort` ends one that another
thread waits in. Gloo has no abort: there a call ends when the peer does, or by its time-out.
"""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from penstock.workers.errors import ConfigError, GroupError
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_backend

ACCEPTING, OPENING = 0, 1  # rank of who serves the store, and of who came to it
_LOOK_S = 1e-4  # between two looks at a call on a GPU
_UNWATCHED_S = 24 * 3600.0  # NCCL's own time-out, which must not come before ours


class PairGroup(Protocol):
    """One side of a pair. All calls but `abort` wait, and are made by one thread."""

    def send(self, frame: Tensor) -> None:
        """The peer's next `receive`, of the same size, gets these bytes. Raises GroupError."""
        ...

    def receive(self, frame: Tensor) -> None:
        """Fill the frame; its bytes are there when this returns. Raises GroupError."""
        ...

    def abort(self) -> None:
        """End the pair, and calls under way where the backend can. Any thread; safe to call twice."""
        ...


class BackendPair:
    """`PairGroup` over a backend of two ranks."""

    def __init__(self, backend: Any, device: torch.device, timeout_s: float) -> None:
        self._backend = backend
        self._device = device
        self._timeout_s = timeout_s
        self._peer = 1 - backend.rank()
        self._aborted = threading.Event()

    def send(self, frame: Tensor) -> None:
        """See `PairGroup.send`."""
        self._finish("send", lambda: self._backend.send([frame], self._peer, 0))

    def receive(self, frame: Tensor) -> None:
        """See `PairGroup.receive`."""
        self._finish("receive", lambda: self._backend.recv([frame], self._peer, 0))

    def abort(self) -> None:
        """See `PairGroup.abort`."""
        if not self._aborted.is_set():
            self._aborted.set()
            with contextlib.suppress(RuntimeError):
                self._backend.abort()

    def _finish(self, what: str, begin: Any) -> None:
        if self._aborted.is_set():
            raise GroupError(f"{what} after the pair was ended")
        try:
            # On a GPU, after all that was submitted to its default stream: the frame's memory may have served that.
            work = begin()
            if self._device.type == "cuda":
                self._watch(what, work)
            else:
                work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:  # all that torch.distributed raises
            raise GroupError(f"{what} failed: {str(error).splitlines()[0]}") from error

    def _watch(self, what: str, work: Any) -> None:
        give_up = time.monotonic() + self._timeout_s
        while not work.is_completed():
            if self._aborted.is_set():
                raise GroupError(f"{what} was ended")
            if time.monotonic() > give_up:
                self.abort()
                raise GroupError(f"{what} did not end within {self._timeout_s:g} s")
            time.sleep(_LOOK_S)
        work.wait()  # raises what went wrong; the device is done


def open_pair(address: str, name: str, rank: int, host: str, device: torch.device, timeout_s: float) -> BackendPair:
    """Meet the peer at the store; returns when both are there. Raises GroupError. Sockets listen on `host`."""
    store = PrefixStore(name, join_store(address, timeout_s))
    store.set_timeout(timedelta(seconds=timeout_s))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        # A peer that never comes is noticed here, by a wait that ends, rather than inside the backend.
        store.set(f"here/{rank}", "1")
        store.get(f"here/{1 - rank}")
        own_timeout_s = _UNWATCHED_S if device.type == "cuda" else timeout_s
        backend = open_backend(GroupPlace(name, rank, 2, host=host, timeout_s=own_timeout_s), store, device)
    except RuntimeError as error:
        raise GroupError(f"the pair {name} did not meet: {str(error).splitlines()[0]}") from error
    return BackendPair(backend, device, timeout_s)


def require_nccl(device: torch.device) -> None:
    """Raises ConfigError where blocks on this device cannot travel by NCCL."""
    if device.type != "cuda":
        raise ConfigError(
            "transport nccl moves blocks between GPUs, and this worker's KV pool is in host memory: set runner.device "
            "to cuda, or take another transport",
            key="transfer.transport",
        )
    if not torch.distributed.is_nccl_available():
        raise ConfigError(
            "transport nccl: this build of torch has no NCCL; install one for CUDA, or take another transport",
            key="transfer.transport",
        )
