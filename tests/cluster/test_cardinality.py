"""However many names callers invent, the metrics page keeps its size: the number of series depends on us alone."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator
from prometheus_client.parser import text_string_to_metric_families

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec

SETTINGS = IngressSettings(model_names=("tiny",), max_model_len=512, api_key="the-key")
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/v1/models/", "/metrics", "/")
METHODS = ("POST", "GET", "HEAD", "DELETE", "BREW")


KINDS = tuple(
    itertools.product(PATHS, (*METHODS, "M"), *[(True, False)] * 5)
)  # path, method, own path, key, content type, model, extra field


def hostile(kind: tuple[Any, ...], number: int) -> tuple[dict[str, Any], bytes]:
    """An ASGI scope and a body in which everything a caller can name is new."""
    path, method, path_known, key_known, type_known, model_known, fields_known = kind
    name = f'x{number}"}}\n{{'
    headers = {
        "content-type": "application/json" if type_known else f"application/{number}",
        "authorization": "Bearer the-key" if key_known else f"Bearer {name}",
        "user-agent": name,
        "x-request-id": f"id-{number}",
        "x-penstock-timings": "1",
        "traceparent": f"00-{number:032x}-{number:016x}-01",
        "x-tenant": name,
    }
    body: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 1, "user": name, "cache_salt": f"s{number}"}
    body |= {} if model_known else {"model": name}
    body |= {} if fields_known else {name: name}
    scope = {
        "type": "http",
        "http_version": "2",
        "method": f"M{number}" if method == "M" else method,
        "path": path if path_known else path + name,
        "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        "query_string": name.encode(),
    }
    return scope, json.dumps(body).encode()


async def ask(app: Any, scope: dict[str, Any], body: bytes) -> None:
    messages: Iterator[dict[str, Any]] = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        if message is None:
            await asyncio.Event().wait()
        return message or {}

    async def send(_message: Any) -> None:
        pass

    await app(scope, receive, send)


def series(metrics: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    families = text_string_to_metric_families(metrics.page().decode())
    return {(s.name, tuple(sorted(s.labels.items()))) for family in families for s in family.samples}


async def flood(count: int) -> None:
    metrics = Metrics("tiny", "vllm")
    app = build_app(SETTINGS, TextCodec(400, ()), FakeGenerator(), metrics, FakeFleet())
    numbers = itertools.count()
    for kind in KINDS:  # every combination of our own labels comes up
        await ask(app, *hostile(kind, next(numbers)))
    before = series(metrics)
    draw, began = random.Random(7), time.monotonic()
    for _ in range(count):
        await ask(app, *hostile(draw.choice(KINDS), next(numbers)))
    after = series(metrics)
    assert after == before
    assert len(after) < 3000
    labels = {value for _, pairs in after for _, value in pairs}
    assert not [value for value in labels if "x1" in value or "M1" in value]
    logging.getLogger(__name__).info("%.0f requests/s", count / (time.monotonic() - began))


def test_five_thousand_names_make_no_series() -> None:
    asyncio.run(flood(5_000))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hundred_thousand_names_make_no_series() -> None:
    asyncio.run(flood(100_000))
