"""What the Python handle sends and gets, typed: options in, completions, chunks and errors out.

Used by `client.py`. Pure: dictionaries and bytes in, frozen values out. Knows no transport.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from penstock.workers.errors import PenstockError, RefusedError, RequestError
from penstock.workers.protocol import FailureCode

__all__ = ["Unpack"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
_STATUS_CODES = {429: FailureCode.TENANT_LIMIT, 503: FailureCode.OVERLOADED, 504: FailureCode.DEADLINE}


class Options(TypedDict, total=False):
    """Keyword arguments of every call; absent ones take the server's defaults."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    seed: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int  # alternatives beside each chosen token, 0..20
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    cache_salt: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's natural-log probability and its alternatives by token text."""

    token: str
    logprob: float
    top: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `text` and `token_ids` are the first choice's."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first choice."""
        return self.choices[0].token_ids


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of choice `index`; the stream's last one is empty and carries `usage`."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One line of a stream."""

    chunks: tuple[Chunk, ...] = ()
    done: bool = False


def path_and_body(prompt: Prompt, options: Options, stream: bool) -> tuple[str, dict[str, Any]]:
    """Where a call goes and what it says."""
    body: dict[str, Any] = {**options, "return_token_ids": True, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    if isinstance(prompt, str):
        return "/v1/completions", {**body, "prompt": prompt}
    items = list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        top = body.pop("logprobs", None)
        chosen = {} if top is None else {"logprobs": True, "top_logprobs": top}
        return "/v1/chat/completions", {**body, **chosen, "messages": items}
    return "/v1/completions", {**body, "prompt": items}


def completion_of(answer: Mapping[str, Any]) -> Completion:
    """A whole answer of either API."""
    choices = tuple(
        Choice(
            index=raw["index"],
            text=raw["message"]["content"] if "message" in raw else raw["text"],
            token_ids=tuple(raw.get("token_ids") or ()),
            finish_reason=raw["finish_reason"],
            logprobs=_logprobs(raw.get("logprobs")),
        )
        for raw in answer["choices"]
    )
    return Completion(answer["id"], answer["model"], choices, _usage(answer["usage"]))


def read_event(line: str) -> StreamEvent:
    """One line of server-sent events; comments and blank lines are empty events. Raises what an error event says."""
    if not line.startswith("data:"):
        return StreamEvent()
    data = line[len("data:") :].strip()
    if data == "[DONE]":
        return StreamEvent(done=True)
    raw = json.loads(data)
    if "error" in raw:
        raise _error(500, raw["error"], None)
    chunks = [
        Chunk(
            index=choice["index"],
            text=choice["delta"].get("content") or "" if "delta" in choice else choice["text"],
            token_ids=tuple(choice.get("token_ids") or ()),
            finish_reason=choice["finish_reason"],
            logprobs=_logprobs(choice.get("logprobs")),
        )
        for choice in raw["choices"]
        if choice.get("delta") != {"role": "assistant", "content": ""}
    ]
    if not raw["choices"] and raw.get("usage"):
        chunks.append(Chunk(usage=_usage(raw["usage"])))
    return StreamEvent(tuple(chunks))


def problem_of(status: int, body: bytes, headers: Mapping[str, str]) -> PenstockError:
    """The typed error behind an answer that is not 200."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"HTTP {status}", "code": None}
    after = headers.get("retry-after", "")
    return _error(status, error, float(after) if after.isdigit() else None)


def unreachable(url: str, error: Exception) -> RefusedError:
    """Nobody answers."""
    return RefusedError(FailureCode.NO_WORKER, f"cannot reach {url}: {error}")


def broken_stream() -> RefusedError:
    """The stream ended without its end."""
    return RefusedError(FailureCode.WORKER_LOST, "the stream broke before its end")


def _error(status: int, error: Mapping[str, Any], retry_after_s: float | None) -> PenstockError:
    message, code = str(error.get("message")), error.get("code")
    known = {item.value: item for item in FailureCode}
    is_request = error.get("type") in {"invalid_request_error", "not_found_error", "authentication_error"}
    if is_request or (status < 500 and status not in _STATUS_CODES):
        return RequestError(message, field=error.get("param"), code=code)
    failure = known.get(str(code)) or _STATUS_CODES.get(status, FailureCode.INTERNAL)
    return RefusedError(failure, message, retry_after_s)


def _usage(raw: Mapping[str, Any]) -> Usage:
    details = raw.get("prompt_tokens_details") or {}
    return Usage(raw["prompt_tokens"], raw["completion_tokens"], details.get("cached_tokens", 0))


def _logprobs(raw: Mapping[str, Any] | None) -> tuple[TokenLogprobs, ...] | None:
    if raw is None:
        return None
    if "content" in raw:
        return tuple(
            TokenLogprobs(e["token"], e["logprob"], {t["token"]: t["logprob"] for t in e["top_logprobs"]})
            for e in raw["content"]
        )
    columns = zip(raw["tokens"], raw["token_logprobs"], raw["top_logprobs"], strict=True)
    return tuple(TokenLogprobs(token, value, top) for token, value, top in columns)
