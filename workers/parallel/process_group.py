"""How ranks come to a group: a store where they leave their addresses, and a torch.distributed backend made from it.

Called by the code that starts a rank. Everything is explicit: no environment variable, no default group, no interface
guessed from the host's name. Every listening socket is bound to the host that the caller names. It does not know what
the group is for, nor how ranks learn the store's address.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from penstock.workers.errors import ConfigError, GroupError
from penstock.workers.parallel.collectives import Alone, Collectives, GroupCollectives
from penstock.workers.parallel.shared_collectives import share_memory

_CPU = torch.device("cpu")
_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """One rank's place in a group. `name` tells groups on the same store apart, and lives of the same group."""

    name: str
    rank: int
    width: int
    host: str = "127.0.0.1"  # of this rank; Gloo listens here
    timeout_s: float = 30.0  # longest wait of one collective
    meet_s: float | None = None  # longest wait for the others to come; None: as long as one collective
    share_memory: bool = True  # on the CPU, where all ranks are on one host; else sockets


def serve_store(host: str, timeout_s: float, port: int = 0) -> tuple[Store, str]:
    """A store in this process and its address `host:port`; port 0 takes any. Raises ConfigError for one in use."""
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(f"the group's store cannot listen on {host}:{port}: {error.strerror}", key="group") from error
    port = listener.getsockname()[1]
    # The store takes a listening socket instead of a port, since by itself it would listen on every interface.
    store = TCPStore(
        host,
        port,
        None,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, f"{host}:{port}"


def join_store(address: str, timeout_s: float) -> Store:
    """The store that another rank serves at `host:port`. Raises GroupError where nobody answers in time."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not host:port", key="group.leader")
    deadline = time.monotonic() + timeout_s
    _await_listener(host, int(port), deadline)
    timeout = timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, int(port), None, is_master=False, timeout=timeout, wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise GroupError(f"no store at {address} within {timeout_s:g} s: {reason}", rank=0) from error


def _await_listener(host: str, port: int, deadline: float) -> None:
    """Returns when somebody listens there; the store's own client would fill the log with traces meanwhile."""
    while True:
        try:
            socket.create_connection((host, port), max(0.01, deadline - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() + _RETRY_S >= deadline:
                raise GroupError(f"no store at {host}:{port}: {error}", rank=0) from error
            time.sleep(_RETRY_S)
        else:
            return


def open_group(place: GroupPlace, store: Store | None, device: torch.device = _CPU) -> Collectives:
    """Meet the other ranks; returns when all are connected.

    On the CPU by Gloo, and by shared memory beside it where all share a host; on a GPU by NCCL. `store` may be
    None for a group of one. Raises GroupError where ranks are missing after the time-out.
    """
    if not 0 <= place.rank < place.width:
        raise ConfigError(f"rank {place.rank} is not below the group's {place.width} ranks", key="group.rank")
    if place.width == 1:
        return Alone()
    if store is None:
        raise ConfigError(f"a group of {place.width} ranks needs a store", key="group.leader")
    own = PrefixStore(place.name, store)
    meet_s = place.timeout_s if place.meet_s is None else place.meet_s
    own.set_timeout(timedelta(seconds=meet_s))
    try:
        backend = open_backend(place, own, device)
        group: Collectives = GroupCollectives(backend, place.name)
        # NCCL connects at the first call; better now, where a missing rank is told apart from one that died.
        group.barrier()
        if device.type == "cpu" and place.share_memory:
            group = share_memory(group, own, place.name, place.timeout_s)
        if meet_s != place.timeout_s:
            backend._set_default_timeout(timedelta(seconds=place.timeout_s))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise GroupError(f"group {place.name}, rank {place.rank}: ranks did not meet: {reason}") from error
    return group


def open_backend(place: GroupPlace, store: Store, device: torch.device) -> Any:
    """Gloo on the CPU, NCCL on a GPU, over a store that nobody else uses. RuntimeError where ranks are missing."""
    return _gloo(place, store) if device.type == "cpu" else _nccl(place, store, device)


def _gloo(place: GroupPlace, store: Store) -> Any:
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stub has another name
    meet_s = place.timeout_s if place.meet_s is None else place.meet_s
    options._timeout = timedelta(seconds=meet_s)  # the ranks connect in here
    options._devices = [ProcessGroupGloo.create_device(hostname=place.host)]
    options._threads = 1  # collectives of a group come one after the other
    make: Any = ProcessGroupGloo
    return make(store, place.rank, place.width, options)


def _nccl(place: GroupPlace, store: Store, device: torch.device) -> Any:
    # Only builds for GPUs have it.
    from torch._C._distributed_c10d import ProcessGroupNCCL

    options: Any = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=place.timeout_s)
    torch.cuda.set_device(device)
    backend = ProcessGroupNCCL(store, place.rank, place.width, options)
    backend.eager_connect_single_device(device)
    return backend
