"""What callers get for the fields beyond plain generation: scores, echo, the best of several, embeddings, tokens."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fakes.fake_generator import FakeGenerator, Step, deltas
from fakes.http_server import HttpServer

from penstock.cluster.key_file import KeyEntry, key_digest
from penstock.cluster.model_directory import GenerationDefaults
from penstock.cluster.text import TextCodec
from penstock.workers.protocol import EndReason, GenerateRequest

pytestmark = pytest.mark.timeout(60)
JSON = {"content-type": "application/json"}


def post(server: HttpServer, path: str, headers: dict[str, str] | None = None, **body: Any) -> tuple[int, Any]:
    status, _, answer = server.request("POST", path, json.dumps(body).encode(), {**JSON, **(headers or {})})
    return status, json.loads(answer)


def events(server: HttpServer, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = server.request("POST", path, json.dumps({**body, "stream": True}).encode(), JSON)[2]
    lines = answer.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line[6:]) for line in lines[:-2] if line.startswith("data: ")]


def test_echo_scores_the_prompt(serve: Any, codec: TextCodec) -> None:
    """As lm-eval asks: the prompt's tokens first, the first without a logprob, then what was generated."""
    server = serve(FakeGenerator())
    prompt = codec.encode("hello fox", "prompt")
    status, found = post(server, "/v1/completions", prompt=prompt, echo=True, logprobs=1, max_tokens=1)
    assert status == 200
    choice = found["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "hello fox" + codec.decode([prompt[-1]])
    assert logprobs["token_logprobs"] == [None, *(-0.25 * t for t in prompt[1:]), -0.5 * prompt[-1]]
    assert [len(logprobs[name]) for name in ("tokens", "top_logprobs", "text_offset")] == [len(prompt) + 1] * 3
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert [choice["text"][o] for o in logprobs["text_offset"]] == [t[0] for t in logprobs["tokens"]]
    assert "prompt_logprobs" not in choice
    assert found["usage"]["completion_tokens"] == 1


def test_scoring_only(serve: Any, codec: TextCodec) -> None:
    """max_tokens 0 with echo: one token is generated all the same, and nobody sees it."""
    generator = FakeGenerator()
    server = serve(generator)
    body: dict[str, Any] = {"prompt": ["hello", "fox jumps"], "echo": True, "max_tokens": 0, "logprobs": 0}
    status, found = post(server, "/v1/completions", **body)
    assert status == 200
    assert [c["text"] for c in found["choices"]] == ["hello", "fox jumps"]
    assert {c["finish_reason"] for c in found["choices"]} == {"length"}
    for choice, text in zip(found["choices"], body["prompt"], strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(codec.encode(text, "prompt"))
    assert found["usage"]["completion_tokens"] == 0
    assert [r.sampling.max_tokens for r in generator.submitted] == [1, 1]
    streamed = events(server, "/v1/completions", **body)
    for index, text in enumerate(body["prompt"]):
        mine = [c for e in streamed for c in e["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == text
        assert sum(len(c["logprobs"]["tokens"]) for c in mine) == len(codec.encode(text, "prompt"))


def test_echo_streams_as_it_answers(serve: Any) -> None:
    server = serve(FakeGenerator())
    body: dict[str, Any] = {"prompt": "hello fox", "echo": True, "logprobs": 2, "max_tokens": 4, "n": 2, "seed": 1}
    whole = post(server, "/v1/completions", **body)[1]["choices"]
    streamed = events(server, "/v1/completions", **body)
    for index in (0, 1):
        mine = [c for e in streamed for c in e["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == whole[index]["text"]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [x for c in mine for x in c["logprobs"][name]] == whole[index]["logprobs"][name]


@pytest.mark.parametrize("chat", [False, True])
def test_every_chunk_says_that_it_has_no_logprobs(serve: Any, chat: bool) -> None:
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hello fox"}
    streamed = events(serve(FakeGenerator()), "/v1/chat/completions" if chat else "/v1/completions", **prompt)
    choices = [choice for event in streamed for choice in event["choices"]]
    assert choices
    assert all(choice["logprobs"] is None for choice in choices)


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_logprobs(serve: Any, chat: bool) -> None:
    """vLLM's shape: per token a map by id, with text and rank; only the first choice of a prompt scores it."""
    generator = FakeGenerator()
    server = serve(generator)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    prompt: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hello fox"}
    found = post(server, path, **prompt, prompt_logprobs=2, max_tokens=2, n=2)[1]
    scores = (found if chat else found["choices"][0])["prompt_logprobs"]
    ids = generator.submitted[0].prompt
    assert len(scores) == len(ids)
    assert scores[0] is None
    for token, entry in zip(ids[1:], scores[1:], strict=True):
        assert entry[str(token)]["rank"] == 1
        assert entry[str(token)]["logprob"] == -0.25 * token
        assert len(entry) == 2
    assert [r.sampling.prompt_logprobs for r in generator.submitted] == [2, None]


def test_a_lost_score_is_an_error_and_not_a_number(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fakes.fake_generator.fake_scores", lambda request: (None,))
    status, found = post(serve(FakeGenerator()), "/v1/completions", prompt=[5, 6, 7], echo=True, logprobs=1)
    assert (status, found["error"]["type"]) == (500, "server_error")


def test_best_of(serve: Any) -> None:
    """Choice c gives tokens whose logprobs are -0.5 * id each: the smallest sum of ids wins, best first."""

    def script(request: GenerateRequest) -> list[Step]:
        ids = {0: [50, 51], 1: [30, 31], 2: [40, 41], 3: [45]}[request.sampling.choice]
        return deltas(ids, logprobs=request.sampling.logprobs)

    generator = FakeGenerator(script)
    server = serve(generator)
    body: dict[str, Any] = {"prompt": [5, 6], "n": 2, "best_of": 4, "return_token_ids": True, "max_tokens": 2}
    found = post(server, "/v1/completions", **body)[1]
    assert [(c["index"], c["token_ids"]) for c in found["choices"]] == [(0, [45]), (1, [30, 31])]
    assert all(c["logprobs"] is None for c in found["choices"])
    assert found["usage"]["completion_tokens"] == 7  # all that was generated
    assert found["usage"]["prompt_tokens"] == 2
    two = post(server, "/v1/completions", **{**body, "prompt": [[5], [6]], "n": 1, "best_of": 3, "logprobs": 0})[1]
    assert [c["token_ids"] for c in two["choices"]] == [[30, 31], [30, 31]]
    assert two["choices"][1]["logprobs"]["token_logprobs"] == [-15.0, -15.5]


def test_edits_reach_the_sampler(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator()
    server = serve(generator, defaults=GenerationDefaults(repetition_penalty=1.2))
    body: dict[str, Any] = {
        "presence_penalty": -2,
        "frequency_penalty": 0.5,
        "logit_bias": {"7": -100, "5": 1.5, "6": 0},
        "bad_words": ["fox", " fox"],
        "allowed_token_ids": [9, 7, 9],
        "min_tokens": 3,
        "stop_token_ids": [8],
        "max_tokens": 5,
    }
    assert post(server, "/v1/completions", prompt="x", **body)[0] == 200
    assert post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], **body)[0] == 200
    for request in generator.submitted:
        s = request.sampling
        assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (-2.0, 0.5, 1.2)
        assert s.logit_bias == ((5, 1.5), (7, -100.0))
        assert s.allowed_token_ids == (7, 9)
        assert (s.min_tokens, s.max_tokens) == (3, 5)
        assert s.stop_token_ids == (0, 2, 8, 399)
        encode = [tuple(codec.encode(word, "x", add_special_tokens=False)) for word in ("fox", " fox")]
        assert set(s.bad_words) == set(encode)
    post(server, "/v1/completions", prompt="x", ignore_eos=True, repetition_penalty=1.0)
    assert generator.submitted[-1].sampling.stop_token_ids == ()
    assert generator.submitted[-1].sampling.repetition_penalty == 1.0


def test_defaults_of_the_model(serve: Any) -> None:
    """generation_config's bound is the default of chats; a stated one wins; completions keep their 16."""
    generator = FakeGenerator(lambda request: deltas([5]))
    server = serve(generator, defaults=GenerationDefaults(max_tokens=7))
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "max_tokens": 9}),
        ("/v1/chat/completions", {**chat, "max_tokens": 9, "max_completion_tokens": 11}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        assert post(server, path, **body)[0] == 200
    assert [r.sampling.max_tokens for r in generator.submitted] == [7, 9, 11, 16]


def test_truncation(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator()
    server = serve(generator)
    ids = codec.encode("the quick brown fox jumps", "prompt")
    for body in ({"prompt": ids}, {"prompt": "the quick brown fox jumps"}):
        assert post(server, "/v1/completions", **body, truncate_prompt_tokens=2, max_tokens=1)[0] == 200
        assert generator.submitted[-1].prompt == tuple(ids[-2:])
    long = "word " * 5000  # far beyond the context: cut, not refused
    assert post(server, "/v1/completions", prompt=long, truncate_prompt_tokens=-1, max_tokens=12)[0] == 200
    assert generator.submitted[-1].prompt == tuple(codec.encode(long, "prompt")[-500:])
    cut = post(server, "/v1/completions", prompt=long, truncate_prompt_tokens=2, max_tokens=1, echo=True)[1]
    assert cut["choices"][0]["text"].startswith(codec.decode(generator.submitted[-1].prompt))


def test_continue_final_message(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator()
    server = serve(generator)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer"}]
    assert post(server, "/v1/chat/completions", messages=messages, continue_final_message=True, max_tokens=1)[0] == 200
    shown = codec.decode(generator.submitted[-1].prompt, skip_special_tokens=False)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe answer"
    post(server, "/v1/chat/completions", messages=messages, add_generation_prompt=False, max_tokens=1)
    assert codec.decode(generator.submitted[-1].prompt, skip_special_tokens=False).endswith("answer<|im_end|>\n")


def test_min_tokens_and_stop_strings(serve: Any, codec: TextCodec) -> None:
    """A stop within the first `min_tokens` tokens does not count."""
    tokens = codec.encode("fox fox fox", "prompt")
    server = serve(FakeGenerator(lambda request: deltas(tokens, EndReason.LENGTH)))
    assert post(server, "/v1/completions", prompt="x", stop="fox")[1]["choices"][0]["text"] == ""
    first = len(codec.encode("fox", "prompt"))
    found = post(server, "/v1/completions", prompt="x", stop="fox", min_tokens=first)[1]["choices"][0]
    assert (found["text"], found["finish_reason"]) == ("fox ", "stop")


def test_embeddings(serve: Any, codec: TextCodec) -> None:
    generator = FakeGenerator(cached=0)
    server = serve(generator)
    forms: list[Any] = ["hello", ["hello", "fox"], [5, 6], [[5], [6, 7]]]
    wanted = np.array([1, 2, 3, 4], np.float32) / math.sqrt(30)
    for form in forms:
        status, found = post(server, "/v1/embeddings", input=form, model="tiny")
        assert status == 200
        count = 2 if isinstance(form, list) and not isinstance(form[0], int) else 1
        assert [d["index"] for d in found["data"]] == list(range(count))
        for data in found["data"]:
            assert data["object"] == "embedding"
            np.testing.assert_allclose(data["embedding"], wanted, rtol=1e-6)
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"]
        assert all(r.embed and r.sampling.max_tokens == 1 for r in generator.submitted)
    packed = post(server, "/v1/embeddings", input="hello", encoding_format="base64")[1]["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed), "<f4"), wanted, rtol=1e-6)


def test_a_model_without_embeddings_refuses_them(serve: Any) -> None:
    """Row 89 of the list of bad inputs."""
    server = serve(FakeGenerator(embeds=False))
    status, found = post(server, "/v1/embeddings", input="hello")
    assert (status, found["error"]["code"]) == (400, "bad_request")
    assert "no embeddings" in found["error"]["message"]


def test_tokenize_and_back(serve: Any, codec: TextCodec) -> None:
    server = serve(FakeGenerator())
    text = "naïve ☃ fox"
    ids = codec.encode(text, "prompt")
    found = post(server, "/tokenize", prompt=text, return_token_strs=True, model="tiny")[1]
    assert found["tokens"] == ids
    assert (found["count"], found["max_model_len"]) == (len(ids), 512)
    assert len(found["token_strs"]) == len(ids)
    assert post(server, "/detokenize", tokens=ids)[1] == {"prompt": text}
    chat = post(server, "/tokenize", messages=[{"role": "user", "content": "hi"}])[1]
    assert codec.decode(chat["tokens"], False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert chat["token_strs"] is None
    assert post(server, "/tokenize", prompt="")[1]["tokens"] == []
    assert post(server, "/tokenize", prompt="word " * 2000)[1]["count"] > 512  # whole documents, for callers who cut


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a*"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"continue_final_message": 7}, "continue_final_message"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
def test_what_says_nothing_of_a_prompt_may_still_not_be_wrong(serve: Any, wrong: dict[str, Any], field: str) -> None:
    status, found = post(serve(FakeGenerator()), "/tokenize", prompt="x", **wrong)
    assert (status, found["error"]["param"]) == (400, field)


def test_tools_beside_a_prompt_to_tokenize_change_nothing(serve: Any) -> None:
    server = serve(FakeGenerator())
    tools = [{"type": "function", "function": {"name": "a"}}]
    assert post(server, "/tokenize", prompt="x", tools=tools)[1] == post(server, "/tokenize", prompt="x")[1]


def test_tokenizer_info_version_live(serve: Any) -> None:
    server = serve(FakeGenerator(), enable_tokenizer_info=True)
    found = json.loads(server.request("GET", "/tokenizer_info")[2])
    assert found["eos_token"] == "<|im_end|>"
    assert "im_start" in found["chat_template"]
    assert set(json.loads(server.request("GET", "/version")[2])) == {"version"}
    assert server.request("GET", "/live")[0] == 200


def test_ignored_fields_are_named_when_asked(serve: Any) -> None:
    server = serve(FakeGenerator())
    body = json.dumps({"prompt": "x", "odd": 1, "b\r\nx: y": 2, "é": 3, "user": "u", "max_tokens": 1}).encode()
    assert "x-penstock-ignored-fields" not in server.request("POST", "/v1/completions", body, JSON)[1]
    headers = {**JSON, "x-penstock-debug": "fields"}
    assert server.request("POST", "/v1/completions", body, headers)[1]["x-penstock-ignored-fields"] == "odd"


def test_timings_on_request(serve: Any) -> None:
    server = serve(FakeGenerator())
    body: dict[str, Any] = {"prompt": "x", "max_tokens": 2}
    asking = {**JSON, "x-penstock-timings": "1"}
    found = server.request("POST", "/v1/completions", json.dumps(body).encode(), asking)[1]
    assert float(found["x-penstock-total-ms"]) >= float(found["x-penstock-first-token-ms"]) >= 0
    stream = server.request("POST", "/v1/completions", json.dumps({**body, "stream": True}).encode(), asking)[2]
    assert b"\n\n: x-penstock-timings " in stream
    assert stream.endswith(b"data: [DONE]\n\n")
    assert "x-penstock-total-ms" not in server.request("POST", "/v1/completions", json.dumps(body).encode(), JSON)[1]


def test_limits_of_a_key_over_http(serve: Any) -> None:
    """429 with Retry-After, told apart by code; another key is not touched; the tenant reaches router and caches."""
    keys = (
        KeyEntry("a", key_digest("sk-a"), tenant="research", requests_per_minute=3, tokens_per_minute=50),
        KeyEntry("b", key_digest("sk-b"), tenant="other"),
    )
    generator = FakeGenerator()
    server = serve(generator, keys=keys)
    first, second = ({**JSON, "authorization": f"Bearer sk-{name}"} for name in "ab")
    body = json.dumps({"prompt": [5] * 20, "max_tokens": 40}).encode()
    assert server.request("POST", "/v1/completions", body, first)[0] == 200
    status, headers, answer = server.request("POST", "/v1/completions", body, first)
    error = json.loads(answer)["error"]
    assert (status, error["type"], error["code"]) == (429, "rate_limit_exceeded", "tokens_per_minute")
    assert int(headers["retry-after"]) > 10
    server.request("POST", "/tokenize", b'{"prompt":"x"}', first)
    answer = server.request("POST", "/tokenize", b'{"prompt":"x"}', first)[2]
    assert json.loads(answer)["error"]["code"] == "requests_per_minute"
    assert server.request("POST", "/v1/completions", body, second)[0] == 200
    one, two = generator.submitted
    assert (one.tenant, two.tenant) == ("research", "other")
    assert one.prefix_root != two.prefix_root


def test_most_tokens_of_a_key(serve: Any) -> None:
    """A stated number beyond it is refused; who states none gets no more."""
    generator = FakeGenerator()
    server = serve(generator, keys=(KeyEntry("a", key_digest("sk-a"), max_tokens=6),))
    headers = {**JSON, "authorization": "Bearer sk-a"}
    chat = {"messages": [{"role": "user", "content": "x"}]}
    for path, body, status in (
        ("/v1/completions", {"prompt": "x"}, 200),
        ("/v1/completions", {"prompt": "x", "max_tokens": 6}, 200),
        ("/v1/completions", {"prompt": "x", "max_tokens": 7}, 403),
        ("/v1/completions", {"prompt": "x", "min_tokens": 7}, 403),
        ("/v1/chat/completions", {**chat, "max_completion_tokens": 7}, 403),
        ("/v1/chat/completions", chat, 200),
        ("/v1/embeddings", {"input": "x"}, 200),
    ):
        found, _, answer = server.request("POST", path, json.dumps(body).encode(), headers)
        assert found == status, answer
        if status == 403:
            assert json.loads(answer)["error"]["code"] == "max_tokens_not_allowed"
    assert [request.sampling.max_tokens for request in generator.submitted] == [6, 6, 6, 1]


def test_open_requests_of_a_key(serve: Any) -> None:
    """Row 92: streams that nobody reads count until they are over."""

    def slow(request: GenerateRequest) -> Iterator[Step]:
        for step in deltas([5] * 400):
            yield 0.01
            yield step

    generator = FakeGenerator(slow)
    server = serve(generator, keys=(KeyEntry("a", key_digest("sk-a"), max_open_requests=1),))
    headers = {**JSON, "authorization": "Bearer sk-a"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        body = {"prompt": [5], "max_tokens": 400, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as stream:
            assert stream.status_code == 200
            refused = client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_limit")
            assert refused.headers["retry-after"] == "1"


def test_fingerprint_and_floor(serve: Any) -> None:
    server = serve(FakeGenerator())
    one = post(server, "/v1/completions", prompt="x", max_tokens=1)[1]
    two = post(server, "/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=1)[1]
    assert one["system_fingerprint"] == two["system_fingerprint"]
    assert one["system_fingerprint"].startswith("fp_")
    assert one["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
