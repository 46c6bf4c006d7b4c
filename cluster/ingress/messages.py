"""Reads the `messages` of a chat: shape only. Which roles and orders make sense is the template's business.

Used by `chat_request.py` and `tokenize_request.py`.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.template_variables import read_continuation, read_variables
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError

MAX_NAME_BYTES = 1 << 20


def encode_messages(fields: Fields, settings: IngressSettings, text: TextCodec) -> list[int]:
    """Ids of the prompt that the body's messages and template fields make. Raises RequestError."""
    messages = _messages(fields, settings)
    check_text_length(sum(len(m["content"]) for m in messages), settings, text, "messages")
    generates, continues = read_continuation(fields)
    variables = read_variables(fields, settings, text)
    ids = text.encode_chat(messages, {**variables, "add_generation_prompt": generates}, continue_final=continues)
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
    for name in ("tool_calls", "function_call"):
        fields.only(name, ([],))
    message: dict[str, Any] = {"role": role, "content": _content(fields, role)}
    for name in ("name", "reasoning_content", "tool_call_id"):
        if (value := fields.text(name, MAX_NAME_BYTES)) is not None:
            message[name] = value
    return message


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
