"""The workers that may have our weights: which one is asked at the moment, and what was wrong with the others.

`intake.py` asks it for a source whenever it has none. Candidates come from the controller and from sources that serve
others already; each is asked who it is before it is asked for bytes. One that is busy or gone rests for a while, one
that lies or serves another checkpoint is never asked again.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from penstock.workers.errors import PeerError, WireError
from penstock.workers.model.config import MAX_CONFIG_BYTES
from penstock.workers.settings import WeightSettings
from penstock.workers.tls import PeerTls
from penstock.workers.weights.link import WeightLink
from penstock.workers.weights.messages import Absent, Greeting, Piece, Refusal, Terms, Want, WantConfig
from penstock.workers.weights.runs import MAX_RUN_BYTES, Run

log = logging.getLogger(__name__)

MAX_CANDIDATES = 64
_MAX_PAYLOAD_BYTES = max(MAX_RUN_BYTES, MAX_CONFIG_BYTES)
_CONNECT_S = 2.0  # also for the greeting
_LOOK_S = 5.0  # after so long without one that admits us, the load goes on without
_BUSY_S, _ABSENT_S, _UNREACHABLE_S = 1.0, 0.2, 10.0  # rests
_INNOCENT = (_BUSY_S, _ABSENT_S)  # rests that are no failures
_STRIKES = 10  # after so many failures a peer is not asked again


class Source:
    """One peer that has admitted us. Answers come in the order of the asking; each is checked."""

    def __init__(self, address: str, link: WeightLink, terms: Terms) -> None:
        self.address = address
        self.terms = terms
        self._link = link

    def ask(self, file: int, run: Run) -> None:
        """Ask for a run of a file of the terms. Raises PeerError."""
        self._link.send(Want(file, run.begin, run.length, run.stride, run.count))

    def answer(self, run: Run) -> memoryview:
        """The bytes of the oldest run asked for, valid until the next call. Raises PeerError, also where they lie."""
        return self._payload(run.size)

    def config(self) -> bytes:
        """Its `config.json`; with nothing asked for before. Raises PeerError."""
        if self.terms.config_bytes > MAX_CONFIG_BYTES:
            raise PeerError(f"its config.json has {self.terms.config_bytes} bytes")
        self._link.send(WantConfig())
        return bytes(self._payload(self.terms.config_bytes))

    def close(self) -> None:
        """Ask for nothing more. Safe to call twice."""
        self._link.close()

    def _payload(self, size: int) -> memoryview:
        try:
            message, payload = self._link.receive()
        except WireError as error:
            raise PeerError(str(error)) from error
        match message:
            case Piece(digest):
                if len(payload) != size:
                    raise PeerError(f"it gave {len(payload)} bytes instead of {size}")
                if xxh3_64_intdigest(payload) != digest:
                    raise PeerError("it gave bytes that do not have the digest it states")
                return payload
            case Absent():
                raise PeerError("it does not have these bytes yet", _ABSENT_S)
            case Refusal(busy, reason, referrals):
                raise PeerError(reason, _UNREACHABLE_S if busy else None, referrals)
            case other:
                raise PeerError(f"it answers with {type(other).__name__}")


@dataclass(slots=True)
class _Candidate:
    address: str
    rests_until: float = 0.0
    strikes: int = 0
    reason: str = ""  # why it is not asked at the moment


class Peers:
    """Of one load; used by one thread."""

    def __init__(
        self,
        addresses: Iterable[str],
        cluster_key: str,
        settings: WeightSettings,
        clock: Callable[[], float] = time.monotonic,
        tls: PeerTls | None = None,
    ) -> None:
        self._tls = tls
        self.own_address = ""  # where we serve what we have got; set before the first `current`
        self.expected: Terms | None = None  # what a source must serve; None: whatever the first one does
        self._key = bytes.fromhex(cluster_key)
        self._settings = settings
        self._clock = clock
        self._candidates: dict[str, _Candidate] = {}
        self._source: Source | None = None
        self.add(addresses)

    def add(self, addresses: Iterable[str]) -> None:
        """More candidates; known ones stay as they are."""
        for address in addresses:
            if address != self.own_address and len(self._candidates) < MAX_CANDIDATES:
                self._candidates.setdefault(address, _Candidate(address))

    @property
    def hopeless(self) -> bool:
        """No candidate will be asked again."""
        return self._source is None and all(each.rests_until == float("inf") for each in self._candidates.values())

    @property
    def reasons(self) -> str:
        """What was wrong with each candidate last."""
        found = [f"{each.address}: {each.reason}" for each in self._candidates.values() if each.reason]
        return "; ".join(found) or "no peer is known"

    def current(self) -> Source | None:
        """The source to ask now; the first candidate that admits us, where there was none. None: nobody does."""
        if self._source is None:
            began = self._clock()
            waiting = [each for each in self._candidates.values() if each.rests_until <= began]
            for candidate in sorted(waiting, key=lambda each: each.strikes):
                if self._clock() - began > _LOOK_S:
                    break
                try:
                    self._source = self._admitted(candidate.address)
                except PeerError as error:
                    self._rest(candidate, error)
                else:
                    break
        return self._source

    def leave(self, error: PeerError) -> None:
        """The current source failed like this: whatever was asked of it will not come."""
        if self._source is not None:
            source, self._source = self._source, None
            source.close()
            self._rest(self._candidates[source.address], error)

    def close(self) -> None:
        """End the connection, with whatever was asked for; `current` opens another one."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _rest(self, candidate: _Candidate, error: PeerError) -> None:
        candidate.reason = str(error)
        candidate.strikes += error.pause_s not in _INNOCENT
        if error.pause_s is None or candidate.strikes >= _STRIKES:
            candidate.rests_until = float("inf")
            log.warning("no more weights from %s: %s", candidate.address, error)
        else:
            candidate.rests_until = self._clock() + error.pause_s
            log.debug("no weights from %s now: %s", candidate.address, error)
        self.add(error.referrals)

    def _admitted(self, address: str) -> Source:
        """Connect and greet. Raises PeerError."""
        try:
            host, _, port = address.rpartition(":")
            where = str(ipaddress.ip_address(host.strip("[]"))), int(port)
        except ValueError as error:
            raise PeerError(f"{address!r} is no numeric host:port") from error
        try:
            sock = socket.create_connection(where, _CONNECT_S)
            if self._tls is not None:
                sock = self._tls.opening.wrap_socket(sock)
        except OSError as error:
            raise PeerError(f"it cannot be reached: {error}", _UNREACHABLE_S) from error
        try:
            source = self._greeted(address, WeightLink(sock, self._key, _MAX_PAYLOAD_BYTES, opened=True))
        except WireError as error:
            sock.close()
            raise PeerError(str(error)) from error
        except PeerError:
            sock.close()
            raise
        sock.settimeout(self._settings.stall_s)
        return source

    def _greeted(self, address: str, link: WeightLink) -> Source:
        expected = self.expected
        link.send(Greeting("" if expected is None else expected.revision, self.own_address))
        message, _ = link.receive()
        match message:
            case Terms():
                if expected is not None and message != expected:
                    raise PeerError(f"it serves other files, or another checkpoint: revision {message.revision}")
                return Source(address, link, message)
            case Refusal(busy, reason, referrals):
                raise PeerError(reason, _BUSY_S if busy else None, referrals)
            case other:
                raise PeerError(f"it answers a greeting with {type(other).__name__}")
