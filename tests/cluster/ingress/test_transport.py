"""Bad transport over real sockets: what comes before a body is read, and bodies that are no request.

Rows 1 to 24 of the list of bad inputs, against the protocol that production listens with and against uvicorn's h11.
A canary streams beside it all.
"""

from __future__ import annotations

import gzip
import json
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from fakes.http_server import HttpServer
from fakes.oracle_app import Canary, OracleApp

from penstock.cluster.ingress.http_protocol import guarded_protocol
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec

pytestmark = pytest.mark.timeout(60)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEY = "k-123"
JSON = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
LIMITS = LimitSettings(max_body_bytes=2_000_000, body_timeout_s=1.5)


@pytest.fixture(scope="module", params=["ours", "h11"])
def server(request: pytest.FixtureRequest, codec: TextCodec) -> Iterator[HttpServer]:
    http = guarded_protocol(LIMITS) if request.param == "ours" else "h11"
    with HttpServer(OracleApp(codec, api_key=KEY, limits=LIMITS), http, graceful=True) as running:
        yield running


@pytest.fixture(scope="module")
def canary(server: HttpServer) -> Iterator[Canary]:
    thread = Canary(server.url, KEY)
    thread.start()
    thread.sang()
    yield thread
    if thread.is_alive():
        thread.sang()
    thread.end()


def ours(server: HttpServer) -> bool:
    return not isinstance(server.http, str)


def error_of(body: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


GOOD = b'{"prompt":"x","max_tokens":1}'
BODIES: list[tuple[str, bytes, dict[str, str], int]] = [
    ("1: empty body", b"", {}, 400),
    ("2: not JSON", b"prompt=x", {}, 400),
    ("2: two objects", GOOD + GOOD, {}, 400),
    ("2: a byte order mark", b"\xef\xbb\xbf" + GOOD, {}, 400),
    ("2: UTF-16", GOOD.decode().encode("utf-16"), {}, 400),
    ("2: a raw newline in a string", b'{"prompt":"a\nb"}', {}, 400),
    ("3: array at top", b"[1]", {}, 400),
    ("3: number at top", b"7", {}, 400),
    ("3: null at top", b"null", {}, 400),
    ("3: string at top", b'"x"', {}, 400),
    ("4: deep nesting", b'{"prompt":' + b"[" * 100_000, {}, 400),
    ("4: deep nesting, closed", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, 400),
    ("4: just too deep for later", b'{"prompt":"x","metadata":' + b"[" * 900 + b"]" * 900 + b"}", {}, 400),
    ("4: deep objects", b'{"prompt":"x","user":' + b'{"a":' * 80 + b"1" + b"}" * 80 + b"}", {}, 400),
    ("6: invalid UTF-8", b'{"prompt":"\xff\xfe"}', {}, 400),
    ("6: lone surrogate", b'{"prompt":"\\ud800"}', {}, 400),
    ("6: reversed surrogates", b'{"prompt":"\\udc00\\ud800"}', {}, 400),
    ("6: lone surrogate in a name", b'{"prompt":"x","\\udfff":1}', {}, 400),
    ("6: lone surrogate in UTF-8", b'{"prompt":"\xed\xa0\x80"}', {}, 400),
    ("41: NaN", b'{"prompt":"x","temperature":NaN}', {}, 400),
    ("41: -Infinity", b'{"prompt":"x","top_p":-Infinity}', {}, 400),
    ("41: 1e400", b'{"prompt":"x","temperature":1e400}', {}, 400),
    ("54: number of 5,000 digits", b'{"prompt":"x","seed":' + b"9" * 5000 + b"}", {}, 400),
    ("a name twice", b'{"prompt":"x","max_tokens":1,"max_tokens":100}', {}, 400),
    ("a name twice, deeper", b'{"prompt":"x","logit_bias":{"5":1,"5":2}}', {}, 400),
    ("8: too large", b'{"prompt":"' + b"x" * 2_100_000 + b'"}', {}, 413),
    ("11: gzip", gzip.compress(b"{" * 1000), {"content-encoding": "gzip"}, 415),
    ("11: gzip and identity", GOOD, {"content-encoding": "identity, gzip"}, 415),
    ("13: text/plain", GOOD, {"content-type": "text/plain"}, 415),
    ("13: form", b"prompt=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
    ("13: multipart", GOOD, {"content-type": "multipart/form-data; boundary=x"}, 415),
    ("13: JSON in another name", GOOD, {"content-type": "application/json-patch+json"}, 415),
    ("13: no type", GOOD, {"content-type": ""}, 415),
    ("19: no key", GOOD, {"authorization": ""}, 401),
    ("19: wrong key", GOOD, {"authorization": "Bearer nope"}, 401),
    ("19: key and more", GOOD, {"authorization": f"Bearer {KEY}x"}, 401),
    ("19: half a key", GOOD, {"authorization": f"Bearer {KEY[:-1]}"}, 401),
    ("19: no scheme", GOOD, {"authorization": KEY}, 401),
    ("19: lower-case scheme", GOOD, {"authorization": f"bearer {KEY}"}, 401),
    ("19: basic", GOOD, {"authorization": "Basic azp2"}, 401),
    ("12: one header of 100 kB", GOOD, {"x-big": "y" * 100_000}, 431),
    ("12: 300 headers", GOOD, {f"x-{i}": "y" for i in range(300)}, 431),
]


@pytest.mark.parametrize(("body", "headers", "status"), [row[1:] for row in BODIES], ids=[row[0] for row in BODIES])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_bodies_and_headers(
    server: HttpServer, canary: Canary, path: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    if status == 431 and not ours(server):
        pytest.skip("uvicorn's h11 answers header floods itself, with 400")
    answered, found, answer = server.request("POST", path, body, {**JSON, **headers})
    assert answered == status
    assert found["content-type"] == "application/json"
    error_of(answer)
    canary.check()


def whole(answer: bytes) -> bool:
    """True once one answer with a stated length is there."""
    head, end, body = answer.partition(b"\r\n\r\n")
    stated = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
    return bool(end) and stated.isdigit() and len(body) >= int(stated)


def raw(server: HttpServer, data: bytes, wait_s: float = 4.0, one: bool = False) -> bytes:
    """Send bytes, read until the server closes or `wait_s` has passed; `one`: or one answer is there."""
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait_s) as connection:
        with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            connection.sendall(data)
        with suppress(TimeoutError, ConnectionResetError):
            while not (one and whole(received)) and (piece := connection.recv(65536)):
                received += piece
    return received


def status_of(received: bytes) -> int:
    return int(received.split(b" ", 2)[1]) if received else 0


HEAD = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\n"
).encode()
LENGTH = b"content-length: %d\r\n\r\n" % len(GOOD)
CLOSE = b"connection: close\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
FLOOD = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
RAW: list[tuple[str, bytes, set[int]]] = [
    ("8: a large length, nothing sent", HEAD + b"content-length: 99999999999\r\n\r\n", {413}),
    ("8: a length of 400 digits", HEAD + b"content-length: " + b"9" * 400 + b"\r\n\r\n", {400, 413}),
    ("8: a negative length", HEAD + b"content-length: -5\r\n\r\n", {400}),
    ("8: a length in hex", HEAD + b"content-length: 0x5\r\n\r\n", {400}),
    ("8: two lengths", HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}{}{}", {400}),
    ("8: a length of 2^63", HEAD + b"content-length: 9223372036854775808\r\n\r\n", {413}),
    ("8: a length with a sign", HEAD + b"content-length: +29\r\n\r\n" + GOOD, {400}),
    ("9: endless tiny chunks", HEAD + CHUNKED + b"1\r\nx\r\n" * 10, {408}),
    ("9: endless large chunks", HEAD + CHUNKED + FLOOD * 3, {413}),
    ("9: a chunk size of 40 digits", HEAD + CHUNKED + b"f" * 40 + b"\r\n", {400, 413, 408}),
    ("9: a negative chunk size", HEAD + CHUNKED + b"-1\r\nx", {400, 0}),
    ("9: a chunk longer than it says", HEAD + CHUNKED + b"5\r\n" + GOOD + b"\r\n0\r\n\r\n", {400, 0}),
    ("9: a bad chunk size", HEAD + CHUNKED + b"zz\r\n", {400, 0}),
    ("18: length and chunks", HEAD + b"content-length: 4\r\n" + CHUNKED + b"0\r\n\r\n", {400}),
    ("18: chunks and length", HEAD + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n", {400}),
    ("18: chunked twice", HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n", {400, 501}),
    ("18: gzip in chunks", HEAD + b"transfer-encoding: gzip, " + CHUNKED[19:] + b"2\r\n{}\r\n0\r\n\r\n", {400, 501}),
    ("18: chunked behind a vertical tab", HEAD + b"transfer-encoding:\x0bchunked\r\n\r\n1d\r\n", {400, 501}),
    ("16: no host", HEAD.replace(b"host: x\r\n", b"") + LENGTH + GOOD, {400}),
    ("16: two hosts", HEAD + b"host: y\r\n" + LENGTH + GOOD, {400}),
    ("9: extensions of chunks without end", HEAD + CHUNKED + b"1;" + b"a" * 900_000, {431, 413, 408, 400, 0}),
    ("9: a trailer", HEAD + CLOSE + CHUNKED + b"1d\r\n" + GOOD + b"\r\n0\r\ncontent-type: x\r\n\r\n", {200}),
    ("18: folded header", HEAD + b"x-a: b\r\n c: d\r\n" + LENGTH + GOOD, {200, 400}),
    ("18: space before the colon", HEAD + b"content-length : 4\r\n\r\n{}{}", {400}),
    ("19: two keys", HEAD + b"authorization: Bearer x\r\n" + LENGTH + GOOD, {401}),
    ("19: the right key twice", HEAD + f"authorization: Bearer {KEY}\r\n".encode() + LENGTH + GOOD, {401}),
    ("19: two keys in one header", HEAD.replace(b"Bearer", b"Bearer x, Bearer") + LENGTH + GOOD, {401}),
    ("19: the scheme in capitals", HEAD.replace(b"Bearer", b"BEARER") + LENGTH + GOOD, {401}),
    ("19: the key as a cookie", HEAD.replace(b"authorization: ", b"cookie: authorization=") + LENGTH + GOOD, {401}),
    ("19: a key with bytes", HEAD.replace(KEY.encode(), b"\xff\xfe") + LENGTH + GOOD, {400, 401}),
    ("13: two content types", HEAD + b"content-type: text/plain\r\n" + LENGTH + GOOD, {415}),
    ("13: two content types in one", HEAD.replace(b"/json", b"/json, text/plain") + LENGTH + GOOD, {415}),
    ("21: NUL in a request id", HEAD + b"x-request-id: a\0b\r\n" + LENGTH + GOOD, {400}),
    ("12: a path of 1 MB", b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", {400, 414, 431}),
    ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", {400}),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 401}),
    ("HTTP/9.9", b"GET /nope HTTP/9.9\r\n\r\n", {400, 401, 505}),
    ("a method of 1 MB", b"G" * 1_000_000, {400, 431}),
    ("CONNECT", b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nhost: x\r\n\r\n", {400, 401, 404, 405}),
    ("an absolute target", b"GET http://other/v1/models HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n", {401, 404}),
    ("bytes in the path", b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n", {400, 401}),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), [row[1:] for row in RAW], ids=[row[0] for row in RAW])
def test_framing(server: HttpServer, canary: Canary, data: bytes, expected: set[int]) -> None:
    answer = raw(server, data, one=True)
    assert status_of(answer) in expected, answer[:300]
    if ours(server) and b"\r\n\r\n{" in answer and status_of(answer) >= 400:
        error_of(answer.split(b"\r\n\r\n", 1)[1])
    canary.check()


def test_endless_heads_are_cut_off(server: HttpServer, canary: Canary) -> None:
    """Row 12: a megabyte in one header, 10,000 headers, and headers without end."""
    if not ours(server):
        pytest.skip("h11 has its own bound")
    for head in (
        b"x-big: " + b"y" * 1_000_000,
        b"".join(b"x-%d: y\r\n" % i for i in range(10_000)),
        b"y: z\r\n" * 200_000,
    ):
        answer = raw(server, HEAD + head, one=True)
        assert status_of(answer) in {431, 0}  # 0: reset while we were still sending
    canary.sang()


def test_bodies_that_go_on_after_the_answer_are_cut_off(server: HttpServer, canary: Canary) -> None:
    """Row 9: who was refused before the body was read, or asked for something without one, cannot drip on for ever."""
    if not ours(server):
        pytest.skip("h11 has no such bound")
    endless = b"content-length: 1000000\r\n\r\n"
    for head in (HEAD.replace(KEY.encode(), b"nobody"), b"GET /health HTTP/1.1\r\nhost: x\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as connection:
            connection.sendall(head + endless)
            deadline, closed = time.monotonic() + 6, False
            while not closed and time.monotonic() < deadline:
                try:
                    connection.sendall(b"x")
                    closed = connection.recv(65536) == b""
                except TimeoutError:
                    continue
                except OSError:
                    closed = True
            assert closed
    canary.sang()


def test_answers_to_http_1_0_have_no_chunks(server: HttpServer) -> None:
    """Row 23: a stream's end is the connection's."""
    body = json.dumps({"prompt": "x", "max_tokens": 3, "stream": True}).encode()
    old = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"content-length: %d\r\n\r\n" % len(body) + body
    head, _, events = raw(server, old).partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"chunked" not in head.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")


def test_nobody_is_asked_to_send_what_is_too_large(server: HttpServer) -> None:
    """Row 8, with `Expect: 100-continue`."""
    answer = raw(server, HEAD + b"expect: 100-continue\r\ncontent-length: 99999999\r\n\r\n", one=True)
    assert status_of(answer) == 413
    assert raw(server, HEAD + CLOSE + b"expect: 100-continue\r\n" + LENGTH + GOOD).startswith(b"HTTP/1.1 100 ")


def test_slow_heads_are_cut_off(server: HttpServer, canary: Canary) -> None:
    """A connection that says nothing, and one that says too little, are closed after the time for a body."""
    if not ours(server):
        pytest.skip("h11 has no such bound")
    began = time.monotonic()
    assert raw(server, b"", 10.0) == b""
    assert status_of(raw(server, b"GET /health HTTP/1.1\r\nhos", 10.0)) == 408
    assert time.monotonic() - began < 9
    canary.sang()


def test_an_upgrade_to_http2_is_passed_over(server: HttpServer) -> None:
    """Some clients offer it with their first request; it must be answered as it stands."""
    offer = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    get = raw(server, b"GET /health HTTP/1.1\r\nhost: x\r\n" + offer + b"\r\n", one=True)
    assert status_of(get) == 200
    post = raw(server, HEAD + offer + LENGTH + GOOD, one=True)
    assert status_of(post) == 200


def test_keep_alive_after_an_error_and_pipelining(server: HttpServer) -> None:
    body = json.dumps({"prompt": [400]}).encode()
    bad = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answers = raw(server, bad + HEAD + LENGTH + GOOD + bad + last)
    assert answers.count(b"HTTP/1.1 400 ") == 2
    assert answers.count(b"HTTP/1.1 200 ") == 2
    assert answers.endswith(b'{"status":"ok"}')
    assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").endswith(b'{"status":"ok"}')


def test_large_bodies_do_not_count_as_heads(server: HttpServer) -> None:
    """Several on one connection, then a plain request."""
    body = json.dumps({"prompt": "x", "max_tokens": 1, "stop": ["a"], "odd": "y" * 500_000}).encode()
    large = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    answers = raw(server, large * 2 + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", 8.0)
    assert answers.count(b"HTTP/1.1 200 ") == 3


def test_request_ids(server: HttpServer) -> None:
    """Row 21: a caller's id is only repeated, and only where it is harmless; ours is always there."""
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    _, headers, answer = server.request("POST", COMPLETIONS, body, {**JSON, "x-request-id": "mine-1"})
    own = headers["x-penstock-request-id"]
    assert headers["x-request-id"] == "mine-1"
    assert json.loads(answer)["id"] == f"cmpl-{own}"
    for bad in ("x" * 10_000, "a b", "é", "a;b", "<x>"):
        _, headers, _ = server.request("POST", COMPLETIONS, body, {**JSON, "x-request-id": bad})
        assert headers["x-request-id"] == headers["x-penstock-request-id"] != own
        assert len(headers["x-request-id"]) == 32
    _, headers, _ = server.request("POST", COMPLETIONS, b"", {**JSON, "x-request-id": "mine-2"})
    assert headers["x-request-id"] == "mine-2"  # errors carry it too
    twice = raw(server, HEAD + CLOSE + b"x-request-id: a\r\nx-request-id: b\r\n" + LENGTH + GOOD)
    assert b"x-request-id: a\r\n" not in twice
    split = raw(server, HEAD + CLOSE + b"x-request-id: a\rset-cookie: b\r\n" + LENGTH + GOOD)
    assert b"set-cookie" not in split.lower()


def test_callers_who_leave_during_the_upload(
    server: HttpServer, canary: Canary, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 24, politely and by reset."""
    caplog.set_level("INFO", logger="penstock.access")
    for number in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    canary.sang()
    deadline, logged = time.monotonic() + 20, 0
    while logged < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
        logged = sum(getattr(record, "fields", {}).get("status") == 499 for record in caplog.records)
    assert logged == 20


def test_internal_headers_from_outside_change_nothing(server: HttpServer) -> None:
    """Row 22."""
    inside = {"x-tenant": "root", "x-priority": "9", "x-penstock-tenant": "root", "x-forwarded-for": "127.0.0.1"}
    body = json.dumps({"prompt": "x", "max_tokens": 1, "priority": 9, "tenant": "root"}).encode()
    status, headers, _ = server.request("POST", COMPLETIONS, body, {**JSON, **inside, "x-penstock-debug": "fields"})
    assert status == 200
    assert headers["x-penstock-ignored-fields"] == "tenant"
