"""Adapters over HTTP: operators list them, callers name them, keys are bound to them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.adapters import make_adapter, replace_file
from fakes.fake_generator import FakeFleet, FakeGenerator
from fakes.http_server import HttpServer

from penstock.cluster.ingress.adapter_file import FILE_NAME
from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.ingress.app import Ingress, build_app
from penstock.cluster.ingress.call import ModelChoice
from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.fields import Fields
from penstock.cluster.ingress.sampling_fields import named_model, read_model
from penstock.cluster.ingress.settings import CODEC, IngressSettings
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import RefusedError
from penstock.workers.lora.adapter_files import WEIGHTS_FILE
from penstock.workers.lora.projections import adaptable
from penstock.workers.model.config import DecoderConfig
from penstock.workers.protocol import FailureCode
from penstock.workers.settings import AdapterSettings

pytestmark = pytest.mark.timeout(60)
KEYS = (
    KeyEntry("user", key_digest("sk-user"), tenant="u", models=("fixed",)),
    KeyEntry("boss", key_digest("sk-boss"), tenant="b", operator=True),
)
JSON = {"content-type": "application/json"}
USER, BOSS = {"authorization": "Bearer sk-user", **JSON}, {"authorization": "Bearer sk-boss", **JSON}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
MODELS = ("tiny", "other-name")


@pytest.fixture
def adapters(home: Path, tiny_config: DecoderConfig) -> Adapters:
    """One of the configuration, `fixed`."""
    settings = AdapterSettings(directory=str(home), modules={"fixed": "two"})
    found = Adapters(settings, adaptable(tiny_config), MODELS)
    found.look()
    return found


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@pytest.fixture
def server(serve: Any, adapters: Adapters, generator: FakeGenerator) -> HttpServer:
    found: HttpServer = serve(generator, keys=KEYS, adapters=adapters)
    return found


def ask(
    server: HttpServer, path: str, body: Any = None, headers: dict[str, str] = BOSS, status: int = 200
) -> dict[str, Any]:
    method = "GET" if body is None else "POST"
    found, _, answer = server.request(method, path, None if body is None else json.dumps(body).encode(), headers)
    assert found == status, answer
    parsed: dict[str, Any] = json.loads(answer)
    return parsed


def code(answer: dict[str, Any]) -> str:
    return str(answer["error"]["code"])


def test_load_use_unload(server: HttpServer, generator: FakeGenerator, home: Path) -> None:
    loaded = ask(server, LOAD, {"lora_name": "mine", "lora_path": "one"})
    assert loaded == {"id": "mine", "folder": "one", "revision": loaded["revision"]}
    assert len(loaded["revision"]) == 16
    answer = ask(server, "/v1/completions", {"model": "mine", "prompt": "hello", "max_tokens": 2})
    assert answer["model"] == "mine"
    (request,) = generator.submitted
    assert request.adapter is not None
    assert request.adapter.revision.hex().startswith(loaded["revision"])
    assert (request.adapter.name, request.adapter.folder) == ("mine", "one")
    assert ask(server, LOAD, {"lora_name": "mine", "lora_path": str(home / "one"), "load_inplace": False}) == loaded
    assert code(ask(server, LOAD, {"lora_name": "mine", "lora_path": "two"}, status=400)) == "adapter_exists"
    other = ask(server, LOAD, {"lora_name": "mine", "lora_path": "two", "load_inplace": True})
    assert other["revision"] != loaded["revision"]
    assert ask(server, UNLOAD, {"lora_name": "mine"}) == {"id": "mine"}
    answer = ask(server, "/v1/completions", {"model": "mine", "prompt": "hello"}, status=404)
    assert code(answer) == "model_not_found"
    assert code(ask(server, UNLOAD, {"lora_name": "mine"}, status=404)) == "adapter_not_found"
    assert code(ask(server, UNLOAD, {"lora_name": "fixed"}, status=409)) == "adapter_in_configuration"
    assert len(generator.submitted) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "hello"}),
    ],
)
def test_every_api_takes_the_names(server: HttpServer, generator: FakeGenerator, path: str, body: Any) -> None:
    plain = ask(server, path, {**body, "model": "tiny"})
    named = [ask(server, path, {**body, "model": name}) for name in ("fixed", "tiny:fixed", "other-name:fixed")]
    assert [answer["model"] for answer in (plain, *named)] == ["tiny", "fixed", "tiny:fixed", "other-name:fixed"]
    base, *adapted = generator.submitted
    assert base.adapter is None
    assert {request.adapter for request in adapted} == {adapted[0].adapter}
    assert adapted[0].adapter is not None
    assert {request.prefix_root for request in adapted} == {adapted[0].prefix_root}
    assert adapted[0].prefix_root != base.prefix_root


def test_tokenize_takes_them_too(server: HttpServer) -> None:
    ids = ask(server, "/tokenize", {"model": "fixed", "prompt": "hello"})["tokens"]
    assert ids == ask(server, "/tokenize", {"prompt": "hello"})["tokens"]
    assert ask(server, "/detokenize", {"model": "fixed", "tokens": ids}) == {"prompt": "hello"}


@pytest.mark.parametrize(
    "name",
    "../../etc /etc/passwd s3://bucket/x one two ./two two/ fixed: :fixed fixed:fixed nobody:fixed tiny:tiny tiny: "
    "tiny::fixed tiny:nobody Fixed fixed\n".split(" "),
)
def test_other_names_are_unknown(server: HttpServer, adapters: Adapters, name: str) -> None:
    before = adapters.listed()
    answer = ask(server, "/v1/completions", {"model": name, "prompt": "x"}, status=404)
    assert code(answer) == "model_not_found"
    assert adapters.listed() == before


def test_a_key_lists_the_adapters_own_name(server: HttpServer) -> None:
    for name in ("fixed", "tiny:fixed"):
        ask(server, "/v1/completions", {"model": name, "prompt": "x"}, USER)
        assert ask(server, f"/v1/models/{name}", headers=USER)["id"] == "fixed"
    ask(server, LOAD, {"lora_name": "mine", "lora_path": "one"})
    for name in ("tiny", "mine", "tiny:mine"):
        answer = ask(server, "/v1/completions", {"model": name, "prompt": "x"}, USER, status=403)
        assert code(answer) == "model_not_allowed"
    assert [model["id"] for model in ask(server, "/v1/models", headers=USER)["data"]] == ["fixed"]


def test_models_and_status(server: HttpServer, home: Path, adapters: Adapters) -> None:
    ask(server, LOAD, {"lora_name": "mine", "lora_path": "one"})
    replace_file(home / "one" / WEIGHTS_FILE, b"junk")
    adapters.look()
    models = ask(server, "/v1/models")["data"]
    assert [(model["id"], model["root"], model["parent"]) for model in models] == [
        ("tiny", "tiny", None),
        ("other-name", "tiny", None),
        ("fixed", "fixed", "tiny"),
    ]
    assert models[0].keys() == models[2].keys()
    assert models[2]["max_model_len"] == models[0]["max_model_len"]
    assert ask(server, "/v1/models/fixed") == models[2]
    ask(server, "/v1/models/mine", status=404)
    fixed, mine = ask(server, "/status")["adapters"]
    assert (fixed["name"], fixed["folder"], len(fixed["revision"]), fixed["problem"]) == ("fixed", "two", 16, "")
    assert (mine["name"], mine["revision"]) == ("mine", "")
    assert WEIGHTS_FILE in mine["problem"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "lora_name"),
        ({"lora_name": "x"}, 400, "lora_path"),
        ({"lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": 1, "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": ["x"], "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": 1}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "one", "load_inplace": "yes"}, 400, "load_inplace"),
        ({"lora_name": "", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a:b", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a/b", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "a\n", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "x" * 129, "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "tiny", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "other-name", "lora_path": "one"}, 400, "lora_name"),
        ({"lora_name": "x", "lora_path": ""}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "."}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "../one"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "one/../../x"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "/etc"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "/"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "s3://bucket/one"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "one\0"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "x" * 5000}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "none"}, 404, "lora_path"),
        ({"lora_name": "x", "lora_path": "empty"}, 404, "lora_path"),
        ({"lora_name": "x", "lora_path": "pickled"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "out"}, 400, "lora_path"),
        ({"lora_name": "x", "lora_path": "wide"}, 400, "lora_path"),
    ],
)
def test_what_cannot_be_loaded(
    server: HttpServer, home: Path, tiny_config: DecoderConfig, body: Any, status: int, param: str
) -> None:
    (home / "empty").mkdir()
    (home / "out").symlink_to("/etc")
    make_adapter(home / "wide", tiny_config, rank=32)
    make_adapter(home / "pickled", tiny_config)
    os.replace(home / "pickled" / WEIGHTS_FILE, home / "pickled" / "adapter_model.bin")
    answer = ask(server, LOAD, body, status=status)
    assert answer["error"]["param"] == param
    assert str(home) not in json.dumps(answer)
    assert not (home / FILE_NAME).exists()


def test_bodies_that_are_no_objects(server: HttpServer) -> None:
    for path in (LOAD, UNLOAD):
        for body in (b"", b"[]", b"{", b"1", b'{"lora_name": "x"', b"\xff"):
            assert server.request("POST", path, body, BOSS)[0] == 400
        assert server.request("POST", path, b"{" + b" " * 300_000, BOSS)[0] == 413
        assert server.request("POST", path, b"{}", {"authorization": "Bearer sk-boss"})[0] == 415


def test_unknown_fields_are_ignored_as_elsewhere(server: HttpServer) -> None:
    ask(server, LOAD, {"lora_name": "x", "lora_path": "one", "base_model_name": "tiny", "lora_int_id": 1})


def test_a_directory_that_cannot_be_written(server: HttpServer, home: Path) -> None:
    (home / ".adapters.lock").mkdir()
    answer = ask(server, LOAD, {"lora_name": "x", "lora_path": "one"}, status=409)
    assert code(answer) == "adapters_not_writable"
    assert str(home) not in json.dumps(answer)


def test_doors(server: HttpServer, serve: Any) -> None:
    body = {"lora_name": "x", "lora_path": "one"}
    for path in (LOAD, UNLOAD):
        ask(server, path, body, JSON, status=401)
        assert code(ask(server, path, body, USER, status=403)) == "operators_only"
        assert code(ask(server, path, body, {**BOSS, "origin": "null"}, status=403)) == "foreign_origin"
    without = serve(FakeGenerator(), keys=KEYS)
    for path in (LOAD, UNLOAD):
        ask(without, path, body, status=404)
    assert not {LOAD, UNLOAD} & set(ask(without, "/openapi.json")["paths"])
    document = ask(server, "/openapi.json")
    assert {LOAD, UNLOAD} <= set(document["paths"])
    assert {"load_lora_adapter", "unload_lora_adapter"} <= set(document["components"]["schemas"])


@pytest.fixture
def sides(codec: TextCodec, settings: IngressSettings, adapters: Adapters) -> Iterator[tuple[HttpServer, HttpServer]]:
    apart = replace(settings, keys=KEYS, operators_apart=True, adapters=adapters)
    app = build_app(apart, codec, FakeGenerator(), Metrics(), FakeFleet())
    with HttpServer(app) as public, HttpServer(_Operators(app)) as operators:
        yield public, operators


class _Operators:
    def __init__(self, app: Ingress) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._app.operators(scope, receive, send)


def test_only_on_the_operators_side(sides: tuple[HttpServer, HttpServer]) -> None:
    public, operators = sides
    body = {"lora_name": "x", "lora_path": "one"}
    ask(public, LOAD, body, status=404)
    ask(public, LOAD, body, USER, status=404)
    ask(operators, LOAD, body, USER, status=403)
    ask(operators, LOAD, body)
    assert [model["id"] for model in ask(public, "/v1/models")["data"]] == [*MODELS, "fixed", "x"]
    ask(public, UNLOAD, body, status=404)
    ask(operators, UNLOAD, body)


def test_what_was_meant_stays_meant(adapters: Adapters, settings: IngressSettings) -> None:
    """An unload after the name was read changes neither the request's adapter nor its root."""
    known = replace(settings, adapters=adapters)
    choice = read_model(Fields({"model": "tiny:fixed"}), known)
    assert choice == ModelChoice("tiny:fixed", adapters.find("fixed"))
    assert choice.right == "fixed"
    assert named_model("tiny", known).right == "tiny"
    assert read_model(Fields({}), known) == ModelChoice("tiny")
    with pytest.raises(HttpProblem):
        named_model("fixed", settings)


def test_prefix_roots() -> None:
    settings = IngressSettings(("tiny",), 512, revision="r1")
    first, second = (AdapterRef("a", "one", bytes([number]) * 32) for number in (1, 2))
    parts = ("t", "salt", "r1", CODEC)
    known = hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).digest()
    assert settings.prefix_root("t", "salt") == settings.prefix_root("t", "salt", None) == known
    roots = {settings.prefix_root("t", "salt", adapter) for adapter in (None, first, second)}
    assert len(roots) == 3
    assert settings.prefix_root("t", "salt", replace(first, name="b", folder="two")) in roots, "content decides"


def test_a_worker_that_cannot_load_it(serve: Any, adapters: Adapters) -> None:
    def refuse(request: Any) -> list[Any]:
        return [RefusedError(FailureCode.ADAPTER, "its files have changed")]

    server = serve(FakeGenerator(refuse), adapters=adapters)
    status, headers, answer = server.request(
        "POST", "/v1/completions", json.dumps({"model": "fixed", "prompt": "x"}).encode(), JSON
    )
    assert (status, json.loads(answer)["error"]["code"]) == (503, "adapter_unavailable")
    assert "retry-after" in headers
