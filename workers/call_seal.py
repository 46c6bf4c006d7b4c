"""Proof that both ends of a call know the cluster key, and a seal for every message of the stream that it opens.

Used by `rpc.py` on both ends. The key itself never travels, and nothing that was recorded is of use again:

    router -> worker   Challenge(nonce)
    worker -> router   its own nonce, incarnation, id, and a proof over all of it: no stranger passes for a worker
    router -> worker   the call, both nonces and a proof over its method; each of the worker's nonces opens one call
    both               every message of a stream: HMAC over its number and its bytes, under keys of this stream alone

Knows neither gRPC nor what messages mean. Without a cluster key (tests) nothing is proved or sealed.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass

from penstock.workers.errors import WireError

NONCE_BYTES = 16
MAC_BYTES = 32
MAX_CHALLENGES = 4096  # that no call has followed yet; the oldest is forgotten
_ANSWER = struct.Struct(f"<{NONCE_BYTES}sQ{MAC_BYTES}s")  # followed by the worker's id
_CALL = struct.Struct(f"<{NONCE_BYTES}s{NONCE_BYTES}s{MAC_BYTES}s")
CALL_BYTES = _CALL.size


@dataclass(frozen=True, slots=True)
class WorkerName:
    """Who answers: a worker in one of its lives."""

    worker_id: str
    incarnation: int


UNNAMED = WorkerName("", 0)  # of a server that stands for no worker


class MessageSeal:
    """One direction of one stream: both ends count its messages, so none can be left out, doubled or moved."""

    def __init__(self, key: bytes) -> None:
        """`key`: empty: nothing is sealed."""
        self._key = key
        self._number = 0

    def seal(self, data: bytes) -> bytes:
        """The next message as it is sent."""
        return self._mac(data) + data if self._key else data

    def open(self, data: bytes) -> bytes:
        """The next message that came, without its seal. Raises WireError."""
        if not self._key:
            return data
        if len(data) < MAC_BYTES or not hmac.compare_digest(self._mac(data[MAC_BYTES:]), data[:MAC_BYTES]):
            raise WireError("a message of the stream is not authentic, or is out of its place")
        return data[MAC_BYTES:]

    def _mac(self, data: bytes) -> bytes:
        number = self._number.to_bytes(8, "little")
        self._number += 1
        return hmac.digest(self._key, number + data, "sha256")


@dataclass(frozen=True, slots=True)
class StreamSeals:
    """Both directions of one stream."""

    to_worker: MessageSeal
    to_router: MessageSeal


def open_seals(key: bytes, router_nonce: bytes, worker_nonce: bytes) -> StreamSeals:
    """The seals of the stream that these nonces opened; the same at both ends."""
    if not key:
        return StreamSeals(MessageSeal(b""), MessageSeal(b""))
    seed = hmac.digest(key, b"penstock stream" + router_nonce + worker_nonce, "sha256")
    directions = (hmac.digest(seed, name, "sha256") for name in (b"to worker", b"to router"))
    return StreamSeals(*map(MessageSeal, directions))


class CallGate:
    """The worker's side: answers challenges, and admits each call that proves the key once."""

    def __init__(self, key: bytes, name: WorkerName) -> None:
        self._key = key
        self._name = name
        self._open: OrderedDict[bytes, bytes] = OrderedDict()  # our nonces -> the router's, until a call uses them

    @property
    def guarded(self) -> bool:
        """Calls must prove that they know the key."""
        return bool(self._key)

    def challenge(self, router_nonce: bytes) -> bytes:
        """The answer to a router's nonce. Raises WireError where there is no key, or that is no nonce."""
        if not self._key or len(router_nonce) != NONCE_BYTES:
            raise WireError("this worker has no cluster key" if not self._key else "a nonce has 16 bytes")
        nonce = os.urandom(NONCE_BYTES)
        self._open[nonce] = router_nonce
        while len(self._open) > MAX_CHALLENGES:
            self._open.popitem(last=False)
        proof = _worker_proof(self._key, router_nonce, nonce, self._name)
        return _ANSWER.pack(nonce, self._name.incarnation, proof) + self._name.worker_id.encode()

    def admit(self, method: str, shown: bytes) -> StreamSeals | None:
        """The seals of a call with these credentials; None for a stranger's, or one that was heard before."""
        if not self._key:
            return open_seals(b"", b"", b"")
        if len(shown) != CALL_BYTES:
            return None
        router_nonce, nonce, proof = _CALL.unpack(shown)
        expected = self._open.get(nonce)
        if expected != router_nonce or not hmac.compare_digest(
            proof, _call_proof(self._key, method, router_nonce, nonce)
        ):
            return None
        del self._open[nonce]
        return open_seals(self._key, router_nonce, nonce)


def prove(key: bytes, method: str, router_nonce: bytes, answer: bytes) -> tuple[WorkerName, bytes, StreamSeals]:
    """The router's side: who answered the challenge, the credentials of one call, and its seals.

    Raises WireError where the answer is not that of a worker which knows the key.
    """
    if len(answer) < _ANSWER.size:
        raise WireError("the answer to a challenge is cut short")
    nonce, incarnation, proof = _ANSWER.unpack_from(answer)
    name = WorkerName(answer[_ANSWER.size :].decode(errors="replace"), incarnation)
    if not hmac.compare_digest(proof, _worker_proof(key, router_nonce, nonce, name)):
        raise WireError("wrong cluster key")
    shown = _CALL.pack(router_nonce, nonce, _call_proof(key, method, router_nonce, nonce))
    return name, shown, open_seals(key, router_nonce, nonce)


def _worker_proof(key: bytes, router_nonce: bytes, nonce: bytes, name: WorkerName) -> bytes:
    said = name.incarnation.to_bytes(8, "little") + name.worker_id.encode()
    return hmac.digest(key, b"penstock worker" + router_nonce + nonce + said, "sha256")


def _call_proof(key: bytes, method: str, router_nonce: bytes, nonce: bytes) -> bytes:
    return hmac.digest(key, b"penstock call" + router_nonce + nonce + method.encode(), "sha256")
