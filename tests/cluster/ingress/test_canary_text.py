"""What callers write stays between them and the model: not in logs, metrics or status, whatever goes wrong.

A word that nobody else says goes through every field that takes text, in good requests, in every bad one of the table,
and through a generator that breaks in each way; everything that the process wrote meanwhile, at the level of debugging,
is then searched for it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from fakes.bad_requests import BAD_REQUESTS, PATHS
from fakes.fake_generator import FakeGenerator, Step, deltas

from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest

pytestmark = pytest.mark.timeout(100)
WORD = "quixotic-zephyr-7391"
KEY = "sk-quixotic-key-7391"
HEADERS = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
TEXTS = {"user": WORD, "stop": WORD, "cache_salt": WORD, "metadata": {"a": WORD}, "safety_identifier": WORD}
BODIES: dict[str, dict[str, Any]] = {
    "completions": {"prompt": f"tell me of {WORD}", "max_tokens": 4, **TEXTS},
    "chat": {"messages": [{"role": "user", "content": WORD}], "max_tokens": 4, **TEXTS},
    "embeddings": {"input": WORD},
    "tokenize": {"prompt": WORD},
    "detokenize": {"tokens": [5]},
}


def breaking(request: GenerateRequest) -> Iterator[Step]:
    """By the seed: whole, refused before or after a token, or an error that nobody foresaw."""
    if request.sampling.seed == 1:
        yield RefusedError(FailureCode.OVERLOADED, "no room", 1.0)
    yield from deltas([5, 6], EndReason.NONE)
    if request.sampling.seed == 2:
        yield RefusedError(FailureCode.WORKER_LOST, "gone")
    if request.sampling.seed == 3:
        yield ZeroDivisionError()
    yield from deltas([7, 8])


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG)
    return caplog


def test_nothing_that_was_written_tells_it(
    serve: Any, said: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    keys = (KeyEntry("a", key_digest(KEY), operator=True),)
    server = serve(FakeGenerator(breaking), keys=keys)

    def post(api: str, body: dict[str, Any]) -> int:
        status: int = server.request("POST", PATHS[api], json.dumps(body).encode(), HEADERS)[0]
        return status

    found = {post(api, {**body, "seed": seed}) for api, body in BODIES.items() for seed in range(5)}
    assert {200, 500, 503} <= found
    for api in ("completions", "chat"):
        for seed in range(4):
            with contextlib.suppress(http.client.IncompleteRead):  # a stream that fails breaks its connection
                post(api, {**BODIES[api], "seed": seed, "stream": True})
    for row in BAD_REQUESTS:
        body = {**BODIES[row.api], **row.fields}
        post(row.api, {name: value for name, value in body.items() if value is not None})
    post("completions", {**BODIES["completions"], "model": WORD})
    for grammar in ({"regex": f"({WORD}"}, {"json": f'{{"type": "{WORD}"}}'}, {"grammar": WORD}, {"choice": [WORD]}):
        post("completions", {**BODIES["completions"], "structured_outputs": grammar})
    server.request("GET", f"/v1/models/{WORD}", headers=HEADERS)
    server.request("GET", f"/{WORD}?{WORD}={KEY}", headers={**HEADERS, "x-request-id": "fine"})
    server.request("GET", "/v1/models", headers={"authorization": f"Bearer {KEY}x"})
    server.request("POST", PATHS["chat"], f'{{"messages": "{WORD}'.encode(), HEADERS)
    pages = [server.request("GET", path, headers=HEADERS)[2].decode() for path in ("/metrics", "/status")]
    lines = [
        logging.Formatter("%(message)s %(args)s %(fields)s", defaults={"fields": ""}).format(r) for r in said.records
    ]
    assert any("failed" in line for line in lines)  # the broken generator was heard of, with its traceback
    written = "\n".join([*lines, *pages, *capfd.readouterr()])
    assert len(written) > 10_000
    for secret in (WORD, "zephyr", KEY, "quixotic-key"):
        assert secret not in written, written[max(0, written.find(secret) - 500) : written.find(secret) + 100]
