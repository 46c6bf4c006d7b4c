"""The table of bad requests by gRPC: what its messages can say is refused as over HTTP, by the same field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from fakes.bad_requests import BAD_REQUESTS, UNSAYABLE, BadRequest
from fakes.fake_generator import FakeGenerator
from fakes.grpc_server import FakeGrpcServer
from google.protobuf.json_format import ParseDict, ParseError

from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.request_bodies import generate_body
from penstock.cluster.grpc_front.rpcs import GenerationStub
from penstock.cluster.text import TextCodec

pytestmark = pytest.mark.timeout(60)
SAMPLING, OUTPUT = ({field.name for field in kind.DESCRIPTOR.fields} for kind in (pb.Sampling, pb.Output))
OF_REQUEST = {"model", "cache_salt", "truncate_prompt_tokens"}
CODES = {400: grpc.StatusCode.INVALID_ARGUMENT, 404: grpc.StatusCode.NOT_FOUND}
LEAST_SAID = 60  # rows that come through, so that a table that nobody can say any more is noticed


class UnsayableError(Exception):
    """The language has no word for it."""


def prompt_of(body: dict[str, Any]) -> pb.Prompt:
    if "messages" in body:
        return pb.Prompt(chat=ParseDict({"messages": body["messages"]}, pb.Conversation()))
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return pb.Prompt(tokens=pb.TokenIds(ids=prompt))
    if prompt is None:
        return pb.Prompt()
    raise UnsayableError


def message_of(row: BadRequest) -> pb.GenerateRequest:
    """The row as a message. Raises UnsayableError."""
    body = row.body()
    stated = {name: value for name, value in body.items() if name not in {"prompt", "messages"}}
    if row.api == "chat" and "messages" not in body:  # no prompt of whatever kind
        raise UnsayableError
    if not stated.keys() <= SAMPLING | OUTPUT | OF_REQUEST or (row.api == "chat" and "logprobs" in stated):
        raise UnsayableError
    if isinstance(stated.get("allowed_token_ids"), list):
        stated["allowed_token_ids"] = {"ids": stated["allowed_token_ids"]}
    try:
        return pb.GenerateRequest(
            prompt=prompt_of(body),
            sampling=ParseDict({name: stated[name] for name in stated.keys() & SAMPLING}, pb.Sampling()),
            output=ParseDict({name: stated[name] for name in stated.keys() & OUTPUT}, pb.Output()),
            **{name: stated[name] for name in stated.keys() & OF_REQUEST},
        )
    except (ParseError, TypeError, ValueError, OverflowError) as error:
        raise UnsayableError from error


def same(heard: Any, stated: Any) -> bool:
    """Equal as JSON's values, where 2 and 2.0 are; NaN is itself."""
    if isinstance(heard, dict) and isinstance(stated, dict):
        return heard.keys() == stated.keys() and all(same(heard[name], stated[name]) for name in heard)
    if isinstance(heard, list) and isinstance(stated, list):
        return len(heard) == len(stated) and all(map(same, heard, stated))
    if all(type(one) in (int, float) for one in (heard, stated)):
        return repr(float(heard)) == repr(float(stated))
    return type(heard) is type(stated) and bool(heard == stated)


def said() -> list[tuple[BadRequest, pb.GenerateRequest]]:
    rows = []
    for row in BAD_REQUESTS + UNSAYABLE:
        if row.api in ("completions", "chat"):
            try:
                message = message_of(row)
            except UnsayableError:
                continue
            # Empty lists are as good as not said, and a number that was written as a text arrives as a number.
            heard = generate_body(message, stream=False)[0] if message.prompt.WhichOneof("form") else {}
            if all(same(heard.get(name), row.body().get(name)) for name in row.fields if "logprobs" not in name):
                rows.append((row, message))
    return rows


SAID = said()


@pytest.fixture(scope="module")
def stub(codec: TextCodec) -> Iterator[GenerationStub]:
    with FakeGrpcServer(codec, FakeGenerator()) as server, grpc.insecure_channel(server.address) as channel:
        yield GenerationStub(channel)


def test_most_of_the_table_can_be_said() -> None:
    assert len(SAID) >= LEAST_SAID


@pytest.mark.parametrize(("row", "message"), SAID, ids=[row.id for row, _ in SAID])
def test_refused_as_over_http(stub: GenerationStub, row: BadRequest, message: pb.GenerateRequest) -> None:
    for call in (lambda: stub.Generate(message), lambda: list(stub.Stream(message))):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is CODES[row.status], json.dumps(row.fields)[:200]
        rich = pb.RichStatus.FromString(dict(caught.value.trailing_metadata())["grpc-status-details-bin"])
        detail = pb.ErrorDetail()
        assert rich.details[0].Unpack(detail)
        assert detail.code
        assert detail.param == (row.param or "")
        assert len(caught.value.details()) < 700
