"""The `openai` package against the application: streamed and not, sync and async, and what its users see on errors."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from fakes.fake_generator import FakeGenerator, Step, deltas

from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest

pytestmark = pytest.mark.timeout(60)
MESSAGES: Any = [{"role": "user", "content": "hello world"}]


def client_of(server: Any, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=more.pop("api_key", "none"), max_retries=0, **more)


def says(codec: TextCodec, text: str, end: EndReason = EndReason.LENGTH, size: int = 1) -> Any:
    tokens = codec.encode(text, "prompt")
    return lambda request: deltas(tokens, end, size, request.sampling.logprobs)


def test_completion_and_chat_whole(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator(says(codec, "naïve café ☃ fox"), cached=3)
    with client_of(serve(generator)) as client:
        whole = client.completions.create(model="tiny", prompt="hello world", max_tokens=40)
        chat = client.chat.completions.create(model="other-name", messages=MESSAGES)
    assert whole.choices[0].text == "naïve café ☃ fox"
    assert whole.choices[0].finish_reason == "length"
    assert whole.object == "text_completion"
    assert whole.id.startswith("cmpl-")
    assert chat.choices[0].message.content == "naïve café ☃ fox"
    assert chat.choices[0].message.role == "assistant"
    assert chat.model == "other-name"
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(generator.submitted[1].prompt)
    assert chat.usage.completion_tokens == len(codec.encode("naïve café ☃ fox", "prompt"))
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 3


def test_streams_join_to_the_whole(serve: Any, codec: TextCodec) -> None:
    text = "naïve café ☃ jumps"
    with client_of(serve(FakeGenerator(says(codec, text)))) as client:
        chunks = list(client.completions.create(model="tiny", prompt="x", max_tokens=64, stream=True))
        chat = list(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
        )
    assert "".join(c.choices[0].text for c in chunks) == text
    assert [c.choices[0].finish_reason for c in chunks].count("length") == 1
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chat[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chat if c.choices) == text
    assert chat[-2].choices[0].finish_reason == "length"
    assert chat[-2].choices[0].delta.content is None
    assert chat[-1].choices == []
    assert chat[-1].usage is not None
    assert chat[-1].usage.completion_tokens == len(codec.encode(text, "prompt"))
    assert all(c.usage is None for c in chat[:-1])
    assert len({c.id for c in chat}) == 1


def test_continuous_usage(serve: Any, codec: TextCodec) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    with client_of(serve(FakeGenerator(says(codec, "hello")))) as client:
        chunks = list(
            client.completions.create(model="tiny", prompt="x", max_tokens=9, stream=True, stream_options=options)
        )
    counted = [c.usage.completion_tokens for c in chunks if c.usage]
    assert counted == [*range(1, len(chunks)), len(chunks) - 1]


def test_async_streams_run_side_by_side(serve: Any, codec: TextCodec) -> None:
    def script(request: GenerateRequest) -> list[Step]:
        steps: list[Step] = []
        for step in deltas(request.prompt * 3):
            steps += [0.01, step]
        return steps

    server = serve(FakeGenerator(script))

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(model="tiny", prompt=prompt, stream=True)
        return "".join([c.choices[0].text async for c in stream])

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, f"fox {i} ") for i in range(8)))

    assert asyncio.run(several()) == [f"fox {i} " * 3 for i in range(8)]


def test_n_choices_and_batches(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator()
    with client_of(serve(generator)) as client:
        answer = client.completions.create(model="tiny", prompt=[[5, 6, 7], [8, 9, 10]], n=2, max_tokens=3, seed=7)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    texts = [codec.decode(t) for t in ([7, 6, 5], [6, 5, 7], [10, 9, 8], [9, 8, 10])]
    assert [c.text for c in answer.choices] == texts
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, 12)
    assert {r.sampling.seed for r in generator.submitted} == {7}
    assert sorted((r.prompt, r.sampling.choice) for r in generator.submitted) == [
        ((5, 6, 7), 0),
        ((5, 6, 7), 1),
        ((8, 9, 10), 0),
        ((8, 9, 10), 1),
    ]


def test_logprobs(serve: Any, codec: TextCodec) -> None:
    tokens = codec.encode("fox ☃", "prompt")
    script = lambda request: deltas(tokens, logprobs=request.sampling.logprobs)  # noqa: E731
    with client_of(serve(FakeGenerator(script))) as client:
        whole = client.completions.create(model="tiny", prompt="x", logprobs=2)
        chat = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
        parts = list(client.completions.create(model="tiny", prompt="x", logprobs=2, stream=True))
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs == [-0.5 * t for t in tokens]
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0
    assert logprobs.top_logprobs is not None
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert any(token.startswith("bytes:\\x") for token in logprobs.tokens)  # ☃ has three bytes, none of them a text
    content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert bytes([b for entry in content for b in entry.bytes or []]).decode() == "fox ☃"
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(tokens)
    streamed = [t for c in parts for t in c.choices[0].logprobs.tokens]  # type: ignore[union-attr]
    offsets = [o for c in parts for o in c.choices[0].logprobs.text_offset]  # type: ignore[union-attr]
    assert (streamed, offsets) == (logprobs.tokens, logprobs.text_offset)


@pytest.mark.parametrize(
    ("code", "raised", "status"),
    [
        (FailureCode.OVERLOADED, openai.InternalServerError, 503),
        (FailureCode.TENANT_LIMIT, openai.RateLimitError, 429),
        (FailureCode.TOO_LARGE, openai.BadRequestError, 400),
        (FailureCode.DEADLINE, openai.InternalServerError, 504),
        (FailureCode.INTERNAL, openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_before_the_first_token_keep_their_status(
    serve: Any, code: FailureCode, raised: type[openai.APIStatusError], status: int, stream: bool
) -> None:
    generator = FakeGenerator(lambda request: [RefusedError(code, "not now", 3.0)])
    with client_of(serve(generator)) as client, pytest.raises(raised) as caught:
        client.completions.create(model="tiny", prompt="x", stream=stream)
    assert caught.value.status_code == status
    assert "not now" in str(caught.value)
    assert caught.value.response.headers["retry-after"] == "3"


def test_a_failure_in_mid_stream_raises_in_the_client(serve: Any) -> None:
    steps = [*deltas([5, 6, 7])[:2], RefusedError(FailureCode.WORKER_LOST, "worker died")]
    server = serve(FakeGenerator(lambda request: steps))
    seen: list[str] = []
    with client_of(server) as client:
        completion = client.completions.create(model="tiny", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="worker died"):
            seen.extend(chunk.choices[0].text for chunk in completion)
        assert len(seen) == 2
        chat = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="worker died"):
            list(chat)

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model="tiny", prompt="x", stream=True)
            async for _ in stream:
                pass

    with pytest.raises(openai.APIError, match="worker died"):
        asyncio.run(main())


def test_an_unexpected_failure_says_nothing_internal(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    generator = FakeGenerator(lambda request: [ValueError("/secret/path")])
    with client_of(serve(generator)) as client, pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="tiny", prompt="x")
    assert "secret" not in str(caught.value)
    assert "secret" in caplog.text


def test_keys_and_models(serve: Any) -> None:
    server = serve(FakeGenerator(), api_key="open-sesame")
    with client_of(server, api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(model="tiny", prompt="x")
    with client_of(server, api_key="open-sesame") as client:
        assert [m.id for m in client.models.list()] == ["tiny", "other-name"]
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("../../etc")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="nobody", prompt="x")


def test_stop_strings_are_cut_and_cancel_the_rest(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator(says(codec, "the quick brown ☃ fox jumps over"))
    server = serve(generator)
    with client_of(server) as client:
        whole = client.completions.create(model="tiny", prompt="x", max_tokens=90, stop=["n ☃ f", "zzz"])
        parts = list(client.completions.create(model="tiny", prompt="x", max_tokens=90, stop=["n ☃ f"], stream=True))
        kept = client.completions.create(
            model="tiny", prompt="x", max_tokens=90, stop="☃", extra_body={"include_stop_str_in_output": True}
        )
    assert whole.choices[0].text == "the quick brow"
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].text for c in parts) == "the quick brow"
    assert kept.choices[0].text == "the quick brown ☃"
    assert len(generator.cancelled) == 3
    assert whole.usage is not None
    assert whole.usage.completion_tokens < len(codec.encode("the quick brown ☃ fox jumps over", "prompt"))


def test_a_stop_token_has_no_text(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator(says(codec, "hello fox", EndReason.STOP))
    last = codec.encode("hello fox", "prompt")[-1]
    with client_of(serve(generator)) as client:
        answer = client.completions.create(
            model="tiny", prompt="x", extra_body={"stop_token_ids": [last], "return_token_ids": True}
        )
    assert answer.choices[0].text == codec.decode(codec.encode("hello fox", "prompt")[:-1])
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == codec.encode("hello fox", "prompt")
    assert answer.choices[0].model_extra["prompt_token_ids"] == codec.encode("x", "prompt")
