"""Reads the `messages` of a chat: shape only. Which roles and orders make sense is the template's business.

Used by `chat_request.py` and `tokenize_request.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.json_body import parse_json
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.template_variables import read_continuation, read_variables
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError

MAX_NAME_BYTES = 1 << 20
MAX_ARGUMENT_BYTES = 1 << 20
MAX_CALLS = 1024  # in one message


def encode_messages(
    fields: Fields, settings: IngressSettings, text: TextCodec, tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Ids of the prompt that the body's messages, its tools and template fields make. Raises RequestError."""
    messages = _messages(fields, settings)
    check_text_length(sum(len(m["content"]) for m in messages), settings, text, "messages")
    generates, continues = read_continuation(fields)
    variables = read_variables(fields, settings, text)
    variables["add_generation_prompt"] = generates
    ids = text.encode_chat(messages, variables, tools=tools, continue_final=continues)
    if not ids:
        raise RequestError("messages: the chat template made an empty prompt of them", field="messages")
    return ids


def check_text_length(num_chars: int, settings: IngressSettings, text: TextCodec, field: str) -> None:
    """Refuse text that cannot fit the context however it is cut into tokens; a character has at least one byte."""
    most = text.longest_text(settings.max_model_len)
    if text.has_tokenizer and num_chars > most:
        raise RequestError(
            f"{field}: the prompt is too long: this model's maximum context length is {settings.max_model_len} tokens, "
            f"and {num_chars} characters cannot fit it",
            field=field,
            code="context_length_exceeded",
        )


def _messages(fields: Fields, settings: IngressSettings) -> list[dict[str, Any]]:
    raw = fields.raw("messages")
    if not isinstance(raw, list):
        raise fields.refuse("messages", f"must be a list of messages, not {shown(raw)}", "invalid_type")
    if not raw or len(raw) > settings.limits.max_messages:
        raise fields.refuse("messages", f"must hold 1 to {settings.limits.max_messages} messages", "out_of_range")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(raw)]


def _message(item: object, path: str) -> dict[str, Any]:
    """Role, content as one string, and the plain extras that templates know."""
    if not isinstance(item, dict):
        raise RequestError(f"{path}: must be an object, not {shown(item)}", field=path, code="invalid_type")
    fields = Fields(item, f"{path}.")
    role = fields.text("role", 64)
    if not role:
        raise fields.refuse("role", "is missing")
    fields.only("function_call", ())
    message: dict[str, Any] = {"role": role, "content": _content(fields, role)}
    if calls := _tool_calls(fields, role):
        message["tool_calls"] = calls
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := fields.text(name, MAX_NAME_BYTES)) is not None:
            message[name] = value
    return message


def _tool_calls(fields: Fields, role: str) -> list[dict[str, Any]]:
    """What the model called. Templates write the arguments themselves, so they get the object that the text says."""
    stated = fields.raw("tool_calls")
    if stated is None or stated == []:
        return []
    if role != "assistant":
        raise fields.refuse("tool_calls", "only stand in messages of the assistant")
    if not isinstance(stated, list) or len(stated) > MAX_CALLS:
        raise fields.refuse("tool_calls", f"must be a list of at most {MAX_CALLS} calls", "invalid_type")
    return [_tool_call(call, f"{fields.name('tool_calls')}[{index}]") for index, call in enumerate(stated)]


def _tool_call(call: object, path: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RequestError(f"{path}: must be an object, not {shown(call)}", field=path, code="invalid_type")
    outer = Fields(call, f"{path}.")
    outer.only("type", ("function",))
    function = outer.child("function")
    if function is None:
        raise outer.refuse("function", "is missing")
    name = function.text("name", MAX_NAME_BYTES)
    if not name:
        raise function.refuse("name", "is missing")
    stated = function.text("arguments", MAX_ARGUMENT_BYTES) or "{}"
    try:
        # Through json first: a model may well have said a name twice, and its own words come back here.
        arguments = parse_json(json.dumps(json.loads(stated)).encode())
    except (ValueError, RecursionError, HttpProblem) as error:
        raise function.refuse("arguments", f"must be the text of a JSON object: {str(error)[:100]}") from error
    return {
        "id": outer.text("id", MAX_NAME_BYTES) or "",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _content(fields: Fields, role: str) -> str:
    content = fields.raw("content")
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list) or not content:
        raise fields.refuse("content", f"must be text or a list of text parts, not {shown(content)}", "invalid_type")
    return "".join(_part(part, f"{fields.name('content')}[{index}]") for index, part in enumerate(content))


def _part(part: object, place: str) -> str:
    if not isinstance(part, dict):
        raise RequestError(f"{place}: must be an object, not {shown(part)}", field=place, code="invalid_type")
    if part.get("type") != "text":
        raise RequestError(
            f"{place}.type: {shown(part.get('type'))} parts are not supported, only 'text'",
            field=f"{place}.type",
            code="unsupported_value",
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{place}.text: must be a string", field=f"{place}.text", code="invalid_type")
    return str(part["text"])
