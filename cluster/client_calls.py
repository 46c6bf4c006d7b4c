"""What the Python handle sends: prompts and options as requests of the HTTP API. Nothing is sent here.

Used by the two handles. A `Call` knows where it goes, its body, and how its answer is read, so that the blocking and
the asyncio handle differ in nothing but waiting. Options have the names and meanings of the HTTP fields, and the
server checks them; only what could not even be sent, or is no option at all, is refused here.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Generic, TypedDict, TypeVar, Unpack

from penstock.cluster.client_answers import (
    Completion,
    Embeddings,
    Score,
    completion_of,
    embeddings_of,
    score_of,
    text_of,
    token_ids_of,
)
from penstock.workers.errors import RequestError

__all__ = ["Unpack"]

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
MAX_INPUTS = 128  # texts in one embeddings request; the server's default limit
Answer = TypeVar("Answer")


class Options(TypedDict, total=False):
    """Keyword arguments of generating calls; absent ones take the server's defaults."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    n: int
    best_of: int  # text and token prompts only
    seed: int
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    bad_words: list[str]
    allowed_token_ids: list[int]
    emitted_token_ids: list[int]  # what the answer has already
    forbidden_next_token_ids: list[int]
    min_tokens: int
    stop: str | list[str]
    stop_token_ids: list[int]
    ignore_eos: bool
    logprobs: int  # alternatives beside each chosen token, 0..20
    prompt_logprobs: int  # the same beside every prompt token
    echo: bool  # text and token prompts only
    skip_special_tokens: bool
    include_stop_str_in_output: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int
    response_format: Mapping[str, Any]
    structured_outputs: Mapping[str, Any]
    tools: Sequence[Mapping[str, Any]]  # these three, and three below: messages only
    tool_choice: str | Mapping[str, Any]
    parallel_tool_calls: bool
    cache_salt: str
    priority: int
    user: str
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any]
    request_id: str  # sent as x-request-id, and in the answer


OPTION_NAMES = frozenset(Options.__annotations__)
TEXT_ONLY = ("best_of", "echo", "add_special_tokens")
CHAT_ONLY = (
    *("add_generation_prompt", "continue_final_message", "chat_template_kwargs"),
    *("tools", "tool_choice", "parallel_tool_calls"),
)
_NO_JSON = (TypeError, ValueError, RecursionError)  # UnicodeEncodeError is a ValueError
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """One request and the reader of its answer, which gets the JSON and the answer's headers."""

    path: str
    body: Mapping[str, Any]
    read: Callable[[Mapping[str, Any], Mapping[str, str]], Answer]
    headers: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> bytes:
        """The body as sent. Raises RequestError naming the field that JSON cannot say."""
        try:
            return _as_json(self.body)
        except _NO_JSON:
            for name, value in self.body.items():
                try:
                    _as_json(value)
                except _NO_JSON as error:
                    reason = f"{name}: cannot be sent as JSON: {str(error)[:200]}"
                    raise RequestError(reason, field=name, code="invalid_json") from error
            raise


def generate_call(prompt: Prompt, options: Options, stream: bool = False) -> Call[Completion]:
    """A completions or a chat request, by the kind of prompt. Raises RequestError for an unknown option."""
    for name in options:
        if name not in OPTION_NAMES:
            near = difflib.get_close_matches(name, OPTION_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"{name}: is not an option{hint}", field=name, code="unknown_field")
    body: dict[str, Any] = {**options, "return_token_ids": True, "stream": stream}
    headers = _identity(body.pop("request_id", None))
    if stream:
        body["stream_options"] = {"include_usage": True}
    field, value = _prompt(prompt)
    for name in CHAT_ONLY if field == "prompt" else TEXT_ONLY:
        if body.get(name) is not None:
            where = "messages" if field == "prompt" else "text and token prompts"
            raise RequestError(f"{name}: only goes with {where}", field=name, code="unsupported_value")
    body[field] = value
    if field == "prompt":
        return Call("/v1/completions", body, completion_of, headers)
    top = body.pop("logprobs", None)
    if top is not None:
        body |= {"logprobs": True, "top_logprobs": top}
    return Call("/v1/chat/completions", body, completion_of, headers)


def score_call(prompt: Prompt, top: int, model: str | None) -> Call[Score]:
    """Log-probabilities of the prompt's own tokens. Text and token prompts generate nothing; messages one token."""
    field, value = _prompt(prompt)
    body = {field: value, "prompt_logprobs": top, "temperature": 0, "return_token_ids": True, **_model(model)}
    if field == "prompt":
        return Call("/v1/completions", {**body, "max_tokens": 0, "echo": True}, score_of)
    return Call("/v1/chat/completions", {**body, "max_tokens": 1}, score_of)


def embed_calls(inputs: Sequence[str] | Sequence[Sequence[int]], model: str | None) -> list[Call[Embeddings]]:
    """As many requests as the inputs need."""
    wanted = "a list of texts or of lists of token ids"
    items = listed(inputs, "input", wanted)
    plain = [one if isinstance(one, str) else _ids(listed(one, "input", wanted)) for one in items]
    return [
        Call(
            "/v1/embeddings",
            {"input": plain[start : start + MAX_INPUTS], "encoding_format": "base64", **_model(model)},
            embeddings_of,
        )
        for start in range(0, max(1, len(plain)), MAX_INPUTS)
    ]


def tokenize_call(prompt: str | Sequence[Mapping[str, Any]], special: bool, model: str | None) -> Call[tuple[int, ...]]:
    """Token ids of a text or a conversation."""
    field, value = _prompt(prompt)
    return Call("/tokenize", {field: value, "add_special_tokens": special, **_model(model)}, token_ids_of)


def detokenize_call(token_ids: Sequence[int], model: str | None) -> Call[str]:
    """Text of token ids."""
    tokens = _ids(listed(token_ids, "tokens", "a list of token ids"))
    return Call("/detokenize", {"tokens": tokens, **_model(model)}, text_of)


def _as_json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()


def listed(items: Any, field: str, wanted: str) -> list[Any]:
    """The items of any sequence or iterator. Raises RequestError for what only looks like one: text, bytes, objects,
    and sets, which have no order."""
    if isinstance(items, (str, bytes, bytearray, memoryview, Mapping, AbstractSet)) or not isinstance(items, Iterable):
        kind = type(items).__name__
        raise RequestError(f"{field}: give {wanted}, not {kind}", field=field, code="invalid_type")
    return list(items)


def _prompt(prompt: Prompt) -> tuple[str, Any]:
    """The field a prompt goes into, and its value there."""
    if isinstance(prompt, str):
        return "prompt", prompt
    items = listed(prompt, "prompt", "text, token ids or a list of messages")
    if items and all(isinstance(item, Mapping) for item in items):
        return "messages", [dict(item) for item in items]
    if items and all(isinstance(item, (str, list, tuple)) for item in items):
        raise RequestError("prompt: one at a time; use batch for several", field="prompt", code="invalid_type")
    return "prompt", _ids(items)


def _identity(request_id: Any) -> dict[str, str]:
    """The header of a caller's own request id."""
    if request_id is None:
        return {}
    if not isinstance(request_id, str) or not _REQUEST_ID.match(request_id):
        raise RequestError("request_id: must be 1 to 128 of A-Z a-z 0-9 . _ : -", field="request_id")
    return {"x-request-id": request_id}


def _ids(items: Iterable[Any]) -> list[Any]:
    """numpy's integers become Python's; what is no integer is left for the server to name."""
    return [int(item) if isinstance(item, Integral) and not isinstance(item, bool) else item for item in items]


def _model(model: str | None) -> dict[str, str]:
    return {} if model is None else {"model": model}
