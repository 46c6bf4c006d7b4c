"""The servicer over a real gRPC connection: answers as over HTTP, the same refusals, and cancelling ends the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from fakes.certificates import Authority
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.grpc_server import FakeGrpcServer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.rpcs import GenerationStub
from penstock.cluster.grpc_front.server import _Rpcs
from penstock.cluster.settings import LimitSettings
from penstock.cluster.text import TextCodec
from penstock.router.emission import Delta
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode

pytestmark = pytest.mark.timeout(60)
TEXT = pb.Prompt(text="hello fox")
CHAT = pb.Prompt(chat=pb.Conversation(messages=[pb.ChatMessage(role="user", content="hello")]))
Start = Callable[..., GenerationStub]


@pytest.fixture
def start(codec: TextCodec) -> Iterator[Start]:
    with ExitStack() as stack:

        def serve(generator: FakeGenerator, **settings: object) -> GenerationStub:
            server = stack.enter_context(FakeGrpcServer(codec, generator, **settings))
            channel = stack.enter_context(grpc.insecure_channel(server.address))
            return GenerationStub(channel)

        yield serve


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, pb.ErrorDetail, dict[str, str | bytes]]:
    """The code, our detail, and the trailing metadata of a call that fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    metadata = dict(caught.value.trailing_metadata())
    rich = pb.RichStatus.FromString(metadata["grpc-status-details-bin"])
    assert rich.message == caught.value.details()
    detail = pb.ErrorDetail()
    assert rich.details[0].Unpack(detail)
    return caught.value.code(), detail, metadata


def test_generate(start: Start, codec: TextCodec) -> None:
    tokens = tuple(codec.encode("naïve ☃", "prompt"))
    generator = FakeGenerator(lambda request: deltas(tokens, logprobs=request.sampling.logprobs), cached=2)
    stub = start(generator)
    request = pb.GenerateRequest(
        prompt=TEXT,
        sampling=pb.Sampling(max_tokens=20, n=2, temperature=0.7, seed=-1),
        output=pb.Output(logprobs=1, prompt_logprobs=1, return_prompt_token_ids=True),
    )
    answer, call = stub.Generate.with_call(request, metadata=(("x-request-id", "mine-1"),))
    assert dict(call.trailing_metadata())["x-request-id"] == "mine-1"
    assert [choice.text for choice in answer.choices] == ["naïve ☃"] * 2
    assert [tuple(choice.token_ids) for choice in answer.choices] == [tokens] * 2
    assert answer.choices[1].finish_reason == pb.FINISH_REASON_LENGTH
    assert [entry.logprob for entry in answer.choices[0].logprobs] == [-0.5 * t for t in tokens]
    assert [entry.token_id for entry in answer.choices[0].logprobs] == list(tokens)
    prompt = codec.encode("hello fox", "prompt")
    assert list(answer.prompt_token_ids) == prompt
    assert [entry.token_id for entry in answer.prompt_logprobs] == prompt[1:]
    assert answer.prompt_logprobs[0].logprob == -0.25 * prompt[1]
    assert answer.usage == pb.Usage(prompt_tokens=len(prompt), completion_tokens=2 * len(tokens), cached_tokens=2)
    asked = generator.submitted[0].sampling
    assert (asked.temperature, asked.seed, asked.max_tokens) == (0.7, 2**64 - 1, 20)


def test_stream(start: Start, codec: TextCodec) -> None:
    tokens = tuple(codec.encode("naïve ☃", "prompt"))
    stub = start(FakeGenerator(lambda request: deltas(tokens)))
    for prompt in (TEXT, CHAT, pb.Prompt(tokens=pb.TokenIds(ids=[5, 6]))):
        messages = list(stub.Stream(pb.GenerateRequest(prompt=prompt, sampling=pb.Sampling(max_tokens=50))))
        pieces = [choice for message in messages for choice in message.choices]
        assert "".join(piece.text for piece in pieces) == "naïve ☃"
        assert tuple(t for piece in pieces for t in piece.token_ids) == tokens
        reasons = [piece.finish_reason for piece in pieces]
        assert reasons == [pb.FINISH_REASON_UNSPECIFIED] * (len(reasons) - 1) + [pb.FINISH_REASON_LENGTH]
        assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
        assert messages[-1].usage.completion_tokens == len(tokens)
        assert messages[0].model == "tiny"
        assert len({message.id for message in messages}) == 1


def test_tools(start: Start, codec: TextCodec) -> None:
    text = 'Hm. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    tokens = (*codec.encode(text, "prompt"), codec.eos_token_ids[0])
    generator = FakeGenerator(lambda request: deltas(tokens, EndReason.STOP))
    stub = start(generator)
    tools = [pb.Tool(name="f", description="F.", parameters='{"type": "object"}'), pb.Tool(name="g", strict=False)]
    earlier = pb.ToolCall(id="call_1", name="f", arguments='{"a": 0}')
    messages = [
        pb.ChatMessage(role="user", content="x"),
        pb.ChatMessage(role="assistant", tool_calls=[earlier]),
        pb.ChatMessage(role="tool", content="0", tool_call_id="call_1"),
    ]
    request = pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Conversation(messages=messages, tools=tools)))
    (choice,) = stub.Generate(request).choices
    assert (choice.text, choice.finish_reason) == ("Hm.", pb.FINISH_REASON_TOOL_CALLS)
    assert [(call.name, call.arguments) for call in choice.tool_calls] == [("f", '{"a": 1}')]
    pieces = [choice for message in stub.Stream(request) for choice in message.choices]
    calls = [call for piece in pieces for call in piece.tool_calls]
    assert [(call.name, call.arguments) for call in calls[:1]] == [("f", "")]
    assert "".join(call.arguments for call in calls) == '{"a": 1}'
    assert pieces[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    prompt = codec.decode(generator.submitted[0].prompt)
    assert '<tool_call>{"type": "function", "function": {"name": "f", "description": "F."' in prompt
    named = pb.Conversation(messages=messages, tools=tools, named_tool="g", parallel_tool_calls=False)
    stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(chat=named)))
    assert '\\"name\\": \\"g\\"' in generator.submitted[-1].sampling.grammar.text
    for bad, field in (
        ({"tools": [pb.Tool(name="f", parameters="{")]}, "tools[0].function.parameters"),
        ({"tools": [pb.Tool(name="a b")]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": tools, "named_tool": "h"}, "tool_choice"),
    ):
        chat = pb.Conversation(messages=messages[:1], **bad)
        asked = pb.GenerateRequest(prompt=pb.Prompt(chat=chat))
        _, detail, _ = refused(lambda asked=asked: stub.Generate(asked))
        assert detail.param == field


def test_echo_begins_the_text_once(start: Start, codec: TextCodec) -> None:
    stub = start(FakeGenerator(lambda request: deltas(codec.encode("fox", "prompt"))))
    request = pb.GenerateRequest(prompt=TEXT, output=pb.Output(echo=True))
    assert stub.Generate(request).choices[0].text == "hello foxfox"
    assert "".join(c.text for m in stub.Stream(request) for c in m.choices) == "hello foxfox"


def test_the_other_rpcs(start: Start, codec: TextCodec) -> None:
    stub = start(FakeGenerator())
    vectors = stub.Embed(pb.EmbedRequest(inputs=[TEXT, pb.Prompt(text="fox")])).vectors
    assert [vector.index for vector in vectors] == [0, 1]
    assert np.linalg.norm(vectors[0].values) == pytest.approx(1.0, abs=1e-6)
    told = stub.Tokenize(pb.TokenizeRequest(prompt=TEXT))
    assert list(told.token_ids) == codec.encode("hello fox", "prompt")
    assert stub.Detokenize(pb.DetokenizeRequest(token_ids=told.token_ids)).text == "hello fox"
    models = stub.ListModels(pb.ListModelsRequest()).models
    assert [(model.id, model.max_model_len) for model in models] == [("tiny", told.max_model_len)]
    assert stub.Health(pb.HealthRequest()).ready


def test_not_ready_is_said_with_its_reason(start: Start) -> None:
    health = start(FakeGenerator(), fleet=FakeFleet("no decode worker")).Health(pb.HealthRequest())
    assert (health.ready, health.reason) == (False, "no decode worker")


def test_wrong_requests_name_their_field(start: Start) -> None:
    stub = start(FakeGenerator())
    wrong = pb.GenerateRequest(prompt=TEXT, sampling=pb.Sampling(top_p=7.0))
    for call in (lambda: stub.Generate(wrong), lambda: list(stub.Stream(wrong))):
        code, detail, _ = refused(call)
        assert (code, detail.param, detail.code) == (grpc.StatusCode.INVALID_ARGUMENT, "top_p", "out_of_range")
    assert refused(lambda: stub.Generate(pb.GenerateRequest()))[1].param == "prompt"
    long = pb.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[1] * 5000)))
    assert refused(lambda: stub.Generate(long))[1].code == "context_length_exceeded"
    unknown = pb.GenerateRequest(prompt=TEXT, model="nobody")
    assert refused(lambda: stub.Generate(unknown))[0] is grpc.StatusCode.NOT_FOUND
    nan = pb.GenerateRequest(prompt=TEXT, sampling=pb.Sampling(temperature=float("nan")))
    assert refused(lambda: stub.Generate(nan))[1].param == "temperature"


def test_bytes_that_are_no_message_are_the_callers_mistake(codec: TextCodec) -> None:
    """grpcio's own answer is UNKNOWN, with a traceback in the log."""
    with FakeGrpcServer(codec, FakeGenerator()) as server, grpc.insecure_channel(server.address) as channel:
        for rpc in ("Generate", "Stream", "Embed", "Tokenize", "Detokenize", "ListModels"):
            kind = channel.unary_stream if rpc == "Stream" else channel.unary_unary
            call = kind(f"/penstock.v1.Generation/{rpc}")
            for raw in (b"\xff" * 20, b"\x0a\x03\xff\xfe\xfd"):
                answer = lambda raw=raw, rpc=rpc, call=call: list(call(raw)) if rpc == "Stream" else call(raw)  # noqa: E731
                if raw[0] == 0x0A and rpc == "ListModels":
                    continue  # an empty message with a field that it does not know
                code, detail, _ = refused(answer)
                assert code is grpc.StatusCode.INVALID_ARGUMENT
                assert detail.code


def test_the_key_is_asked_of_all_but_health(start: Start) -> None:
    stub = start(FakeGenerator(), api_key="s3cret")
    request = pb.GenerateRequest(prompt=TEXT)
    wrong = (("authorization", "Bearer wrong"),)
    for call in (
        lambda: stub.Generate(request),
        lambda: stub.Generate(request, metadata=wrong),
        lambda: list(stub.Stream(request, metadata=wrong)),
        lambda: stub.ListModels(pb.ListModelsRequest()),
        lambda: stub.Tokenize(pb.TokenizeRequest(prompt=TEXT)),
    ):
        code, detail, _ = refused(call)
        assert (code, detail.code) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
    right = (("authorization", "Bearer s3cret"),)
    assert stub.Generate(request, metadata=right).choices
    assert stub.Health(pb.HealthRequest()).ready


def test_a_request_that_is_too_large(start: Start) -> None:
    stub = start(FakeGenerator(), limits=LimitSettings(max_body_bytes=1000))
    large = pb.GenerateRequest(prompt=pb.Prompt(text="x" * 2000))
    assert refused(lambda: stub.Generate(large))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as cut:  # far too large: grpc refuses to read it
        stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="x" * (3 << 20))))
    assert cut.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_refusals_say_when_to_come_back(start: Start) -> None:
    stub = start(FakeGenerator(lambda request: [RefusedError(FailureCode.QUEUE_FULL, "full", 4.0)]))
    request = pb.GenerateRequest(prompt=TEXT)
    for call in (lambda: stub.Generate(request), lambda: list(stub.Stream(request))):
        code, detail, metadata = refused(call)
        assert (code, detail.code, metadata["retry-after"]) == (grpc.StatusCode.UNAVAILABLE, "queue_full", "4")


def test_a_stream_that_fails_on_the_way_keeps_what_came_before(start: Start, codec: TextCodec) -> None:
    steps = [*deltas(codec.encode("fox", "prompt"), EndReason.NONE), RefusedError(FailureCode.WORKER_LOST, "gone")]
    stub = start(FakeGenerator(lambda request: steps))
    seen: list[str] = []

    def read() -> None:
        for message in stub.Stream(pb.GenerateRequest(prompt=TEXT)):
            seen.extend(choice.text for choice in message.choices)

    assert refused(read)[0] is grpc.StatusCode.UNAVAILABLE
    assert "".join(seen) == "fox"


def endless(request: object) -> Iterator[Delta | float]:
    while True:
        yield Delta((5,), None, EndReason.NONE)
        yield 0.01


def until_cancelled(generator: FakeGenerator, count: int) -> None:
    end = time.monotonic() + 10
    while len(generator.cancelled) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_callers_who_leave_end_the_work(start: Start) -> None:
    generator = FakeGenerator(endless)
    stub = start(generator)
    request = pb.GenerateRequest(prompt=TEXT)
    stream = stub.Stream(request)
    next(stream)
    stream.cancel()
    until_cancelled(generator, 1)
    unary = stub.Generate.future(request)
    while len(generator.submitted) < 2:
        time.sleep(0.01)
    unary.cancel()
    until_cancelled(generator, 2)
    with pytest.raises(grpc.RpcError) as late:
        stub.Generate(request, timeout=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until_cancelled(generator, 3)


def test_a_caller_who_leaves_in_the_moment_a_message_is_sent_is_heard() -> None:
    """`asyncio.wait_for` of Python 3.11 returns the result of what is just done, and drops the cancellation."""

    async def messages() -> AsyncIterator[pb.StreamResponse]:
        for _ in range(50):
            yield pb.StreamResponse()
            await asyncio.sleep(0)

    async def main() -> None:
        written: list[pb.StreamResponse] = []

        async def write(message: pb.StreamResponse) -> None:
            written.append(message)
            asyncio.get_running_loop().call_soon(task.cancel)

        servicer = SimpleNamespace(open=lambda *_: SimpleNamespace(trailing=()), stream=lambda *_: messages())
        context = SimpleNamespace(invocation_metadata=tuple, set_trailing_metadata=lambda _: None, write=write)
        task = asyncio.ensure_future(_Rpcs(servicer, 10.0).Stream(pb.GenerateRequest(), context))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(written) == 1

    asyncio.run(main())


def test_open_calls_are_bounded_and_given_back(start: Start) -> None:
    generator = FakeGenerator(endless)
    stub = start(generator, limits=LimitSettings(max_open_requests=1))
    request = pb.GenerateRequest(prompt=TEXT)
    stream = stub.Stream(request)
    next(stream)
    code, detail, metadata = refused(lambda: stub.Generate(request))
    assert (code, detail.code, metadata["retry-after"]) == (grpc.StatusCode.UNAVAILABLE, "overloaded", "1")
    stream.cancel()
    until_cancelled(generator, 1)
    with pytest.raises(grpc.RpcError) as late:
        stub.Generate(request, timeout=0.3)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_reflection_tells_the_service_and_its_messages(codec: TextCodec) -> None:
    with FakeGrpcServer(codec, FakeGenerator()) as server, grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)

        def ask(**question: str) -> reflection_pb2.ServerReflectionResponse:
            return next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(**question)])))

        listed = {service.name for service in ask(list_services="").list_services_response.service}
        assert listed == {"penstock.v1.Generation", "grpc.reflection.v1alpha.ServerReflection"}
        files = ask(file_containing_symbol="penstock.v1.Generation").file_descriptor_response.file_descriptor_proto
        assert any(b"GenerateRequest" in file for file in files)


def test_calls_are_counted_by_rpc_and_status(codec: TextCodec) -> None:
    with FakeGrpcServer(codec, FakeGenerator()) as server, grpc.insecure_channel(server.address) as channel:
        stub = GenerationStub(channel)
        stub.Generate(pb.GenerateRequest(prompt=TEXT))
        refused(lambda: stub.Generate(pb.GenerateRequest()))
        page = server.metrics.page().decode()
        labels = 'handler="/penstock.v1.Generation/Generate",method="POST",status='
        for status in (200, 400):
            assert f'penstock_http_requests_total{{{labels}"{status}"}} 1.0' in page


def test_over_tls_only(codec: TextCodec, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with FakeGrpcServer(codec, FakeGenerator(), tls=authority.settings(internal=False)) as server:
        known = grpc.ssl_channel_credentials(authority.file.read_bytes())
        foreign = grpc.ssl_channel_credentials(Authority(tmp_path, "foreign").file.read_bytes())
        with grpc.secure_channel(server.address, known) as channel:
            assert GenerationStub(channel).ListModels(pb.ListModelsRequest(), timeout=10).models
        for stranger in (grpc.secure_channel(server.address, foreign), grpc.insecure_channel(server.address)):
            with stranger, pytest.raises(grpc.RpcError) as caught:
                GenerationStub(stranger).ListModels(pb.ListModelsRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
