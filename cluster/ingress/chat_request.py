"""Parses the body of `POST /v1/chat/completions` into a `Call`.

Called by `app.py`. Messages are checked for shape only: which roles and orders make sense is the template's business,
and its complaint reaches the caller. Templates never come from the request.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.completion_request import check_text_length
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.sampling_fields import (
    fit,
    read_max_tokens,
    read_model,
    read_output,
    read_salt,
    read_sampling,
    refuse_unsupported,
)
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError

MAX_TEMPLATE_VARIABLES = 16
_RESERVED_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt", "tokenize", "chat_template"}


def parse_chat(body: dict[str, Any], settings: IngressSettings, text: TextCodec) -> Call:
    """Raises RequestError or HttpProblem naming the field."""
    fields = Fields(body)
    model = read_model(fields, settings)
    refuse_unsupported(fields, settings)
    _refuse_chat_only(fields)
    n = fields.integer("n", 1, settings.limits.max_choices, 1) or 1
    sampling = read_sampling(fields, settings, text, _logprobs(fields, settings))
    output = read_output(fields, settings, text)
    salt = read_salt(fields)
    stated = read_max_tokens(fields, "max_completion_tokens", settings)
    older = read_max_tokens(fields, "max_tokens", settings)
    stated = older if stated is None else stated
    messages = _messages(fields, settings, text)
    variables = _template_variables(fields, settings)
    prompt = tuple(text.encode_chat(messages, **variables))
    if not prompt:
        raise RequestError("messages: the chat template made an empty prompt of them", field="messages")
    return Call(model, (prompt,), (fit(stated, None, prompt, settings, "messages"),), n, sampling, output, salt)


def _refuse_chat_only(fields: Fields) -> None:
    fields.only("tools", ([],))
    fields.only("functions", ([],))
    fields.only("tool_choice", ("none", "auto"))
    fields.only("function_call", ("none", "auto"))
    fields.only("chat_template", ())
    fields.only("continue_final_message", (False,))
    fields.only("echo", (False,))
    fields.only("documents", ([],))
    fields.only("audio", ())
    fields.only("modalities", (["text"],))


def _logprobs(fields: Fields, settings: IngressSettings) -> int | None:
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, settings.limits.max_logprobs)
    if top and not wanted:
        raise fields.refuse("top_logprobs", "only goes with logprobs: true")
    return (top or 0) if wanted else None


def _messages(fields: Fields, settings: IngressSettings, text: TextCodec) -> list[dict[str, Any]]:
    raw = fields.raw("messages")
    if not isinstance(raw, list):
        raise fields.refuse("messages", f"must be a list of messages, not {shown(raw)}", "invalid_type")
    if not raw or len(raw) > settings.limits.max_messages:
        raise fields.refuse("messages", f"must hold 1 to {settings.limits.max_messages} messages", "out_of_range")
    messages = [_message(item, f"messages[{index}]") for index, item in enumerate(raw)]
    check_text_length(sum(len(m["content"]) for m in messages), settings, text, "messages")
    return messages


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
        if (value := fields.text(name, 1 << 20)) is not None:
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
    pieces: list[str] = []
    for index, part in enumerate(content):
        place = f"{fields.name('content')}[{index}]"
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
        pieces.append(part["text"])
    return "".join(pieces)


def _template_variables(fields: Fields, settings: IngressSettings) -> dict[str, Any]:
    """What the caller may tell the template: short scalars under names that are not the template's own."""
    variables: dict[str, Any] = {"add_generation_prompt": fields.boolean("add_generation_prompt", default=True)}
    effort = fields.text("reasoning_effort", 64)
    if effort is not None:
        variables["reasoning_effort"] = effort
    stated = fields.child("chat_template_kwargs")
    if stated is None:
        return variables
    names = stated.keys()
    if len(names) > MAX_TEMPLATE_VARIABLES:
        raise fields.refuse("chat_template_kwargs", f"holds more than {MAX_TEMPLATE_VARIABLES} names", "out_of_range")
    for name in names:
        value = stated.raw(name)
        if not name.isidentifier() or name in _RESERVED_VARIABLES or name.endswith("_token"):
            raise fields.refuse("chat_template_kwargs", f"the name {shown(name)} cannot be set")
        if not isinstance(value, (bool, int, float, str)) or len(str(value)) > settings.limits.max_label_bytes:
            raise stated.refuse(name, "must be a short text, a number, true or false", "invalid_type")
        variables[name] = value
    return variables
