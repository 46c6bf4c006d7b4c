"""From a request message to the JSON body that means the same over HTTP.

Used by `servicer.py`. The HTTP parsers then apply the same defaults, limits and complaints to both. Fields carry
their HTTP names in `penstock.proto`, so most of this is a walk over the fields that are set. Nothing is checked here
but the one thing JSON has no room for: a prompt in no form at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Value

from penstock.cluster.grpc_front.penstock_pb2 import (
    ChatMessage,
    Conversation,
    DetokenizeRequest,
    EmbedRequest,
    GenerateRequest,
    Prompt,
    TokenizeRequest,
    Tool,
)
from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.json_body import parse_json
from penstock.workers.errors import RequestError


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a request whose bytes are no message of its kind, so that the servicer refuses it like any other."""


def lenient(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserialiser that never fails: grpcio would answer with a defect of the server and log its traceback."""

    def read(raw: bytes) -> Any:
        try:
            return parse(raw)
        except DecodeError:
            return Unreadable()

    return read


def generate_body(request: GenerateRequest, stream: bool) -> tuple[dict[str, Any], bool]:
    """Body of a completions or a chat request, and whether it is the latter."""
    output = plain(request.output)
    output.pop("return_prompt_token_ids", None)
    body = {**plain(request.sampling), **output, **_stated(request, ("model", "cache_salt", "truncate_prompt_tokens"))}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    form, value = _form(request.prompt, "prompt")
    if form != "chat":
        return {**body, "prompt": value}, False
    if (top := body.pop("logprobs", None)) is not None:
        body |= {"logprobs": True, "top_logprobs": top}
    return {**body, **value}, True


def embed_body(request: EmbedRequest) -> dict[str, Any]:
    """Body of an embeddings request. All inputs are texts, or all are token ids, as over HTTP."""
    inputs = [_form(prompt, f"inputs[{index}]") for index, prompt in enumerate(request.inputs)]
    if any(form == "chat" for form, _ in inputs):
        raise RequestError("inputs: must be texts or token ids", field="inputs", code="invalid_type")
    return {**_stated(request, ("model", "cache_salt")), "input": [value for _, value in inputs]}


def tokenize_body(request: TokenizeRequest) -> dict[str, Any]:
    """Body of a tokenize request."""
    body = _stated(request, ("model", "add_special_tokens"))
    form, value = _form(request.prompt, "prompt")
    if form == "tokens":
        raise RequestError("prompt: must be a text or a conversation", field="prompt", code="invalid_type")
    return {**body, **(value if form == "chat" else {"prompt": value})}


def detokenize_body(request: DetokenizeRequest) -> dict[str, Any]:
    """Body of a detokenize request."""
    return {**_stated(request, ("model",)), "tokens": list(request.token_ids)}


def plain(message: Message) -> dict[str, Any]:
    """The fields that are set, as JSON's values: `TokenIds` become lists, maps become objects."""
    return {field.name: _value(getattr(message, field.name)) for field, _ in message.ListFields()}


def _value(value: Any) -> Any:
    if isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Message):
        return list(value.ids) if value.DESCRIPTOR.name == "TokenIds" else plain(value)
    if hasattr(value, "items"):
        return {str(key): item for key, item in value.items()}
    return [_value(item) for item in value]


def _stated(message: Message, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _form(prompt: Prompt, field: str) -> tuple[str, Any]:
    """Which form a prompt has, and its value; of a conversation the fields of the body."""
    form = prompt.WhichOneof("form")
    if form is None:
        raise RequestError(f"{field}: is missing", field=field)
    if form == "text":
        return form, prompt.text
    return form, list(prompt.tokens.ids) if form == "tokens" else _conversation(prompt.chat)


def _conversation(chat: Conversation) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [_message(message) for message in chat.messages]}
    body |= _stated(chat, ("add_generation_prompt", "tool_choice", "parallel_tool_calls"))
    if chat.tools:
        body["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(chat.tools)]
    if chat.HasField("named_tool"):
        body["tool_choice"] = {"type": "function", "function": {"name": chat.named_tool}}
    if chat.chat_template_kwargs:
        body["chat_template_kwargs"] = {name: _scalar(value) for name, value in chat.chat_template_kwargs.items()}
    return body


def _message(message: ChatMessage) -> dict[str, Any]:
    found: dict[str, Any] = {"content": "", **plain(message)}
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return found


def _tool(tool: Tool, path: str) -> dict[str, Any]:
    function = plain(tool)
    if tool.HasField("parameters"):
        try:
            function["parameters"] = parse_json(tool.parameters.encode())
        except HttpProblem as problem:
            field = f"{path}.function.parameters"
            raise RequestError(f"{field}: {problem.message}", field=field) from problem
    return {"type": "function", "function": function}


def _scalar(value: Value) -> Any:
    """A value as JSON has it. protobuf's numbers are doubles: 3.0 was written as 3. What is in a list or an object does
    not matter: templates are given neither."""
    kind = value.WhichOneof("kind")
    if kind == "number_value":
        return int(value.number_value) if value.number_value.is_integer() else value.number_value
    if kind in {"string_value", "bool_value"}:
        return getattr(value, kind)
    return {"struct_value": {}, "list_value": []}.get(kind or "")
