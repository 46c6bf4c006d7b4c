"""Reads what a caller wants the text to look like: OpenAI's `response_format`, vLLM's `structured_outputs`, and the
older `guided_*` names of the same.

Used by `sampling_fields.py`. Only shape and size are checked here; whether a grammar can be followed is tried out
beside the event loop (`grammar_check.py`), by `service.py`. A finished grammar ends its choice, `ignore_eos` or not.
"""

from __future__ import annotations

import json
from typing import Any

from penstock.cluster.ingress.fields import Fields, shown
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError
from penstock.workers.grammar_spec import MAX_GRAMMAR_BYTES, GrammarKind, GrammarSpec

GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
FORMS = ("json", "regex", "choice", "grammar", "json_object")
FORMATS = ("text", "json_object", "json_schema")
# Wishes about the backend of which only those that change nothing are accepted.
_HARMLESS = (
    "disable_fallback",
    "disable_any_whitespace",
    "disable_additional_properties",
    "whitespace_pattern",
    "structural_tag",
)
_ANY_OBJECT = '{"type": "object"}'
Found = tuple[GrammarKind, str]


def stated_field(fields: Fields) -> str:
    """The field by which a body asks for a grammar."""
    names = ("structured_outputs", *GUIDED)
    return next((name for name in names if fields.raw(name) is not None), "response_format")


def read_grammar(fields: Fields, text: TextCodec) -> GrammarSpec | None:
    """The grammar that is asked for, if any. Raises RequestError naming the field."""
    readers = {"response_format": _response_format, "structured_outputs": _structured_outputs}
    asked = [name for name in (*readers, *GUIDED) if fields.raw(name) is not None]
    found = {name: readers[name](fields) if name in readers else _form(fields, name, GUIDED[name]) for name in asked}
    wishes = {name: wish for name, wish in found.items() if wish is not None}
    if not wishes:
        return None
    (field, (kind, grammar)), *others = wishes.items()
    if others:
        raise fields.refuse(others[0][0], f"does not go with {field}: ask for one grammar")
    if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
        raise fields.refuse(field, f"is longer than {MAX_GRAMMAR_BYTES} bytes", "too_long")
    if not text.has_tokenizer:
        raise fields.refuse(field, "needs a tokenizer, and this server runs without one")
    if not text.eos_token_ids:
        raise fields.refuse(field, "needs a model that names its end-of-sequence token")
    return GrammarSpec(kind, grammar, text.eos_token_ids)


def _response_format(fields: Fields) -> Found | None:
    stated = fields.child("response_format")
    kind = None if stated is None else stated.raw("type")
    if stated is None or kind == "text":
        return None
    if kind == "json_object":
        return GrammarKind.JSON_SCHEMA, _ANY_OBJECT
    if kind != "json_schema":
        given = "absent" if kind is None else shown(kind)
        raise fields.refuse("response_format", f"type must be one of {', '.join(FORMATS)}, not {given}")
    named = stated.raw("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise fields.refuse("response_format", "json_schema.schema must be a JSON schema, as an object", "invalid_type")
    return GrammarKind.JSON_SCHEMA, _dumped(schema, "response_format")


def _structured_outputs(fields: Fields) -> Found | None:
    stated = fields.child("structured_outputs")
    if stated is None:
        return None
    for name in _HARMLESS:
        stated.only(name, (False,))
    given = [name for name in FORMS if stated.raw(name) not in (None, False)]
    if len(given) != 1:
        raise fields.refuse("structured_outputs", f"must hold exactly one of {', '.join(FORMS)}")
    if given == ["json_object"]:
        stated.boolean("json_object")
        return GrammarKind.JSON_SCHEMA, _ANY_OBJECT
    return _form(fields, "structured_outputs", given[0], stated.raw(given[0]))


def _form(fields: Fields, field: str, form: str, value: Any = None) -> Found:
    """A grammar in one of vLLM's forms; `value` None: the field itself holds it."""
    value = fields.raw(field) if value is None else value
    if form == "choice":
        return GrammarKind.LARK, _choice(fields, field, value)
    if form == "json":
        if not isinstance(value, str | dict):
            raise fields.refuse(field, f"json must be an object or a string, not {shown(value)}", "invalid_type")
        return GrammarKind.JSON_SCHEMA, value if isinstance(value, str) else _dumped(value, field)
    if not isinstance(value, str) or not value:
        raise fields.refuse(field, f"{form} must be a string that is not empty", "invalid_type")
    return GrammarKind.REGEX if form == "regex" else GrammarKind.LARK, value


def _choice(fields: Fields, field: str, value: Any) -> str:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise fields.refuse(field, "choice must be a list of strings that are not empty", "invalid_type")
    return "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in value)


def _dumped(schema: dict[str, Any], field: str) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{field}: the schema cannot be read: {str(error)[:100]}", field=field) from error
