"""The published document and the server agree: every route, every field of a body, and none that the parsers ignore."""

from __future__ import annotations

from typing import Any

import pytest
from fakes.bad_requests import GOOD, PATHS

from penstock.cluster.ingress.chat_request import parse_chat
from penstock.cluster.ingress.completion_request import parse_completion
from penstock.cluster.ingress.embeddings import parse_embedding
from penstock.cluster.ingress.fields import Fields
from penstock.cluster.ingress.gate import ROUTES
from penstock.cluster.ingress.known_fields import MAX_LOGGED, IgnoredFields
from penstock.cluster.ingress.openapi import openapi_document
from penstock.cluster.ingress.openapi_bodies import Kind, Shape, body_schema
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec

SHAPE = Shape(LimitSettings(), 400, 512)
PARSERS: dict[str, Any] = {"completions": parse_completion, "chat": parse_chat, "embeddings": parse_embedding}
KINDS = {"completions": Kind.COMPLETION, "chat": Kind.CHAT, "embeddings": Kind.EMBEDDING}


def test_every_route_is_described() -> None:
    document = openapi_document(SHAPE, "1", {route.name: True for route in ROUTES.values()})
    assert set(document["paths"]) == {*ROUTES, "/v1/models/{model}"}
    for path, route in ROUTES.items():
        assert {m.upper() for m in document["paths"][path]} == set(route.methods)
    assert set(PATHS.values()) <= set(document["paths"])


@pytest.mark.parametrize("api", PARSERS)
def test_every_field_is_read(
    codec: TextCodec, settings: IngressSettings, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that the document promises and no parser looks at would be ignored without a word."""
    read: set[str] = set()
    for name in ("raw", "boolean", "integer", "number", "text", "child", "sized", "only"):
        method = getattr(Fields, name)

        def noting(self: Fields, key: str, *rest: Any, _method: Any = method, **more: Any) -> Any:
            read.add(self.name(key))
            return _method(self, key, *rest, **more)

        monkeypatch.setattr(Fields, name, noting)
    PARSERS[api](GOOD[api], settings, codec)
    described = set(body_schema(KINDS[api], SHAPE)["properties"])
    assert described <= read
    assert {name for name in read if "." not in name and "[" not in name} <= described


def test_names_of_ignored_fields_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    ignored = IgnoredFields()
    with caplog.at_level("INFO"):
        for number in range(2 * MAX_LOGGED):
            assert ignored.note(Kind.CHAT, {"messages": [], f"odd{number}": 1}) == (f"odd{number}",)
            ignored.note(Kind.CHAT, {f"odd{number}": 1})
    assert len(caplog.records) == MAX_LOGGED
    assert ignored.note(Kind.CHAT, {"a b": 1, "x" * 100: 1, "messages": 1}) == ()
