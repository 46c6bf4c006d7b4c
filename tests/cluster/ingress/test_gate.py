"""Deny by default: a walk over the table of routes with every kind of caller, and paths that only look like them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator
from fakes.http_server import HttpServer

from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.ingress.app import Ingress, build_app
from penstock.cluster.ingress.gate import ONE_MODEL, ROUTES, UNKNOWN, Door, labels_of, route_of
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.metrics import Metrics
from penstock.workers.settings import AdapterSettings

pytestmark = pytest.mark.timeout(60)
KEYS = (
    KeyEntry("user", key_digest("sk-user"), tenant="u", models=("tiny",)),
    KeyEntry("boss", key_digest("sk-boss"), tenant="b", operator=True),
)
JSON = {"content-type": "application/json"}
USER, BOSS = {"authorization": "Bearer sk-user", **JSON}, {"authorization": "Bearer sk-boss", **JSON}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def test_the_whole_surface() -> None:
    """Whoever adds a route says here what it asks of its caller."""
    assert {path: (route.methods, route.door) for path, route in ROUTES.items()} == {
        "/v1/completions": (("POST",), Door.KEY),
        "/v1/chat/completions": (("POST",), Door.KEY),
        "/v1/embeddings": (("POST",), Door.KEY),
        "/v1/models": (("GET", "HEAD"), Door.KEY),
        "/tokenize": (("POST",), Door.KEY),
        "/detokenize": (("POST",), Door.KEY),
        "/tokenizer_info": (("GET", "HEAD"), Door.KEY),
        "/version": (("GET", "HEAD"), Door.KEY),
        "/openapi.json": (("GET", "HEAD"), Door.KEY),
        "/v1/load_lora_adapter": (("POST",), Door.OPERATOR),
        "/v1/unload_lora_adapter": (("POST",), Door.OPERATOR),
        "/status": (("GET", "HEAD"), Door.OPERATOR),
        "/metrics": (("GET", "HEAD"), Door.OPERATOR),
        "/health": (("GET", "HEAD"), Door.OPEN),
        "/ready": (("GET", "HEAD"), Door.OPEN),
        "/live": (("GET", "HEAD"), Door.OPEN),
    }
    assert len({route.name for route in [*ROUTES.values(), ONE_MODEL, UNKNOWN]}) == len(ROUTES) + 2


@pytest.fixture
def server(serve: Any) -> HttpServer:
    found: HttpServer = serve(FakeGenerator(), keys=KEYS, enable_tokenizer_info=True)
    return found


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    """None, but a place for some."""
    return Adapters(AdapterSettings(directory=str(tmp_path)))


def test_a_walk_over_the_table(serve: Any, adapters: Adapters) -> None:
    """Every route with every method and every caller gets what its door says."""
    server = serve(FakeGenerator(), keys=KEYS, enable_tokenizer_info=True, adapters=adapters)
    for path, route in [*ROUTES.items(), ("/v1/models/tiny", ONE_MODEL)]:
        for method in METHODS:
            for headers, known, operator in ((JSON, False, False), (USER, True, False), (BOSS, True, True)):
                status = server.request(method, path, b"{}" if method == "POST" else None, headers)[0]
                if route.door is not Door.OPEN and not known:
                    assert status == 401, (method, path)
                elif route.door is Door.OPERATOR and not operator:
                    assert status == 403, (method, path)
                elif method not in route.methods:
                    assert status == 405, (method, path)
                else:
                    assert status == (400 if method == "POST" else 200), (method, path)


@pytest.fixture
def sides(serve: Any, codec: Any, settings: Any, adapters: Adapters) -> Iterator[tuple[HttpServer, HttpServer]]:
    """One application on its public listener and on that of the operators."""
    apart = replace(settings, keys=KEYS, operators_apart=True, enable_tokenizer_info=True, adapters=adapters)
    app = build_app(apart, codec, FakeGenerator(), Metrics(), FakeFleet())
    with HttpServer(app) as public, HttpServer(Operators(app)) as operators:
        yield public, operators


class Operators:
    """What the listener for operators serves, as the object that the test's server asks for."""

    def __init__(self, app: Ingress) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app.operators(scope, receive, send)


def test_each_side_has_its_own_routes_and_nothing_else(sides: tuple[HttpServer, HttpServer]) -> None:
    """A walk over both listeners: what operators ask for is not on the public one, the API not on the other."""
    public, operators = sides
    callers = ((JSON, None), ({"authorization": "Bearer guess"}, None), (USER, False), (BOSS, True))
    for path, route in [*ROUTES.items(), ("/v1/models/tiny", ONE_MODEL)]:
        method, body = route.methods[0], b"{}" if route.methods[0] == "POST" else None
        for server, here in ((public, route.door is not Door.OPERATOR), (operators, route.door is not Door.KEY)):
            for headers, operator in callers:
                status = server.request(method, path, body, headers)[0]
                if route.door is Door.OPEN:
                    assert status == 200, path
                elif operator is None:
                    assert status == 401, path
                elif not here:
                    assert status == 404, path
                elif route.door is Door.OPERATOR and not operator:
                    assert status == 403, path
                else:
                    assert status == (400 if method == "POST" else 200), path
    described = json.loads(public.request("GET", "/openapi.json", headers=BOSS)[2])["paths"]
    assert not {"/metrics", "/status", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"} & set(described)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "//v1/models",
        "/v1//models",
        "/v1/models/",
        "/v1/models/..",
        "/v1/models/../../metrics",
        "/v1/models/..%2f..%2fmetrics",
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/%2e%2e/v1/models",
        "/v1/completions/",
        "/v1/completions;a=b",
        "/v1/completions%00",
        "/v1/completions%20",
        "/health/../metrics",
        "/health%2f..%2fmetrics",
        "/health/metrics",
        "/V1/models",
        "/v1/engines",
        "/metrics/",
        "/%6detrics/",
        "/admin",
        "/docs",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/responses",
        "/v1/responses/resp_1",
        "/v1/score",
        "/rerank",
        "/v1\\models",
        "/v1/..;/metrics",
        "/%c0%ae%c0%ae/metrics",
        "/v1/%252e%252e/metrics",
        "/.env",
    ],
)
def test_paths_that_only_look_like_it(server: HttpServer, path: str) -> None:
    """404 with a key; without one nothing is told, not even what does not exist."""
    status, _, answer = server.request("GET", path, headers=USER)
    assert status == 404
    assert json.loads(answer)["error"]["type"] == "not_found_error"
    assert server.request("GET", path)[0] == 401


def test_encoded_letters_are_the_same_route(server: HttpServer) -> None:
    assert server.request("GET", "/%6detrics", headers=USER)[0] == 403
    assert server.request("GET", "/%6detrics", headers=BOSS)[0] == 200
    assert server.request("GET", "/metrics?x=/health", headers=USER)[0] == 403


def test_switched_off_is_unknown(serve: Any) -> None:
    server = serve(FakeGenerator())
    assert server.request("GET", "/tokenizer_info")[0] == 404
    assert b"/tokenizer_info" not in server.request("GET", "/openapi.json")[2]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "127.0.0.1"}, 200),
        ({"host": "10.1.2.3:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "penstock"}, 200),
        ({"host": "penstock.default.svc.cluster.local:8000"}, 200),
        ({"host": "evil.example.com"}, 403),
        ({"host": "evil.example.com:8000"}, 403),
        ({"host": "127.0.0.1.evil.com"}, 403),
        ({"host": "localhost.evil.com"}, 403),
        ({"host": "evil.com."}, 403),
        ({"host": "evil.com#x.local"}, 403),
        ({"host": "evil.com@localhost"}, 403),
        ({"host": "evil.com:.local"}, 403),
        ({"host": "[::1].evil.local"}, 403),
        ({"host": "localhost:80:80"}, 403),
        ({"host": "evil.com:"}, 403),
        ({"host": "2130706433.evil.com"}, 403),
        ({"origin": "http://evil.example.com"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_pages_of_other_sites(serve: Any, headers: dict[str, str], status: int) -> None:
    """Row 16: without keys, operator routes are not for browsers; health is."""
    server = serve(FakeGenerator(), FakeFleet())
    for path in ("/metrics", "/status"):
        for method in ("GET", "HEAD", "POST", "OPTIONS"):
            found = server.request(method, path, headers=headers)[0]
            assert found == (status if status == 403 else 200 if method in {"GET", "HEAD"} else 405)
    assert server.request("GET", "/health", headers=headers)[0] == 200


def test_with_keys_the_key_decides(server: HttpServer) -> None:
    assert server.request("GET", "/metrics", headers={**BOSS, "host": "metrics.example.com"})[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example.com", "http://127.0.0.1", "null"])
def test_a_page_with_an_operators_key_is_refused_whatever_it_does(server: HttpServer, origin: str) -> None:
    for path in ("/metrics", "/status"):
        for method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE"):
            assert server.request(method, path, headers={**BOSS, "origin": origin})[0] == 403, method
    assert server.request("GET", "/v1/models", headers={**BOSS, "origin": origin})[0] == 200


def test_models_of_a_key(server: HttpServer) -> None:
    """A key sees and uses what it has the right to."""
    listed = {
        name: json.loads(server.request("GET", "/v1/models", headers=h)[2])["data"]
        for name, h in (("user", USER), ("boss", BOSS))
    }
    assert [m["id"] for m in listed["user"]] == ["tiny"]
    assert [m["id"] for m in listed["boss"]] == ["tiny", "other-name"]
    assert server.request("GET", "/v1/models/other-name", headers=USER)[0] == 403
    assert server.request("GET", "/v1/models/other-name", headers=BOSS)[0] == 200
    for path, body in (
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/embeddings", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ):
        status, _, answer = server.request("POST", path, json.dumps({"model": "other-name", **body}).encode(), USER)
        assert status == 403
        assert json.loads(answer)["error"]["type"] == "permission_error"


def test_labels_are_closed_sets() -> None:
    assert labels_of(route_of("/v1/models/whatever"), "GET") == ("/v1/models/{model}", "GET")
    assert labels_of(route_of("/what/ever"), "BREW") == ("other", "other")
