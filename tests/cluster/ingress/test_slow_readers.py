"""Callers who do not read what they asked for: cut off by rule, bounded in number, and unnoticed by others."""

from __future__ import annotations

import json
import socket
import time

import pytest
from fakes.http_server import HttpServer
from fakes.oracle_app import Canary, OracleApp

from penstock.cluster.ingress.listener import SEND_BUFFER_BYTES
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec

LIMITS = LimitSettings(write_timeout_s=1.0, max_open_requests=12)
HOG = KeyEntry("hog", key_digest("sk-hog"), tenant="hog")
READERS = LIMITS.max_open_requests // 2
BODY = {"model": "tiny", "prompt": [7] * 40, "max_tokens": 400, "n": 8, "logprobs": 20, "stream": True}
COUNT = "penstock_slow_readers_total"


def open_stream(server: HttpServer) -> socket.socket:
    """A caller who has asked for megabytes and does not read, with next to no buffer of its own."""
    body = json.dumps(BODY | {"ignore_eos": True, "temperature": 0}).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\nauthorization: Bearer sk-hog"
    )
    connection.sendall(f"{head}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def slow_readers(server: HttpServer) -> float:
    _, _, page = server.request("GET", "/metrics", headers={"authorization": "Bearer k-1"})
    lines = [line for line in page.decode().splitlines() if line.startswith(COUNT + "{")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


@pytest.mark.timeout(90)
def test_streams_that_nobody_reads_are_cut_and_disturb_nobody(codec: TextCodec) -> None:
    app = OracleApp(codec, api_key="k-1", keys=(HOG,), limits=LIMITS)
    with HttpServer(app, graceful=True, send_buffer_bytes=SEND_BUFFER_BYTES) as server:
        canary = Canary(server.url, "k-1")
        canary.start()
        canary.sang()
        readers = [open_stream(server) for _ in range(READERS)]
        try:
            time.sleep(0.3)
            refused = [server.request("POST", "/v1/completions", json.dumps(BODY).encode(), hog_headers())
                       for _ in range(20)]  # fmt: skip
            assert {status for status, _, _ in refused} == {429}, "half of what the process serves is for others"
            assert json.loads(refused[0][2])["error"]["code"] == "concurrency_limit"
            deadline = time.monotonic() + 40
            while slow_readers(server) < READERS and time.monotonic() < deadline:
                readers[0].recv(1)  # so slow a reader is none
                time.sleep(0.1)
            assert slow_readers(server) == READERS
            canary.sang()
        finally:
            for reader in readers:
                reader.close()
        canary.end()
        deadline = time.monotonic() + 10
        while not app.idle and time.monotonic() < deadline:
            time.sleep(0.05)
        assert app.idle, "what they asked for is still computed, or holds blocks"


def hog_headers() -> dict[str, str]:
    return {"content-type": "application/json", "authorization": "Bearer sk-hog"}
