"""Reads `tools`, `tool_choice` and `parallel_tool_calls` of a chat into a `ToolPlan`.

Used by `chat_request.py` and `tokenize_request.py`. Shape and size are checked here; whether schemas can be followed
is tried out beside the event loop (`grammar_check.py`), by `service.py`.

`required` and a named tool are enforced by a grammar in the model's own way of writing calls. With `auto` the model is
free, unless a tool is `strict`: then its grammar holds from a call's first mark on. `auto` together with a JSON format
means calls or a JSON text, nothing around them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.ingress.grammar_fields import read_grammar, stated_field
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.cluster.tool_calls.call_grammar import enforceable, forced_calls, possible_calls
from penstock.cluster.tool_calls.tool_plan import ToolPlan
from penstock.workers.errors import RequestError
from penstock.workers.grammar_spec import MAX_GRAMMAR_BYTES, GrammarKind, GrammarSpec

TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
CHOICES = ("none", "auto", "required")
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}
Schemas = dict[str, Mapping[str, Any]]


def read_tools(fields: Fields, settings: IngressSettings, text: TextCodec) -> ToolPlan:
    """Raises RequestError naming the field."""
    several = fields.boolean("parallel_tool_calls", default=True)
    tools = _tools(fields, settings)
    schemas: Schemas = {tool["name"]: _schema(tool) for tool in tools}
    choice, name = _choice(fields, schemas)
    told = tuple(_told(tool) for tool in tools) if text.template_tells_tools else ()
    if choice == "none":
        return ToolPlan(told)
    if not told:
        reason = "this model's chat template cannot tell it of tools; only tool_choice 'none' is possible"
        raise fields.refuse("tools", reason, "unsupported_value")
    if choice == "auto":
        strict = {tool["name"] for tool in tools if tool.get("strict")}
        return _possible(fields, settings, text, ToolPlan(told, schemas, several=several), strict)
    if read_grammar(fields, text) is not None:
        raise fields.refuse("tool_choice", f"calls that must come do not go with {stated_field(fields)}")
    asked = {name: schemas[name]} if name else schemas
    several = several and not name
    form = enforceable(text.tool_format)
    grammar = _bounded(fields, text, forced_calls(form, asked, text.split_specials, several))
    return ToolPlan(told, asked, form, several, bool(name), grammar)


def check_tools(fields: Fields, settings: IngressSettings) -> None:
    """Of a request that they change nothing of. Raises RequestError naming the field."""
    fields.boolean("parallel_tool_calls")
    _choice(fields, {tool["name"]: _schema(tool) for tool in _tools(fields, settings)})


def _possible(fields: Fields, settings: IngressSettings, text: TextCodec, plan: ToolPlan, strict: set[str]) -> ToolPlan:
    """The plan with calls that may come, or not."""
    if text.tool_format is None or not settings.auto_tool_choice:
        flag = "--tool-call-parser" if text.tool_format is None else "--enable-auto-tool-choice"
        reason = f"'auto' is off on this server ({flag}); 'required', one tool's name and 'none' are possible"
        raise fields.refuse("tool_choice", reason, "unsupported_value")
    other = read_grammar(fields, text)
    form, split = enforceable(text.tool_format), text.split_specials
    if other is not None and (other.kind is not GrammarKind.JSON_SCHEMA or form.opener):
        raise fields.refuse("tools", f"do not go with what {stated_field(fields)} asks for")
    trial = possible_calls(form, plan.schemas, split, plan.several, lenient=True)
    plan = replace(plan, form=text.tool_format, trial=GrammarSpec(GrammarKind.LARK, trial, text.eos_token_ids))
    if other is None and not (strict and text.tool_format.written):
        return plan
    held = {name: schema if name in strict else _ANY_OBJECT for name, schema in plan.schemas.items()}
    grammar = possible_calls(form, held, split, plan.several, None if other is None else _answer(fields, other))
    return replace(plan, form=form, grammar=_bounded(fields, text, grammar))


def _answer(fields: Fields, other: GrammarSpec) -> Mapping[str, Any]:
    """The schema of the answer that may come in place of calls."""
    try:
        schema = json.loads(other.text)
    except (ValueError, RecursionError) as error:
        raise fields.refuse(stated_field(fields), "is not a JSON schema") from error
    if not isinstance(schema, dict):
        raise fields.refuse(stated_field(fields), "must be a JSON schema as an object, beside tools")
    return schema


def _bounded(fields: Fields, text: TextCodec, grammar: str) -> GrammarSpec:
    if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        reason = f"their schemas are longer than {MAX_GRAMMAR_BYTES} bytes, too long to be enforced"
        raise fields.refuse("tools", reason, "too_long")
    if not text.eos_token_ids:
        raise fields.refuse("tools", "need a model that names its end-of-sequence token")
    return GrammarSpec(GrammarKind.LARK, grammar, text.eos_token_ids)


def _tools(fields: Fields, settings: IngressSettings) -> list[dict[str, Any]]:
    """The functions."""
    stated, limits = fields.raw("tools"), settings.limits
    if stated is None:
        return []
    if not isinstance(stated, list):
        raise fields.refuse("tools", f"must be a list of tools, not {shown(stated)}", "invalid_type")
    if len(stated) > limits.max_tools:
        raise fields.refuse("tools", f"holds more than {limits.max_tools} tools", "out_of_range")
    if len(json.dumps(stated)) > limits.max_tool_bytes:
        raise fields.refuse("tools", f"is longer than {limits.max_tool_bytes} bytes", "too_long")
    found = [_function(tool, f"tools[{index}]") for index, tool in enumerate(stated)]
    names = [function["name"] for function in found]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise RequestError(f"tools[{index}]: a second tool named {name!r}", field=f"tools[{index}].function.name")
    return found


def _function(tool: object, path: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise RequestError(f"{path}: must be an object, not {shown(tool)}", field=path, code="invalid_type")
    outer = Fields(tool, f"{path}.")
    if tool.get("type") != "function":
        raise outer.refuse("type", f"must be 'function', not {shown(tool.get('type'))}", "unsupported_value")
    function = outer.child("function")
    if function is None:
        raise outer.refuse("function", "is missing")
    name = function.text("name", 1 << 10)
    if name is None or not TOOL_NAME.match(name):
        raise function.refuse("name", "must be 1 to 64 letters, digits, '-' or '_'")
    function.text("description", 1 << 20)
    function.boolean("strict")
    parameters = function.raw("parameters")
    if parameters is not None and (
        not isinstance(parameters, dict) or parameters.get("type", "object") not in ("object", ["object"])
    ):
        raise function.refuse("parameters", "must be the JSON schema of an object", "invalid_type")
    raw: dict[str, Any] = tool["function"]
    return raw


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the arguments. A function without parameters takes none."""
    stated = function.get("parameters")
    return _NO_ARGUMENTS if stated is None else {**stated, "type": "object"}


def _told(function: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates know it, in the caller's own order."""
    known = ("name", "description", "parameters")
    return {"type": "function", "function": {name: value for name, value in function.items() if name in known}}


def _choice(fields: Fields, schemas: Schemas) -> tuple[str, str]:
    """The choice, and the name of the one tool that must be called."""
    stated = fields.raw("tool_choice")
    if stated is None:
        return ("auto" if schemas else "none"), ""
    if isinstance(stated, str):
        if stated not in CHOICES:
            raise fields.refuse("tool_choice", f"must be one of {', '.join(CHOICES)}, or name a tool")
        choice, name = stated, ""
    else:
        choice, name = "named", _named(fields)
    if choice != "none" and not schemas:
        raise fields.refuse("tool_choice", "only goes with tools")
    if name and name not in schemas:
        raise fields.refuse("tool_choice", f"{shown(name)} is none of the tools")
    return choice, name


def _named(fields: Fields) -> str:
    stated = fields.child("tool_choice")
    if stated is None or stated.raw("type") != "function":
        raise fields.refuse("tool_choice", "as an object must be of type 'function'", "unsupported_value")
    function = stated.child("function")
    name = None if function is None else function.text("name", 1 << 10)
    if not name:
        raise fields.refuse("tool_choice", "must name a function")
    return name
