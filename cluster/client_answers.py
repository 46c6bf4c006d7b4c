"""What the Python handle gets back, typed: completions, chunks, scores, vectors and errors.

Used by `client_calls.py` and the two handles. Pure: dictionaries and bytes in, frozen values out. Knows no transport.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import PenstockError, RefusedError, RequestError
from penstock.workers.protocol import FailureCode

_STATUS_CODES = {429: FailureCode.TENANT_LIMIT, 503: FailureCode.OVERLOADED, 504: FailureCode.DEADLINE}
_OTHER_NAMES = {"adapter_unavailable": FailureCode.ADAPTER}
_CALLERS_FAULT = {"invalid_request_error", "not_found_error", "authentication_error", "permission_error"}


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call. `cached_tokens`: prompt tokens whose KV came from a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One token's natural-log probability and the most likely tokens in its place, by text.

    `logprob` is None for the first token of a prompt: nothing precedes it.
    """

    token: str
    logprob: float | None
    top: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for; `arguments` is the text of a JSON object.

    In a chunk it is a piece: call `index` gets its id and name once, and its arguments bit by bit.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished choice. What was not asked for is None."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_token_ids: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None  # one per prompt token
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. `text`, `token_ids`, `tool_calls` and `prompt_logprobs` are the first choice's."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage
    request_id: str = ""  # as the caller gave it, else the answer's own id

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the first choice."""
        return self.choices[0].token_ids

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Tool calls of the first choice."""
        return self.choices[0].tool_calls

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        """Of the first choice's prompt."""
        return self.choices[0].prompt_logprobs


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of choice `index`; the stream's last one is empty and carries `usage`."""

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    usage: Usage | None = None
    id: str = ""  # of the answer
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds a prompt. `logprobs[i]` is of `token_ids[i]` after all before it; the first has none."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    usage: Usage

    @property
    def total(self) -> float:
        """Natural-log probability of the prompt after its first token."""
        return math.fsum(entry.logprob for entry in self.logprobs if entry.logprob is not None)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability per token; NaN for a prompt of one token."""
        scored = len(self.logprobs) - 1
        return math.exp(-self.total / scored) if scored > 0 else math.nan


@dataclass(frozen=True, slots=True)
class Embeddings:
    """`vectors` is float32 [inputs, hidden size], each row of length 1."""

    vectors: NDArray[np.float32]
    usage: Usage


@dataclass(frozen=True, slots=True)
class StreamEvent:
    """One line of a stream."""

    chunks: tuple[Chunk, ...] = ()
    done: bool = False


def completion_of(answer: Mapping[str, Any], headers: Mapping[str, str]) -> Completion:
    """A whole answer of either API."""
    choices = tuple(
        Choice(
            index=raw["index"],
            text=(raw["message"]["content"] or "") if "message" in raw else raw["text"],
            token_ids=tuple(raw.get("token_ids") or ()),
            finish_reason=raw["finish_reason"],
            logprobs=_logprobs(raw.get("logprobs")),
            prompt_token_ids=_prompt_ids(answer, raw),
            prompt_logprobs=_prompt_logprobs(answer, raw),
            tool_calls=_tool_calls(raw.get("message", {})),
        )
        for raw in answer["choices"]
    )
    request_id = headers.get("x-request-id") or answer["id"]
    return Completion(answer["id"], answer["model"], choices, _usage(answer["usage"]), request_id)


def score_of(answer: Mapping[str, Any], headers: Mapping[str, str]) -> Score:
    """A whole answer whose prompt was scored."""
    raw = answer["choices"][0]
    return Score(_prompt_ids(answer, raw), _prompt_logprobs(answer, raw) or (), _usage(answer["usage"]))


def embeddings_of(answer: Mapping[str, Any], headers: Mapping[str, str]) -> Embeddings:
    """Vectors in the order of the inputs, sent as base64 of little-endian float32."""
    rows = sorted(answer["data"], key=lambda row: int(row["index"]))
    vectors = np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in rows]).astype(np.float32)
    return Embeddings(vectors, _usage({"completion_tokens": 0, **answer["usage"]}))


def joined(parts: list[Embeddings]) -> Embeddings:
    """The answers of several requests as one."""
    usage = Usage(sum(p.usage.prompt_tokens for p in parts), 0, sum(p.usage.cached_tokens for p in parts))
    return Embeddings(np.concatenate([part.vectors for part in parts]), usage)


def token_ids_of(answer: Mapping[str, Any], headers: Mapping[str, str]) -> tuple[int, ...]:
    """The answer of /tokenize."""
    return tuple(answer["tokens"])


def text_of(answer: Mapping[str, Any], headers: Mapping[str, str]) -> str:
    """The answer of /detokenize."""
    return str(answer["prompt"])


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
            id=raw["id"],
            tool_calls=_tool_calls(choice.get("delta", {})),
        )
        for choice in raw["choices"]
        if choice.get("delta") != {"role": "assistant", "content": ""}
    ]
    if not raw["choices"] and raw.get("usage"):
        chunks.append(Chunk(usage=_usage(raw["usage"]), id=raw["id"]))
    return StreamEvent(tuple(chunks))


def problem_of(status: int, body: bytes, headers: Mapping[str, str]) -> PenstockError:
    """The typed error behind an answer that is not 200."""
    try:
        error = json.loads(body)["error"]
        error["message"]
    except (ValueError, KeyError, TypeError):
        error = {"message": f"HTTP {status}", "code": None}
    after = headers.get("retry-after", "")
    return _error(status, error, float(after) if after.isdigit() else None)


def unreachable(url: str, error: Exception) -> RefusedError:
    """Nobody answers."""
    return RefusedError(FailureCode.NO_WORKER, f"cannot reach {url}: {error or type(error).__name__}")


def broken_stream() -> RefusedError:
    """The stream ended without its end."""
    return RefusedError(FailureCode.WORKER_LOST, "the stream broke before its end")


def not_an_answer(url: str) -> RefusedError:
    """Something answers, but nothing that makes sense here."""
    return RefusedError(FailureCode.INCOMPATIBLE, f"what answers at {url} is not Penstock, or another version of it")


def _error(status: int, error: Mapping[str, Any], retry_after_s: float | None) -> PenstockError:
    message, code = str(error.get("message")), error.get("code")
    known = {item.value: item for item in FailureCode} | _OTHER_NAMES
    if error.get("type") in _CALLERS_FAULT or (status < 500 and status not in _STATUS_CODES):
        return RequestError(message, field=error.get("param"), code=code)
    failure = known.get(str(code)) or _STATUS_CODES.get(status, FailureCode.INTERNAL)
    return RefusedError(failure, message, retry_after_s)


def _tool_calls(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """Of a message or a delta; whole messages do not count their calls."""
    found = []
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function") or {}
        stated = call.get("index", index), call.get("id") or "", function.get("name") or ""
        found.append(ToolCall(*stated, function.get("arguments") or ""))
    return tuple(found)


def _usage(raw: Mapping[str, Any]) -> Usage:
    details = raw.get("prompt_tokens_details") or {}
    return Usage(raw["prompt_tokens"], raw["completion_tokens"], details.get("cached_tokens", 0))


def _prompt_ids(answer: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[int, ...]:
    """A completion tells them per choice, a chat once."""
    return tuple(choice.get("prompt_token_ids") or answer.get("prompt_token_ids") or ())


def _prompt_logprobs(answer: Mapping[str, Any], choice: Mapping[str, Any]) -> tuple[TokenLogprobs, ...] | None:
    """vLLM's form: per token a map from token id to logprob, text and rank, the token itself among them."""
    raw = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    if raw is None:
        return None
    found = []
    for token, entries in zip(_prompt_ids(answer, choice), raw, strict=True):
        if entries is None:
            found.append(TokenLogprobs(f"token_id:{token}", None, {}))
            continue
        own = entries[str(token)]
        top = {entry["decoded_token"]: entry["logprob"] for entry in entries.values() if entry["rank"]}
        found.append(TokenLogprobs(own["decoded_token"], own["logprob"], top))
    return tuple(found)


def _logprobs(raw: Mapping[str, Any] | None) -> tuple[TokenLogprobs, ...] | None:
    if raw is None:
        return None
    if "content" in raw:
        return tuple(
            TokenLogprobs(e["token"], e["logprob"], {t["token"]: t["logprob"] for t in e["top_logprobs"]})
            for e in raw["content"]
        )
    columns = zip(raw["tokens"], raw["token_logprobs"], raw["top_logprobs"], strict=True)
    return tuple(TokenLogprobs(token, value, top or {}) for token, value, top in columns)
