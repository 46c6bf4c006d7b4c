"""gRPC carriage of wire messages: one bidirectional stream per (router, worker) pair, and a unary status call.

`service.py` serves with `RpcServer`; `cluster/links.py` calls with `WorkerClient`. Both run on an asyncio loop; no
protobuf, the payload is `wire.py`'s bytes, each sealed (`call_seal.py`). Knows when a peer is gone (reset, or no answer
to a ping) and who may call (cluster key), not what messages mean.

Client:

    client = WorkerClient("127.0.0.1:7001", cluster_key)
    stream = await client.attach(Hello(...))       # RefusedError: WORKER_LOST or INCOMPATIBLE
    stream.send(Generate(...))                     # never waits
    async for message in stream: ...               # ends with RefusedError(WORKER_LOST), or quietly after close()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from penstock.workers.call_seal import (
    MAC_BYTES,
    NONCE_BYTES,
    UNNAMED,
    CallGate,
    StreamSeals,
    WorkerName,
    open_seals,
    prove,
)
from penstock.workers.errors import ConfigError, RefusedError, WireError
from penstock.workers.protocol import (
    WIRE_VERSION,
    FailureCode,
    Hello,
    ToRouter,
    ToWorker,
    Welcome,
)
from penstock.workers.tls import PeerTls
from penstock.workers.wire import MAX_MESSAGE_BYTES, decode_to_router, decode_to_worker, encode

log = logging.getLogger(__name__)

_SERVICE = "penstock.Worker"
_ATTACH = f"/{_SERVICE}/Attach"
_STATUS = f"/{_SERVICE}/Status"
_AUDIT = f"/{_SERVICE}/Audit"
_CHALLENGE = f"/{_SERVICE}/Challenge"
_PROOF_HEADER = "penstock-proof-bin"  # metadata key; its value is bytes
_MAX_UNSENT_BYTES = 4 * MAX_MESSAGE_BYTES
_MAX_CALLS = 1024  # streams and status calls at once, per worker
_HEAR_OUT_S = 1.0  # for a caller that is refused to say its first words
_PING_EVERY_MS = 2000  # a peer that answers no ping for as long again is gone
_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES + MAC_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES + MAC_BYTES),
    ("grpc.keepalive_time_ms", _PING_EVERY_MS),
    ("grpc.keepalive_timeout_ms", _PING_EVERY_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS = [*_OPTIONS, ("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 500)]
_CLIENT_OPTIONS = [
    *_OPTIONS,
    ("grpc.enable_http_proxy", 0),  # workers are addressed directly, whatever the environment says
    ("grpc.use_local_subchannel_pool", 1),  # a new client starts without another one's connection back-off
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # also the time a connection may take; refused ones are tried sooner
    ("grpc.max_reconnect_backoff_ms", 1000),
]
_EOF: object = grpc.aio.EOF  # type: ignore[attr-defined]  # grpc-stubs does not know it
# Asking again in the same words does not help; INVALID_ARGUMENT is how a worker answers bytes it cannot read.
_LASTING = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
)


# --- server -------------------------------------------------------------------------------------------------------


class Conversation:
    """The worker's end of one attached stream."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes], seals: StreamSeals) -> None:
        self._context = context
        self._seals = seals
        self.peer = context.peer()

    async def read(self) -> ToWorker | None:
        """The next message; `None` once the router has closed its side. Raises WireError."""
        data = await self._context.read()
        return None if data is _EOF else decode_to_worker(self._seals.to_worker.open(data))

    async def write(self, data: bytes) -> None:
        """Send encoded bytes; waits while the reader's window is full."""
        await self._context.write(self._seals.to_router.seal(data))


class RpcServer:
    """Listens for routers. `on_attach` runs once per stream: reads its hello, ends it by returning or RefusedError."""

    def __init__(
        self,
        on_attach: Callable[[Conversation], Awaitable[None]],
        on_status: Callable[[], dict[str, Any]],
        cluster_key: str = "",
        name: WorkerName = UNNAMED,
        on_audit: Callable[[int], Awaitable[dict[str, Any]]] | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        self._tls = tls
        self._on_audit = on_audit
        self._on_attach = on_attach
        self._on_status = on_status
        self._gate = CallGate(cluster_key.encode(), name)
        self._server: grpc.aio.Server | None = None

    async def start(self, host: str, port: int) -> str:
        """Bind and serve; the address with the port really taken. Raises ConfigError when it is not free."""
        server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
        handlers = {
            "Attach": grpc.stream_stream_rpc_method_handler(self._attach),
            "Status": grpc.unary_unary_rpc_method_handler(self._status),
            "Challenge": grpc.unary_unary_rpc_method_handler(self._challenge),
            "Audit": grpc.unary_unary_rpc_method_handler(self._audit),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))
        try:
            bound = _add_port(server, f"{host}:{port}", self._tls)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}", "port") from error
        await server.start()
        self._server = server
        return f"{host}:{bound}"

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no new streams; the open ones are cut after `grace_s`."""
        if self._server is not None:
            await self._server.stop(grace_s)

    async def _attach(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        seals = await self._authenticate(context, _ATTACH)
        try:
            await self._on_attach(Conversation(context, seals))
        except RefusedError as error:
            lasting = error.code is FailureCode.INCOMPATIBLE
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION if lasting else grpc.StatusCode.ABORTED, str(error))
        except WireError as error:
            log.warning("router at %s sent bytes that are no message: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _status(self, _: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await self._authenticate(context, _STATUS)
        return json.dumps(self._on_status()).encode()

    async def _audit(self, ended_after: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await self._authenticate(context, _AUDIT)
        if self._on_audit is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker gives no account")
        try:
            after = int(ended_after or b"0")
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a number of ended attempts")
        try:
            return json.dumps(await self._on_audit(after)).encode()
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine does not answer")

    async def _challenge(self, nonce: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            return self._gate.challenge(nonce)
        except WireError as error:
            return await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def _authenticate(self, context: grpc.aio.ServicerContext[bytes, bytes], method: str) -> StreamSeals:
        shown = {str(key): value for key, value in context.invocation_metadata() or ()}.get(_PROOF_HEADER, b"")
        seals = self._gate.admit(method, shown if isinstance(shown, bytes) else shown.encode())
        if seals is None:
            log.warning("refused a caller at %s: wrong cluster key, or a call that was heard before", context.peer())
            if method == _ATTACH:
                await _hear_out(context)
            return await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong cluster key")
        return seals


async def _hear_out(context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    """Who is refused while still sending is told by grpc only that something broke: let the first message come in."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(context.read(), _HEAR_OUT_S)


# --- client -------------------------------------------------------------------------------------------------------


class WorkerClient:
    """One worker as seen from a router's process; must be used on one asyncio loop."""

    def __init__(
        self,
        address: str,
        cluster_key: str = "",
        expected: WorkerName | None = None,
        tls: PeerTls | None = None,
    ) -> None:
        """`expected`: who must answer there, where there is a key to prove it by; None: any worker of the cluster."""
        self.address = address
        self._key = cluster_key.encode()
        self._expected = expected
        self._channel = _open_channel(address, tls)
        self._attach = self._channel.stream_stream(_ATTACH, bytes, bytes)
        self._unary = {method: self._channel.unary_unary(method, bytes, bytes) for method in (_STATUS, _AUDIT)}
        self._challenge = self._channel.unary_unary(_CHALLENGE, bytes, bytes)

    async def attach(self, hello: Hello, timeout_s: float = 10.0, version: int = WIRE_VERSION) -> AttachedStream:
        """Open the stream and say hello. RefusedError: INCOMPATIBLE (key, version, epoch) or WORKER_LOST.

        `version`: of the wire, in which everything is said.
        """
        shown, seals = await self._prove(_ATTACH, timeout_s)
        stream = AttachedStream(self._attach(None, metadata=shown), self.address, seals, version)
        stream.send(hello)
        try:
            async with asyncio.timeout(timeout_s):
                welcome = await stream.read()
        except TimeoutError:
            await stream.close()
            raise RefusedError(FailureCode.WORKER_LOST, f"worker at {self.address}: no welcome") from None
        except (RefusedError, WireError, asyncio.CancelledError):
            await stream.close()
            raise
        if not isinstance(welcome, Welcome):
            await stream.close()
            raise WireError(f"worker at {self.address} began with {type(welcome).__name__} instead of Welcome")
        stream.welcome = welcome
        return stream

    async def status(self, timeout_s: float = 2.0) -> dict[str, Any]:
        """What the worker says about itself, as plain JSON values. RefusedError when it does not answer."""
        return await self._ask(_STATUS, timeout_s)

    async def audit(self, ended_after: int = 0, timeout_s: float = 10.0) -> dict[str, Any]:
        """Its account (`audit.WorkerAudit.from_plain`), with a page of the attempts that ended after the first
        `ended_after` ones. RefusedError when it does not answer.
        """
        return await self._ask(_AUDIT, timeout_s, b"%d" % ended_after)

    async def _ask(self, method: str, timeout_s: float, what: bytes = b"") -> dict[str, Any]:
        shown, _ = await self._prove(method, timeout_s)
        try:
            data = await self._unary[method](what, timeout=timeout_s, metadata=shown)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error.code(), error.details(), self.address) from error
        return dict(json.loads(data))

    async def close(self) -> None:
        """Drop the connection and every stream on it."""
        await self._channel.close(None)

    async def _prove(self, method: str, timeout_s: float) -> tuple[tuple[tuple[str, bytes], ...], StreamSeals]:
        """Credentials of one call and the seals of its stream. Raises RefusedError."""
        if not self._key:
            return (), open_seals(b"", b"", b"")
        nonce = os.urandom(NONCE_BYTES)
        try:
            answer = await self._challenge(nonce, timeout=timeout_s)
            name, shown, seals = prove(self._key, method, nonce, answer)
        except grpc.aio.AioRpcError as error:
            raise _refusal(error.code(), error.details(), self.address) from error
        except WireError as error:
            raise RefusedError(FailureCode.INCOMPATIBLE, f"worker at {self.address}: {error}") from error
        if self._expected is not None and name != self._expected:
            reason = f"worker at {self.address} is {name.worker_id}, incarnation {name.incarnation}, not the one asked"
            raise RefusedError(FailureCode.WORKER_LOST, reason)
        return ((_PROOF_HEADER, shown),), seals


class AttachedStream:
    """The router's end of one stream: `send` never waits, iteration gives what the worker says.

    The end is told once, by the iteration: RefusedError(WORKER_LOST) when the worker or the connection went away,
    StopAsyncIteration after a local `close`.
    """

    def __init__(
        self, call: grpc.aio.StreamStreamCall[bytes, bytes], address: str, seals: StreamSeals, version: int
    ) -> None:
        self.welcome: Welcome
        self.address = address
        self._seals = seals
        self._version = version  # of the wire, as said hello in
        self._call = call
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._wake = asyncio.Event()
        self._closed = False
        self._writer = asyncio.create_task(self._write())

    @property
    def closed(self) -> bool:
        """Nothing more can be sent."""
        return self._closed or self._call.done()

    def send(self, message: ToWorker) -> bool:
        """Queue a message. False when the stream is over: its end is told by the iteration, so ignore it freely.

        A worker that stops reading is cut off once 256 MB wait for it. Raises WireError for an oversize message.
        """
        if self.closed:
            return False
        data = encode(message, self._version)
        if self._unsent_bytes + len(data) > _MAX_UNSENT_BYTES:
            log.warning("worker at %s does not read; cutting its stream", self.address)
            self._call.cancel()
            return False
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        self._wake.set()
        return True

    async def read(self) -> ToRouter | None:
        """The next message; `None` after a local `close`. RefusedError when the worker is gone, WireError."""
        data: object
        try:
            data = await self._call.read()
        except grpc.aio.AioRpcError as error:
            if self._closed:
                return None
            raise _refusal(error.code(), error.details(), self.address) from error
        except asyncio.CancelledError:
            if self._call.cancelled():  # by close(), or by send() above: the task itself goes on
                data = _EOF
            else:
                raise
        if isinstance(data, bytes):
            return decode_to_router(self._seals.to_router.open(data))
        if self._closed:
            return None
        raise RefusedError(FailureCode.WORKER_LOST, f"worker at {self.address} closed the stream")

    async def __aiter__(self) -> AsyncIterator[ToRouter]:
        while (message := await self.read()) is not None:
            yield message

    async def close(self) -> None:
        """Cut the stream; the worker ends everything that ran for it."""
        self._closed = True
        self._call.cancel()
        self._wake.set()
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)

    async def _write(self) -> None:
        try:
            while not self._closed:
                while self._unsent:
                    data = self._unsent.popleft()
                    self._unsent_bytes -= len(data)
                    await self._call.write(self._seals.to_worker.seal(data))
                self._wake.clear()
                await self._wake.wait()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            self._unsent.clear()  # the reading side tells the end


def _open_channel(address: str, tls: PeerTls | None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
    options = [*_CLIENT_OPTIONS, ("grpc.ssl_target_name_override", tls.name)]
    credentials = grpc.ssl_channel_credentials(tls.authorities, tls.pair.key, tls.pair.certificate)
    return grpc.aio.secure_channel(address, credentials, options=options)


def _add_port(server: grpc.aio.Server, where: str, tls: PeerTls | None) -> int:
    if tls is None:
        return server.add_insecure_port(where)
    pairs = [(tls.pair.key, tls.pair.certificate)]
    credentials = grpc.ssl_server_credentials(pairs, tls.authorities, require_client_auth=True)
    return server.add_secure_port(where, credentials)


def _refusal(code: grpc.StatusCode, details: str | None, address: str) -> RefusedError:
    failure = FailureCode.INCOMPATIBLE if code in _LASTING else FailureCode.WORKER_LOST
    return RefusedError(failure, f"worker at {address}: {code.name.lower()}: {details or 'no details'}")
