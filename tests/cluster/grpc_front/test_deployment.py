"""The rpcs as Serve's proxy calls them: with Serve's own context, whose state must carry every refusal."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import grpc
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.tiny_model import CONTEXT

from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.deployment import GrpcMethods
from penstock.cluster.grpc_front.proxy_watch import ProxyWatch
from penstock.cluster.grpc_front.rpcs import SERVICE
from penstock.cluster.grpc_front.servicer import GenerationServicer
from penstock.cluster.ingress.service import OpenAIService
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own, about its pydantic models
    from ray.serve.grpc_util import RayServegRPCContext

REQUEST = pb.GenerateRequest(prompt=pb.Prompt(text="hello fox"))


class Proxied:
    """What Serve's proxy knows of a call, as its context copies it."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def code(self) -> None: ...
    def details(self) -> str:
        return ""

    def auth_context(self) -> dict[str, Any]:
        return {}

    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    def peer_identities(self) -> None: ...
    def peer_identity_key(self) -> None: ...


class Deployment(GrpcMethods):
    def __init__(self, codec: TextCodec, generator: FakeGenerator, **settings: Any) -> None:
        chosen = IngressSettings(("tiny",), CONTEXT, **settings)
        self.grpc_servicer = GenerationServicer(OpenAIService(chosen, codec, generator, Metrics()), FakeFleet())
        self.grpc_proxies = ProxyWatch()


def test_serve_finds_what_it_calls() -> None:
    for method in SERVICE.methods:
        found = getattr(GrpcMethods, method.name)
        assert "grpc_context" in inspect.signature(found).parameters
        assert inspect.isasyncgenfunction(found) == method.server_streaming


def test_an_answer_and_a_stream(codec: TextCodec) -> None:
    deployment = Deployment(codec, FakeGenerator(lambda request: deltas(codec.encode("fox", "prompt"))))
    context = RayServegRPCContext(Proxied(("x-request-id", "mine-1"), ("application", "app")))
    assert asyncio.run(deployment.Generate(REQUEST, grpc_context=context)).choices[0].text == "fox"
    assert context.code() is None
    assert ("x-request-id", "mine-1") in context.trailing_metadata()

    async def read() -> str:
        return "".join([c.text async for m in deployment.Stream(REQUEST, grpc_context=context) for c in m.choices])

    assert asyncio.run(read()) == "fox"
    assert asyncio.run(deployment.Health(pb.HealthRequest(), grpc_context=context)).ready
    assert asyncio.run(deployment.ListModels(pb.ListModelsRequest(), grpc_context=context)).models[0].id == "tiny"
    vector = asyncio.run(deployment.Embed(pb.EmbedRequest(inputs=[REQUEST.prompt]), grpc_context=context)).vectors[0]
    assert len(vector.values) == 4
    ids = asyncio.run(deployment.Tokenize(pb.TokenizeRequest(prompt=REQUEST.prompt), grpc_context=context)).token_ids
    text = asyncio.run(deployment.Detokenize(pb.DetokenizeRequest(token_ids=ids), grpc_context=context)).text
    assert text == "hello fox"


def test_refusals_are_told_by_the_context_and_not_raised(codec: TextCodec) -> None:
    full = RefusedError(FailureCode.TENANT_LIMIT, "slow down", 4.0)
    deployment = Deployment(codec, FakeGenerator(lambda request: [full]))
    for stream in (False, True):
        context = RayServegRPCContext(Proxied())

        async def call(stream: bool = stream, context: RayServegRPCContext = context) -> list[Any]:
            if stream:
                return [message async for message in deployment.Stream(REQUEST, grpc_context=context)]
            return [await deployment.Generate(REQUEST, grpc_context=context)]

        (told,) = asyncio.run(call())
        assert not told.ListFields()
        assert (context.code(), context.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "slow down")
        assert ("retry-after", "4") in context.trailing_metadata()


def test_the_key_comes_in_the_metadata(codec: TextCodec) -> None:
    deployment = Deployment(codec, FakeGenerator(), api_key="s3cret")
    closed, opened = RayServegRPCContext(Proxied()), RayServegRPCContext(Proxied(("authorization", "Bearer s3cret")))
    asyncio.run(deployment.Generate(REQUEST, grpc_context=closed))
    assert closed.code() is grpc.StatusCode.UNAUTHENTICATED
    assert asyncio.run(deployment.Generate(REQUEST, grpc_context=opened)).choices
