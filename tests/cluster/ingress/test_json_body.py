"""Bytes to an object, or a 400: never an exception that a caller caused."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.json_body import MAX_COMMAS, MAX_DEPTH, MAX_MEMBERS, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=5), st.booleans())
def test_objects_come_through(body: dict[str, object], plain: bool) -> None:
    assert parse_json(json.dumps(body, ensure_ascii=plain).encode("utf-8", "surrogatepass")) == body


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\u0dD8e1. ', max_size=60).map(str.encode))
def test_anything_else_is_a_400(raw: bytes) -> None:
    try:
        body = parse_json(raw)
    except HttpProblem as refused:
        problem = refused
    else:
        json.dumps(body, ensure_ascii=False).encode()
        return
    assert json.loads(problem.body())["error"]["code"] == "invalid_json"
    assert problem.status == 400


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, 500, 2000, 200_000])
@pytest.mark.parametrize("pair", [(b"[", b"]"), (b'{"a":', b"}")])
def test_depth(depth: int, pair: tuple[bytes, bytes]) -> None:
    raw = b'{"a":' + pair[0] * depth + b"1" + pair[1] * depth + b"}"
    if depth < MAX_DEPTH:
        parse_json(raw)
        return
    with pytest.raises(HttpProblem) as refused:
        parse_json(raw)
    assert refused.value.code == "invalid_json"


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'"a":1,', b"5,"])
def test_a_flood_of_values_is_refused_before_it_is_parsed(unit: bytes) -> None:
    """A parser that made objects of them all would hold up every other request for seconds."""
    began = time.monotonic()
    with pytest.raises(HttpProblem, match="too many values"):
        parse_json(b'{"a":[' + unit * (max(MAX_MEMBERS, MAX_COMMAS) + 1) + b"1]}")
    assert time.monotonic() - began < 3
    assert len(parse_json(b'{"a":[' + b"5," * 100_000 + b"5]}")["a"]) == 100_001
