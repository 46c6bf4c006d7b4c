"""What a caller may tell the chat template: scalars, under names that the template reads and does not own.

Used by `chat_request.py` and `tokenize_request.py`. Templates themselves never come from a request. Names that this
model's template does not read are accepted and not passed on, so that clients may send `enable_thinking` anywhere.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.chat_template import RESERVED
from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec

MAX_VARIABLES = 16
MAX_NUMBER = 1e8
MAX_NAME_CHARS = 64


def read_continuation(fields: Fields) -> tuple[bool, bool]:
    """(`add_generation_prompt`, `continue_final_message`); both at once make no sense."""
    continues = fields.boolean("continue_final_message")
    generates = fields.boolean("add_generation_prompt", default=not continues)
    if continues and generates:
        raise fields.refuse("continue_final_message", "does not go with add_generation_prompt: true")
    return generates, continues


def read_variables(fields: Fields, settings: IngressSettings, text: TextCodec) -> dict[str, Any]:
    """`reasoning_effort`, `include_reasoning` and `chat_template_kwargs`, as far as the template reads them."""
    variables: dict[str, Any] = {}
    effort = fields.text("reasoning_effort", 64)
    if effort is not None:
        variables["reasoning_effort"] = effort
    if fields.raw("include_reasoning") is not None:
        variables["include_reasoning"] = fields.boolean("include_reasoning")
    stated = fields.child("chat_template_kwargs")
    names = stated.keys() if stated is not None else []
    if len(names) > MAX_VARIABLES:
        raise fields.refuse("chat_template_kwargs", f"holds more than {MAX_VARIABLES} names", "out_of_range")
    for name in names:
        wrong = not name.isidentifier() or len(name) > MAX_NAME_CHARS
        if wrong or name in RESERVED or name.endswith("_token"):
            raise fields.refuse("chat_template_kwargs", f"the name {shown(name)} cannot be set")
        if stated is not None:
            variables[name] = _scalar(stated, name, settings.limits.max_label_bytes)
    return {name: value for name, value in variables.items() if name in text.template_variables}


def _scalar(stated: Fields, name: str, max_bytes: int) -> object:
    value = stated.raw(name)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str):
        return stated.text(name, max_bytes)
    if isinstance(value, (int, float)):
        stated.number(name, -MAX_NUMBER, MAX_NUMBER, 0.0)
        return value
    raise stated.refuse(name, "must be a short text, a number, true or false", "invalid_type")
