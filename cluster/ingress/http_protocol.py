"""uvicorn's httptools protocol with the bounds it lacks: on the bytes and the time of a request's head.

`listener.py` gives it to uvicorn. Bodies are bounded by `exchange.py`; here it is about callers who never get that
far: endless headers, headers that come a byte a minute, connections that say nothing, and bytes that are not HTTP.
They are answered in JSON like everything else.

Offers to upgrade (some clients open with one to HTTP/2) are passed over, as RFC 9110 allows: the parser takes what
follows such a head for another protocol, so the head is parsed anew without the offer. Trailers are dropped: the
application has judged the headers by then. Answers to HTTP/1.0, which knows no chunks, end with the connection.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.settings import LimitSettings

_OF_UPGRADES = {b"upgrade", b"http2-settings", b"connection"}


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Invariants: a timer runs while a head is awaited or incomplete, on a connection's first request
    from its beginning, on later ones from their first byte, and while a body still comes that was answered already;
    what comes between two heads and is no body (trailers, extensions of chunks) is bounded like a head."""

    limits = LimitSettings()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._in_head = True
        self._head_bytes = 0  # received since the last complete head or piece of a body
        self._pieces = 0  # complete heads and pieces of bodies
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head and self._timer is None:
            self._start_timer()
        pieces = self._pieces
        self._unset_keepalive_if_required()
        self._parse(data)
        if pieces == self._pieces and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_header_bytes:
                self._refuse(431, "the request's headers are too large")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head = False
        self._head_bytes = 0
        self._pieces += 1
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        self._pieces += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_head = True
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._in_head and self._timer is None:
            self._start_timer()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _without_chunks(app, cycle) if old else app)

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            method = self.parser.get_method()
            if method == b"CONNECT":
                self._refuse(400, "this is no proxy")
                return
            plain = [b"%s: %s\r\n" % field for field in self.headers if field[0] not in _OF_UPGRADES]
            version = self.parser.get_http_version().encode()
            self.parser = httptools.HttpRequestParser(self)
            head = b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(plain))
            self._parse(head + data[offer.args[0] :])
        except httptools.HttpParserError:
            self._refuse(400, "this is not HTTP that the server understands")

    def _refuse(self, status: int, message: str) -> None:
        problem = HttpProblem(status, "invalid_request_error", message, code="invalid_http")
        body = problem.body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        # An answer that is under way on this connection would be corrupted by another.
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.limits.body_timeout_s, self._timed_out)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timed_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes:
            self._refuse(408, "the headers did not arrive in time")
        else:
            self.transport.close()


def _without_chunks(app: Any, cycle: RequestResponseCycle) -> Any:
    """The application, whose answers without a length are written as they are; uvicorn would cut them into chunks."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        streams = False

        async def unframed(message: Any) -> None:
            nonlocal streams
            if message["type"] == "http.response.start":
                streams = all(name != b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = False if streams else None
            elif streams:
                cycle.expected_content_length = len(message["body"])
            await send(message)

        await app(scope, receive, unframed)

    return answer


def guarded_protocol(limits: LimitSettings) -> type[HttpToolsProtocol]:
    """The protocol class of one server."""
    return type("LimitedProtocol", (GuardedProtocol,), {"limits": limits})
