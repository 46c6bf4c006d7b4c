"""Clients that are at hand everywhere, unchanged, against a running split cluster: openai, curl, a gRPC stub."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import grpc
import openai
import pytest

from penstock.cluster.client import connect
from penstock.cluster.grpc_front import penstock_pb2 as pb
from penstock.cluster.grpc_front.rpcs import GenerationStub

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]
MESSAGES: Any = [{"role": "user", "content": "What is 17 + 25?"}]
ANSWER = "17 + 25 = 42."


@pytest.fixture
def client(cluster: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=cluster.base_url, api_key=cluster.key, max_retries=0) as client:
        yield client


def test_openai(client: openai.OpenAI, cluster: Any) -> None:
    assert [model.id for model in client.models.list()] == [cluster.model]
    chat = client.chat.completions.create(model=cluster.model, messages=MESSAGES, temperature=0, logprobs=True)
    assert chat.choices[0].message.content == ANSWER
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage is not None
    assert chat.usage.completion_tokens == len(chat.choices[0].logprobs.content)
    text = client.completions.create(model=cluster.model, prompt="17 + 25 =", max_tokens=3, logprobs=2, echo=True)
    assert text.choices[0].text.startswith("17 + 25 =")
    assert text.choices[0].logprobs.token_logprobs[0] is None
    assert len(text.choices[0].logprobs.tokens) == text.usage.total_tokens
    vectors = client.embeddings.create(model=cluster.model, input=["one", "two"]).data
    assert [len(vector.embedding) for vector in vectors] == [160, 160]


def test_openai_streams(client: openai.OpenAI, cluster: Any) -> None:
    options: Any = {"stream_options": {"include_usage": True}, "temperature": 0}
    with client.chat.completions.create(model=cluster.model, messages=MESSAGES, stream=True, **options) as stream:
        chunks = list(stream)
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == ANSWER
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens > 5


def test_openai_calls_a_tool(client: openai.OpenAI, cluster: Any) -> None:
    numbers = {"n": {"enum": [17, 25]}}
    schema = {"type": "object", "properties": numbers, "required": ["n"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": schema}}
    options: Any = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "temperature": 0}
    choice = client.chat.completions.create(model=cluster.model, messages=MESSAGES, **options).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "look_up")
    assert json.loads(call.function.arguments)["n"] in (17, 25)
    with client.chat.completions.stream(model=cluster.model, messages=MESSAGES, **options) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert streamed.tool_calls[0].function.arguments == call.function.arguments
    answered = [*MESSAGES, streamed.model_dump(include={"role", "content"}) | {"tool_calls": [call.model_dump()]}]
    answered.append({"role": "tool", "tool_call_id": call.id, "content": "42"})
    create = client.chat.completions.create
    assert create(model=cluster.model, messages=answered, tools=[tool], max_tokens=3).choices[0].message.content


def test_openai_on_asyncio(cluster: Any) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=cluster.base_url, api_key=cluster.key) as client:
            create = client.chat.completions.create
            answers = await asyncio.gather(
                *(create(model=cluster.model, messages=MESSAGES, temperature=0) for _ in range(4))
            )
            assert {answer.choices[0].message.content for answer in answers} == {ANSWER}
            stream = await create(model=cluster.model, messages=MESSAGES, temperature=0, stream=True)
            assert "".join([c.delta.content or "" async for chunk in stream for c in chunk.choices]) == ANSWER

    asyncio.run(main())


def test_openai_hears_typed_errors(client: openai.OpenAI, cluster: Any) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model=cluster.model, messages=MESSAGES, temperature=-1)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "out_of_range")
    with pytest.raises(openai.BadRequestError) as long:
        create(model=cluster.model, messages=[{"role": "user", "content": "word " * 3000}])
    assert long.value.code == "context_length_exceeded"
    assert "prompt is too long" in long.value.message
    with pytest.raises(openai.NotFoundError):
        create(model="nobody", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError) as key:
        client.with_options(api_key="wrong").models.list()
    assert key.value.code == "invalid_api_key"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(cluster: Any) -> None:
    def curl(path: str, *options: str) -> str:
        command = ["curl", "-sS", "--max-time", "30", f"{cluster.url}{path}", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    key = ("-H", f"Authorization: Bearer {cluster.key}")
    body = {"model": cluster.model, "messages": MESSAGES, "temperature": 0}
    posted = (*key, "-H", "Content-Type: application/json", "-d")
    answer = json.loads(curl("/v1/chat/completions", *posted, json.dumps(body)))
    assert answer["choices"][0]["message"]["content"] == ANSWER
    streamed = curl("/v1/chat/completions", "-N", *posted, json.dumps({**body, "stream": True})).split("\n\n")
    assert streamed[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: ")) for event in streamed[:-2]]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == ANSWER
    assert json.loads(curl("/v1/models", *key))["data"][0]["id"] == cluster.model
    assert curl("/v1/models", "-o", "/dev/null", "-w", "%{http_code}") == "401"
    assert json.loads(curl("/health")) == {"status": "ok"}


def test_grpc_says_the_same(cluster: Any) -> None:
    chat = pb.Conversation(messages=[pb.ChatMessage(role="user", content=MESSAGES[0]["content"])])
    request = pb.GenerateRequest(prompt=pb.Prompt(chat=chat), sampling=pb.Sampling(temperature=0.0))
    key = (("authorization", f"Bearer {cluster.key}"),)
    with grpc.insecure_channel(f"127.0.0.1:{cluster.grpc_port}") as channel:
        stub = GenerationStub(channel)
        assert stub.Generate(request, metadata=key).choices[0].text == ANSWER
        assert "".join(c.text for m in stub.Stream(request, metadata=key) for c in m.choices) == ANSWER
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(request)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_python_handle_says_the_same(cluster: Any) -> None:
    with connect(cluster.url, cluster.key) as handle:
        answers = handle.batch([MESSAGES] * 6, progress=False, temperature=0)
        assert {answer.text for answer in answers} == {ANSWER}
        assert handle.detokenize(handle.tokenize("17 + 25")) == "17 + 25"
        score = handle.score("Hello, how are you?")
        assert len(score.logprobs) == len(score.token_ids) > 3
        vectors = handle.embed(["one", "two", "one"]).vectors
        assert abs(vectors[0] - vectors[2]).max() < 1e-5 < abs(vectors[0] - vectors[1]).max()
