"""The JSON Schemas of all request bodies, as data: names, types and ranges that the parsers of this folder accept.

`openapi.py` publishes them, `known_fields.py` takes the names from them, and the fuzzing tests send what they say.
JSON's null means absent in every optional field. Fields beyond these are accepted and ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from penstock.cluster.chat_template import RESERVED
from penstock.cluster.ingress.adapter_calls import IN_PLACE, MAX_PATH_BYTES, NAME, PATH
from penstock.cluster.ingress.chat_request import CHAT_UNSUPPORTED
from penstock.cluster.ingress.grammar_fields import FORMATS, FORMS, GUIDED
from penstock.cluster.ingress.messages import MAX_CALLS
from penstock.cluster.ingress.resumption import EMITTED
from penstock.cluster.ingress.sampling_fields import MAX_TEMPERATURE, MAX_TOP_K, UNSUPPORTED, UNUSED
from penstock.cluster.ingress.template_variables import MAX_NAME_CHARS, MAX_VARIABLES
from penstock.cluster.ingress.token_edits import FORBIDDEN, MAX_BIAS, MAX_PENALTY, REPETITION_RANGE
from penstock.cluster.ingress.tool_fields import CHOICES
from penstock.cluster.settings import LimitSettings
from penstock.workers.grammar_spec import MAX_GRAMMAR_BYTES

Schema = dict[str, Any]
UNUSABLE = "other values are not supported"


class Kind(StrEnum):
    """The bodies there are; values are the routes' names."""

    COMPLETION = "completions"
    CHAT = "chat_completions"
    EMBEDDING = "embeddings"
    TOKENIZE = "tokenize"
    DETOKENIZE = "detokenize"
    LOAD_ADAPTER = "load_lora_adapter"
    UNLOAD_ADAPTER = "unload_lora_adapter"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the ranges depend on."""

    limits: LimitSettings
    vocab_size: int
    max_model_len: int


def body_schema(kind: Kind, shape: Shape) -> Schema:
    """The schema of one body."""
    makers = {
        Kind.COMPLETION: _completion,
        Kind.CHAT: _chat,
        Kind.EMBEDDING: _embedding,
        Kind.TOKENIZE: _tokenize,
        Kind.DETOKENIZE: _detokenize,
        Kind.LOAD_ADAPTER: _load_adapter,
        Kind.UNLOAD_ADAPTER: _unload_adapter,
    }
    properties, required = makers[kind](shape)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": True}


def _completion(shape: Shape) -> tuple[Schema, list[str]]:
    limits = shape.limits
    own = {
        "prompt": _prompts(shape),
        "max_tokens": _integer(0, shape.max_model_len, "0 only with echo; default 16"),
        "best_of": _integer(1, limits.max_choices, "at least n; not with stream"),
        "logprobs": _integer(0, limits.max_logprobs),
        "echo": _boolean(),
        "suffix": {"enum": ["", None], "description": UNUSABLE},
        "add_special_tokens": _boolean(),
    }
    return {**own, **_shared(shape)}, ["prompt"]


def _chat(shape: Shape) -> tuple[Schema, list[str]]:
    own = {
        "messages": _messages(shape),
        "max_completion_tokens": _integer(1, shape.max_model_len),
        "max_tokens": _integer(1, shape.max_model_len, "the older name of max_completion_tokens"),
        "logprobs": _boolean(),
        "top_logprobs": _integer(0, shape.limits.max_logprobs, "only with logprobs: true"),
        **_template(shape),
        **_tools(shape),
        **{name: {"enum": [*harmless, None], "description": UNUSABLE} for name, harmless in CHAT_UNSUPPORTED.items()},
    }
    return {**own, **_shared(shape)}, ["messages"]


def _embedding(shape: Shape) -> tuple[Schema, list[str]]:
    return {
        "input": _prompts(shape),
        "model": _string(),
        "encoding_format": {"type": ["string", "null"], "enum": ["float", "base64", None]},
        "dimensions": {"type": "null", "description": "vectors have the model's width"},
        "add_special_tokens": _boolean(),
        "truncate_prompt_tokens": _integer(-1, shape.max_model_len - 1, "not 0; -1: as many as fit"),
        "cache_salt": _salt(),
        **_unused(shape),
    }, ["input"]


def _tokenize(shape: Shape) -> tuple[Schema, list[str]]:
    return {
        "model": _string(),
        "prompt": {"type": ["string", "null"]},
        "messages": _messages(shape, nullable=True),
        "add_special_tokens": _boolean(),
        "return_token_strs": _boolean(),
        **_template(shape),
        **_tools(shape),
        **_unused(shape),
    }, []


def _detokenize(shape: Shape) -> tuple[Schema, list[str]]:
    tokens = _token_ids(shape, shape.limits.max_tokenize_bytes)
    return {"model": _string(), "tokens": tokens, **_unused(shape)}, ["tokens"]


def _load_adapter(shape: Shape) -> tuple[Schema, list[str]]:
    name, required = _unload_adapter(shape)
    path = {
        "type": "string",
        "maxLength": MAX_PATH_BYTES,
        "description": "below, or inside of, the adapters' directory",
    }
    return {**name, PATH: path, IN_PLACE: _boolean()}, [*required, PATH]


def _unload_adapter(shape: Shape) -> tuple[Schema, list[str]]:
    return {NAME: {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"}}, [NAME]


def _shared(shape: Shape) -> Schema:
    limits, last = shape.limits, shape.vocab_size - 1
    return {
        "model": _string(),
        "n": _integer(1, limits.max_choices),
        "stream": _boolean(),
        "stream_options": {
            "type": ["object", "null"],
            "description": "only with stream: true",
            "properties": {"include_usage": _boolean(), "continuous_usage_stats": _boolean()},
        },
        "temperature": _number(0, MAX_TEMPERATURE),
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": _integer(-1, MAX_TOP_K, "-1 and 0: all"),
        "min_p": _number(0, 1),
        "seed": _integer(-(1 << 63), (1 << 64) - 1, "taken modulo 2^64"),
        "presence_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
        "frequency_penalty": _number(-MAX_PENALTY, MAX_PENALTY),
        "repetition_penalty": _number(*REPETITION_RANGE),
        "logit_bias": {
            "type": ["object", "null"],
            "maxProperties": limits.max_logit_bias,
            "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$", "description": f"token ids up to {last}"},
            "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
        },
        "bad_words": _list(_short_string(limits.max_stop_bytes), limits.max_bad_words),
        "allowed_token_ids": {**_list(_id(shape), limits.max_allowed_token_ids), "minItems": 1},
        **_resumed(shape),
        "min_tokens": _integer(0, shape.max_model_len, "at most max_tokens"),
        "ignore_eos": _boolean(),
        "stop": {
            "anyOf": [
                {"type": "null"},
                _short_string(limits.max_stop_bytes),
                {"type": "array", "items": _short_string(limits.max_stop_bytes), "maxItems": limits.max_stop_strings},
            ]
        },
        "stop_token_ids": _list(_id(shape), limits.max_stop_token_ids),
        "include_stop_str_in_output": _boolean(),
        "skip_special_tokens": _boolean(),
        "return_token_ids": _boolean(),
        "truncate_prompt_tokens": _integer(-1, shape.max_model_len - 1, "not 0; -1: as many as fit"),
        "prompt_logprobs": _integer(0, limits.max_logprobs, "not with stream"),
        "cache_salt": _salt(),
        "response_format": {
            "type": ["object", "null"],
            "properties": {"type": {"enum": list(FORMATS)}, "json_schema": {"type": ["object", "null"]}},
            "required": ["type"],
        },
        "structured_outputs": {
            "type": ["object", "null"],
            "description": f"exactly one of {', '.join(FORMS)}; at most {MAX_GRAMMAR_BYTES} bytes",
        },
        **{name: {"description": f"older name of structured_outputs.{form}"} for name, form in GUIDED.items()},
        **_unused(shape),
    }


def _unused(shape: Shape) -> Schema:
    """What changes nothing, in whatever body it stands."""
    return {
        **{name: _label(shape, kind) for name, kind in UNUSED.items()},
        **{name: {"enum": [*harmless, None], "description": UNUSABLE} for name, harmless in UNSUPPORTED.items()},
    }


def _resumed(shape: Shape) -> Schema:
    """What the caller has of the answer already."""
    return {
        EMITTED: {**_list(_id(shape), shape.max_model_len), "description": "go on behind these"},
        FORBIDDEN: {**_list(_id(shape), shape.limits.max_bad_words), "description": "may not come right behind them"},
    }


def _template(shape: Shape) -> Schema:
    """What is told to the chat template."""
    scalar = {"type": ["string", "number", "boolean", "null"], "maxLength": shape.limits.max_label_bytes}
    return {
        "add_generation_prompt": _boolean(),
        "continue_final_message": _boolean(),
        "reasoning_effort": {"type": ["string", "null"], "maxLength": 64},
        "include_reasoning": _boolean(),
        "chat_template_kwargs": {
            "type": ["object", "null"],
            "maxProperties": MAX_VARIABLES,
            "propertyNames": {
                "pattern": f"^[A-Za-z_][A-Za-z0-9_]{{0,{MAX_NAME_CHARS - 1}}}$",
                "not": {"enum": sorted(RESERVED)},
            },
            "additionalProperties": scalar,
        },
    }


def _tools(shape: Shape) -> Schema:
    name = {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}
    parameters = {
        "type": ["object", "null"],
        "properties": {"type": {"enum": ["object"]}},
        "description": "a JSON schema; absent: the function takes no arguments",
    }
    function = {
        "type": "object",
        "properties": {"name": name, "description": _string(), "parameters": parameters, "strict": _boolean()},
        "required": ["name"],
    }
    named = {"type": "object", "properties": {"name": {"type": "string", "minLength": 1}}, "required": ["name"]}
    return {
        "tools": {
            "type": ["array", "null"],
            "items": _function(function),
            "maxItems": shape.limits.max_tools,
            "description": f"names may not repeat; at most {shape.limits.max_tool_bytes} bytes of JSON",
        },
        "tool_choice": {
            "anyOf": [{"enum": [*CHOICES, None]}, _function(named)],
            "description": "only with tools, of which it may name one",
        },
        "parallel_tool_calls": _boolean(),
    }


def _function(schema: Schema) -> Schema:
    kind = {"const": "function"}
    return {"type": "object", "properties": {"type": kind, "function": schema}, "required": ["type", "function"]}


def _messages(shape: Shape, nullable: bool = False) -> Schema:
    part = {
        "type": "object",
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        "required": ["type", "text"],
    }
    content = [{"type": "string"}, {"type": "array", "items": part, "minItems": 1}]
    call = {
        "type": "object",
        "properties": {
            "id": _string(),
            "type": {"enum": ["function", None]},
            "function": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "arguments": {"type": ["string", "null"], "description": "the text of a JSON object"},
                },
                "required": ["name"],
            },
        },
        "required": ["function"],
    }
    message = {
        "type": "object",
        "properties": {
            "role": {"type": "string", "minLength": 1, "maxLength": 64},
            "content": {"anyOf": [*content, {"type": "null"}], "description": "null only of the assistant"},
            "name": _string(),
            "reasoning_content": _string(),
            "tool_call_id": _string(),
            "tool_calls": {"type": ["array", "null"], "items": call, "maxItems": MAX_CALLS},
        },
        "required": ["role"],
    }
    kind = ["array", "null"] if nullable else "array"
    return {"type": kind, "items": message, "minItems": 1, "maxItems": shape.limits.max_messages}


def _prompts(shape: Shape) -> Schema:
    longest = f"at most {shape.max_model_len - 1} tokens, unless truncate_prompt_tokens shortens it"
    ids = {"type": "array", "items": _id(shape), "minItems": 1, "description": longest}
    text = {"type": "string", "minLength": 1}
    many = {"type": "array", "minItems": 1, "maxItems": shape.limits.max_prompts}
    return {"anyOf": [text, ids, {**many, "items": text}, {**many, "items": ids}]}


def _token_ids(shape: Shape, most: int) -> Schema:
    return {"type": "array", "items": _id(shape), "maxItems": most}


def _id(shape: Shape) -> Schema:
    return {"type": "integer", "minimum": 0, "maximum": shape.vocab_size - 1}


def _list(items: Schema, most: int) -> Schema:
    return {"type": ["array", "null"], "items": items, "maxItems": most}


def _integer(low: int, high: int, text: str = "") -> Schema:
    found: Schema = {"type": ["integer", "null"], "minimum": low, "maximum": high}
    return {**found, "description": text} if text else found


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _boolean() -> Schema:
    return {"type": ["boolean", "null"]}


def _string() -> Schema:
    return {"type": ["string", "null"]}


def _short_string(max_bytes: int) -> Schema:
    return {"type": "string", "minLength": 1, "maxLength": max_bytes, "description": "bytes of UTF-8 count"}


def _label(shape: Shape, kind: type) -> Schema:
    name = {str: "string", dict: "object", bool: "boolean", int: "integer"}[kind]
    return {
        "type": [name, "null"],
        "description": f"taken and not used; at most {shape.limits.max_label_bytes} bytes of JSON",
    }


def _salt() -> Schema:
    return {"type": ["string", "null"], "pattern": "^[A-Za-z0-9_-]{1,256}$"}
