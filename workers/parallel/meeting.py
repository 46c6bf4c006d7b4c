"""How the ranks of a group find each other: rank 0 listens, followers come with a hello, and misfits are told why.

`leader.py` runs the `Meeting`, `follower.py` calls `join`. Every follower opens two connections: one for what concerns
the group, one for steps, the second over a local socket with shared memory beside it where both are on one host. What
the ranks then say to each other is not known here.

A hello carries the settings, so that ranks that were told different things never compute together; only what must
differ (rank, addresses, cores, device) is left out. Strangers get no further than the hello: frames are authenticated.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import logging
import os
import socket
import threading
import time
from dataclasses import dataclass

from penstock.workers.errors import ConfigError, GroupError, IntegrityError, WireError
from penstock.workers.parallel.group_link import GroupLink
from penstock.workers.parallel.group_messages import (
    MAX_CONTROL_BYTES,
    MAX_MESSAGE_BYTES,
    Accepted,
    GroupMessage,
    Hello,
    Refused,
    decode_message,
    encode_message,
)
from penstock.workers.parallel.plan_codec import MAX_PLAN_BYTES
from penstock.workers.parallel.shared_settings import differences, shared_settings
from penstock.workers.parallel.step_ring import RingReader, RingWriter
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

CONTROL = 1  # the kind of every frame on a control connection
_HELLO_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 10.0
_MAX_STEP_BYTES = max(MAX_PLAN_BYTES + (1 << 12), MAX_MESSAGE_BYTES)
_MAX_GREETINGS = 64  # connections at a time that have not yet shown who they are


@dataclass(frozen=True, slots=True)
class Member:
    """One follower as rank 0 knows it."""

    rank: int
    pid: int
    host_id: str
    control: GroupLink
    steps: GroupLink


class Meeting:
    """Rank 0's listener. Followers may come from the moment it exists; `wait` returns when all are here."""

    def __init__(self, settings: WorkerSettings, host_id: str, ring_bytes: int) -> None:
        """Raises ConfigError for a host that cannot be listened on."""
        self._settings = settings
        self._host_id = host_id
        self._ring_bytes = ring_bytes
        self._told = shared_settings(settings)
        self._width = settings.group.width
        self._controls: dict[int, tuple[GroupLink, Hello]] = {}
        self._members: dict[int, Member] = {}
        self._misfit: ConfigError | None = None
        self._news = threading.Condition()
        self._closed = False
        self._greetings = threading.BoundedSemaphore(_MAX_GREETINGS)
        self.ring: RingWriter | None = None
        host = settings.group.host
        try:
            self._listeners = [socket.create_server((host, 0))]
        except OSError as error:
            raise ConfigError(f"the group cannot listen on {host}: {error.strerror}", "group.host") from error
        self.address = f"{host}:{self._listeners[0].getsockname()[1]}"
        self._local_address = f"penstock-group-{os.urandom(8).hex()}"
        local = socket.socket(socket.AF_UNIX)
        local.bind("\0" + self._local_address)
        local.listen(self._width)
        self._listeners.append(local)
        for listener in self._listeners:
            threading.Thread(target=self._listen, args=(listener,), name="group-meeting", daemon=True).start()

    def wait(self, timeout_s: float) -> list[Member]:
        """All followers in rank order. Raises ConfigError naming those that did not come, or what one was told."""
        with self._news:
            self._news.wait_for(lambda: self._misfit or len(self._members) == self._width - 1, timeout_s)
            missing = [rank for rank in range(1, self._width) if rank not in self._members]
            members = [self._members[rank] for rank in sorted(self._members)]
        self.close()
        if self._misfit is not None:
            raise self._misfit
        if missing:
            ranks = ", ".join(map(str, missing))
            raise ConfigError(
                f"of {self._width} ranks, {len(missing)} did not join within {timeout_s:g} s: rank {ranks}",
                "group.start_timeout_s",
            )
        return members

    def close(self) -> None:
        """Take no one any more. Safe to call twice."""
        self._closed = True
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def _listen(self, listener: socket.socket) -> None:
        while not self._closed:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if not self._greetings.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection,), name="group-hello", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        connection.settimeout(_HELLO_TIMEOUT_S)
        try:
            link = open_link(connection, self._settings, opened=False)
            hello = decode_message(bytes(link.receive().body))
            if not isinstance(hello, Hello):
                raise WireError("a rank begins with something else than a hello")
            refused = self._problem_with(hello)
            if refused is None:
                self._take(link, hello)
                return
            log.error("rank %d refused: %s", hello.rank, refused.message)
            try:
                link.send(CONTROL, encode_message(refused))
                link.close()
            finally:
                self._note_misfit(hello, refused)  # which may end this process: the other one is to know why first
        except (GroupError, WireError, IntegrityError, OSError) as error:
            log.warning("somebody came to the group's meeting and is no rank of it: %s", error)
            connection.close()
        finally:
            self._greetings.release()

    def _take(self, link: GroupLink, hello: Hello) -> None:
        accepted = Accepted(os.getpid(), self._host_id, self._local_address, ring=link.local)
        if not hello.steps:
            with self._news:
                self._controls[hello.rank] = (link, hello)
            link.socket.settimeout(None)
            link.send(CONTROL, encode_message(accepted))
            return
        with self._news:
            if link.local and self.ring is None:
                self.ring = RingWriter(self._ring_bytes, self._width - 1)
        link.send(CONTROL, encode_message(accepted))
        if link.local and self.ring is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [self.ring.descriptor]))]
            link.socket.sendmsg([b"R"], rights)
        link.socket.settimeout(None)
        link.establish(_MAX_STEP_BYTES)
        with self._news:
            control, _ = self._controls[hello.rank]
            self._members[hello.rank] = Member(hello.rank, hello.pid, hello.host_id, control, link)
            self._news.notify_all()

    def _problem_with(self, hello: Hello) -> Refused | None:
        with self._news:
            known = self._controls.get(hello.rank)
            complete = hello.rank in self._members
        if not 0 < hello.rank < self._width:
            return Refused(f"rank {hello.rank} joins a group of {self._width} ranks", "group.rank")
        if hello.steps:
            if known is None or known[1].pid != hello.pid or complete:
                return Refused(f"rank {hello.rank} has no control connection that waits for this one", "group.rank")
            return None
        if known is not None:
            return Refused(f"rank {hello.rank} is taken by process {known[1].pid}", "group.rank")
        differing = differences(self._told, hello.settings)
        if differing:
            return Refused(f"rank {hello.rank} was told other settings than rank 0: {'; '.join(differing)}", "group")
        return None

    def _note_misfit(self, hello: Hello, refused: Refused) -> None:
        """One of ours that was told otherwise: there is no use in waiting for another."""
        if refused.key != "group":
            return
        if not any(line.startswith("worker_id ") for line in differences(self._told, hello.settings)):
            with self._news:
                self._misfit = ConfigError(refused.message, "group")
                self._news.notify_all()


@dataclass(frozen=True, slots=True)
class Joining:
    """A follower's ends after the meeting."""

    control: GroupLink
    steps: GroupLink
    ring: RingReader | None
    leader_pid: int
    leader_host_id: str


def join(settings: WorkerSettings, host_id: str) -> Joining:
    """Come to rank 0's meeting. Raises ConfigError where it refuses or nobody answers, GroupError where it ends."""
    group = settings.group
    hello = Hello(group.rank, os.getpid(), host_id, False, shared_settings(settings))
    with contextlib.ExitStack() as undo:

        def opened(connection: socket.socket) -> GroupLink:
            undo.callback(connection.close)
            return open_link(connection, settings, opened=True)

        control = opened(_connect(group.leader, group.start_timeout_s, group.host))
        accepted = _ask(control, hello)
        near = _connect_local(accepted.local_address) if accepted.host_id == host_id else None
        steps = opened(near or _connect(group.leader, group.start_timeout_s, group.host))
        on_steps = _ask(steps, dataclasses.replace(hello, steps=True, settings=""))
        ring = RingReader(_receive_descriptor(steps.socket), group.rank - 1) if on_steps.ring else None
        steps.establish(_MAX_STEP_BYTES)
        undo.pop_all()
    return Joining(control, steps, ring, accepted.pid, accepted.host_id)


def open_link(connection: socket.socket, settings: WorkerSettings, *, opened: bool) -> GroupLink:
    """The connection as a link of this life of the group. Raises GroupError, WireError."""
    return GroupLink(connection, settings.cluster_key, settings.incarnation, MAX_CONTROL_BYTES, opened=opened)


def _ask(link: GroupLink, hello: Hello) -> Accepted:
    link.send(CONTROL, encode_message(hello))
    try:
        answer: GroupMessage = decode_message(bytes(link.receive().body))
    except (GroupError, WireError, IntegrityError) as error:
        raise ConfigError(
            f"rank {hello.rank} was not taken by rank 0 ({error}): is it of the same cluster key and incarnation?",
            "group.leader",
        ) from error
    if isinstance(answer, Refused):
        raise ConfigError(answer.message, answer.key)
    if not isinstance(answer, Accepted):
        raise WireError(f"rank 0 answers a hello with {type(answer).__name__}")
    return answer


def _connect(address: str, timeout_s: float, own_host: str) -> socket.socket:
    """To rank 0, which may not listen yet. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{address!r} is not host:port", "group.leader")
    give_up = time.monotonic() + timeout_s
    while True:
        try:
            connection = socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S, (own_host, 0))
        except OSError as error:
            if time.monotonic() > give_up:
                raise ConfigError(f"nobody answers at {address} as rank 0: {error}", "group.leader") from error
            time.sleep(0.05)
        else:
            connection.settimeout(None)
            return connection


def _connect_local(name: str) -> socket.socket | None:
    """None where it cannot be reached, as from another network namespace."""
    near = socket.socket(socket.AF_UNIX)
    try:
        near.connect("\0" + name)
    except OSError:
        near.close()
        return None
    return near


def _receive_descriptor(connection: socket.socket) -> int:
    _, rights, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(array.array("i", [0]).itemsize))
    for level, kind, data in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            return int(array.array("i", data[:4])[0])
    raise GroupError("rank 0 did not hand over its shared memory")
