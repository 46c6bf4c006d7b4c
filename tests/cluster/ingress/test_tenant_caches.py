"""No tenant learns from the caches what another one has asked: not by tokens found in them, whatever salt it names."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fakes.http_server import HttpServer
from fakes.oracle_app import BLOCK, OracleApp

from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.text import TextCodec

pytestmark = pytest.mark.timeout(60)
TENANTS = {"a": "t", "b": "u", "c": "t"}  # by the name of the key
KEYS = tuple(KeyEntry(name, key_digest(f"sk-{name}"), tenant=tenant) for name, tenant in TENANTS.items())
PROMPT = [5 + number % 300 for number in range(10 * BLOCK)]


def test_tokens_are_found_by_their_own_tenant_and_salt_alone(codec: TextCodec) -> None:
    with HttpServer(OracleApp(codec, keys=KEYS), graceful=True) as server:

        def cached(name: str, **salt: Any) -> int:
            headers = {"content-type": "application/json", "authorization": f"Bearer sk-{name}"}
            body = {"prompt": PROMPT, "max_tokens": 1, "temperature": 0, **salt}
            status, _, answer = server.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
            assert status == 200, answer
            found: int = json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"]
            return found

        assert cached("a") == 0
        assert cached("a") > 0
        assert cached("c") > 0  # the same tenant's other key
        for salt in ({}, {"cache_salt": "t"}, {"cache_salt": "t-t"}):
            assert cached("b", **salt) == 0, salt
        assert cached("b") > 0
        assert cached("a", cache_salt="s") == 0
        assert cached("b", cache_salt="s") == 0
        assert cached("a", cache_salt="s") > 0


def test_no_two_pairs_of_tenant_and_salt_have_one_root() -> None:
    """Also where one part's end could pass for the other's beginning."""
    settings = IngressSettings(("m",), 512, revision="r")
    pieces = ("", "a", "b", "ab", "1:a", "a\0", "\0", "0:", "a\x001:b", "1:a\x001:b")
    roots = {settings.prefix_root(tenant, salt) for tenant in pieces for salt in pieces}
    assert len(roots) == len(pieces) ** 2
    assert all(len(root) == 32 for root in roots)
