"""One HTTP request and its answer over ASGI: bounded reading, writing, and noticing that the caller has left.

Used by `app.py` and its endpoints only. Knows HTTP and limits, not what the bodies mean.

Invariants: at most one answer starts; a stream either ends with its last chunk or is left unfinished on purpose, in
which case the server closes the connection and the client sees a broken transport, never a silent end.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import suppress
from typing import Any

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.settings import LimitSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = b"application/json"
LINGER_S = 2.0
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Disconnected(Exception):  # noqa: N818 - an event
    """The caller closed the connection."""


class SlowReader(Disconnected):
    """The caller has taken nothing for too long while its buffer was full."""


class Exchange:
    """State of one request and its answer."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, limits: LimitSettings) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._version: str = scope["http_version"]
        self.status = 0  # of the answer, once it has started
        self._receive = receive
        self._send = send
        self._limits = limits
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.id = secrets.token_hex(16)  # ours; the caller's own is only echoed
        self.extra: list[tuple[bytes, bytes]] = []  # headers to go with the answer, whatever it is
        self._identity = [(b"x-request-id", self.id.encode()), (b"x-penstock-request-id", self.id.encode())]
        self._writing = asyncio.Lock()
        self._write_began: float | None = None
        self._left: type[Disconnected] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def headers(self, name: bytes) -> list[bytes]:
        """All values of one header (lower-case name)."""
        return [value for key, value in self._headers if key.lower() == name]

    def single(self, name: bytes) -> str:
        """The value of a header that was sent once, in ASCII; empty otherwise."""
        values = self.headers(name)
        return values[0].decode() if len(values) == 1 and values[0].isascii() else ""

    def asks(self, name: bytes, value: bytes) -> bool:
        """True where a header was sent with this value."""
        return value in self.headers(name)

    def check_headers(self) -> None:
        """Refuse header floods and ambiguous framing; a harmless request id of the caller's goes into the answer."""
        size = sum(len(name) + len(value) for name, value in self._headers)
        if len(self._headers) > self._limits.max_headers or size > self._limits.max_header_bytes:
            raise _refused(431, "the request's headers are too large", "headers_too_large")
        coded = self.headers(b"transfer-encoding")
        if coded and self.headers(b"content-length"):
            raise _refused(400, "both Content-Length and Transfer-Encoding", "invalid_http")
        if coded and [value.strip().lower() for value in coded] != [b"chunked"]:
            raise _refused(400, "the only Transfer-Encoding is chunked", "invalid_http")
        hosts = self.headers(b"host")
        if len(hosts) > 1 or (not hosts and self._version == "1.1"):
            raise _refused(400, "more than one Host" if hosts else "no Host", "invalid_http")
        stated = self.headers(b"x-request-id")
        if len(stated) == 1 and _REQUEST_ID.match(stated[0]):
            self._identity[0] = (b"x-request-id", stated[0])

    @property
    def request_id(self) -> str:
        """As answered in `x-request-id`: the caller's, where it is harmless, else ours."""
        return self._identity[0][1].decode()

    async def read_body(self) -> bytes:
        """The whole JSON body, within its limits of type, size and time."""
        kinds = self.headers(b"content-type")
        if len(kinds) != 1 or kinds[0].split(b";")[0].strip().lower() != JSON:
            raise _refused(415, "Content-Type must be application/json", "unsupported_media_type", close=False)
        if any(value.strip().lower() != b"identity" for value in self.headers(b"content-encoding")):
            raise _refused(415, "Content-Encoding is not supported", "unsupported_media_type", close=False)
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                body = await self._collect()
        except TimeoutError:
            late = "the body did not arrive in time"
            raise HttpProblem(408, "timeout", late, code="timeout", may_retry=False, close=True) from None
        if body is not None:
            return body
        if not self.headers(b"expect"):  # who waits for a 100 has sent nothing yet
            await self._discard()
        raise HttpProblem(
            413,
            "request_too_large",
            f"the body is larger than {self._limits.max_body_bytes} bytes",
            code="request_too_large",
            may_retry=False,
            close=True,
        )

    async def _collect(self) -> bytes | None:
        """The body; None as soon as it is, or says that it will be, too large."""
        for value in self.headers(b"content-length"):
            if not value.isdigit() or len(value) > 18 or int(value) > self._limits.max_body_bytes:
                return None
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            piece = message.get("body", b"")
            size += len(piece)
            if size > self._limits.max_body_bytes:
                return None
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)

    async def _discard(self) -> None:
        """Let a caller who is still sending get our answer: closing at once would reset the connection under it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await self._receive()).get("more_body", False):
                    continue

    async def respond(
        self, status: int, body: bytes, kind: bytes = JSON, extra: list[tuple[bytes, bytes]] | None = None
    ) -> None:
        """A whole answer."""
        self.status = status
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *self._identity]
        headers += [*self.extra, *(extra or ())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"" if self.method == "HEAD" else body})

    async def refuse(self, problem: HttpProblem) -> None:
        """An error answer, or, when the stream has begun, its last event before the connection breaks."""
        if not self.status:
            await self.respond(problem.status, problem.body(), extra=problem.headers())
        else:
            await self.write(b"data: " + problem.body() + b"\n\n")

    async def write(self, events: bytes) -> None:
        """A piece of the stream; the first one sends the headers. Waits while the caller's buffer is full."""
        async with self._writing:
            self._write_began = time.monotonic()
            if not self.status:
                self.status = 200
                headers = [*_STREAM_HEADERS, *self._identity, *self.extra]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
            self._write_began = None

    async def run_while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` to its end, or cancel it and raise Disconnected once the caller leaves or stops reading.

        Call it after the body has been read.
        """
        task = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(self._until_disconnect())
        # A failure to receive means the same as leaving: nobody is there any more.
        leaving.add_done_callback(lambda done: None if done.cancelled() else self._leave(task))
        self._watch_writes(task)
        try:
            await task
        except asyncio.CancelledError:
            if self._left is not None:
                raise self._left from None
            raise
        finally:
            if self._timer is not None:
                self._timer.cancel()
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)

    async def _until_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            continue

    def _leave(self, task: asyncio.Future[None], how: type[Disconnected] = Disconnected) -> None:
        if not task.done():
            self._left = how
        task.cancel()

    def _watch_writes(self, task: asyncio.Future[None]) -> None:
        """One timer for many writes: a deadline around each would cost more than the write itself."""
        began = self._write_began
        if task.done():
            return
        if began is not None and time.monotonic() - began > self._limits.write_timeout_s:
            self._leave(task, SlowReader)
        else:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._limits.write_timeout_s / 2, self._watch_writes, task)

    async def end_stream(self) -> None:
        """The proper end of a stream."""
        await self._send({"type": "http.response.body", "body": b""})


def _refused(status: int, message: str, code: str, close: bool = True) -> HttpProblem:
    return HttpProblem(status, "invalid_request_error", message, code=code, close=close)
