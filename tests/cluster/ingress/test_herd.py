"""Rows 21 and 91 of the list of bad inputs: the same conversation very often at once, under one request id.

Shed by share, computed once, and unnoticed by others; where a key's share of the process ends is for
`test_slow_readers.py`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import httpx
import pytest
from fakes.http_server import HttpServer
from fakes.oracle_app import BLOCK, Canary, OracleApp

from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec

CALLERS = 150
LIMITS = LimitSettings(max_open_requests=80)
BODY = {"messages": [{"role": "user", "content": "hello world " * 20}], "max_tokens": 8, "temperature": 0}
HEADERS = {"authorization": "Bearer sk-herd", "x-request-id": "the-same"}


async def all_at_once(url: str) -> list[httpx.Response]:
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=30, trust_env=False) as client:
        return await asyncio.gather(*(client.post("/v1/chat/completions", json=BODY) for _ in range(CALLERS)))


@pytest.mark.timeout(60)
def test_the_same_conversation_from_everybody_at_once(codec: TextCodec) -> None:
    app = OracleApp(codec, api_key="k-1", keys=(KeyEntry("herd", key_digest("sk-herd"), tenant="herd"),), limits=LIMITS)
    with HttpServer(app, graceful=True) as server:
        canary = Canary(server.url, "k-1")
        canary.start()
        canary.sang()
        answers = asyncio.run(all_at_once(server.url))
        canary.sang()
        counted = Counter(answer.status_code for answer in answers)
        assert counted[200] >= LIMITS.max_open_requests // 4
        assert counted[200] + counted[429] == CALLERS
        assert counted[429], "nobody was shed"
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)
        whole = [json.loads(answer.content) for answer in answers if answer.status_code == 200]
        assert len({answer["choices"][0]["message"]["content"] for answer in whole}) == 1
        assert len({answer["id"] for answer in whole}) == len(whole), "one id of ours each"
        computed = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] < BLOCK for answer in whole]
        assert sum(computed) <= len(whole) // 4, "the prompt was computed by most"
        canary.end()
        deadline = time.monotonic() + 10
        while not app.idle and time.monotonic() < deadline:
            time.sleep(0.02)
        assert app.idle
