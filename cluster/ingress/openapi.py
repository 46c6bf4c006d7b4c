"""The OpenAPI 3.1 document of `GET /openapi.json`: every route of `gate.ROUTES`, its bodies, answers and errors.

Made once per process by `app.py`; the fuzzing tests run from it, so what it says must be true. Event streams are told
beside the JSON answers they replace.
"""

from __future__ import annotations

from typing import Any

from penstock.cluster.ingress.gate import MODEL_PREFIX, ONE_MODEL, ROUTES, Door, Route
from penstock.cluster.ingress.openapi_bodies import Kind, Schema, Shape, body_schema

JSON = "application/json"
_OBJECT: Schema = {"type": "object"}
_INTEGER: Schema = {"type": "integer"}
_ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_USAGE: Schema = {
    "type": "object",
    "properties": {"prompt_tokens": _INTEGER, "completion_tokens": _INTEGER, "total_tokens": _INTEGER},
    "required": ["prompt_tokens", "total_tokens"],
}
_REASONS: Schema = {"enum": ["stop", "length"]}
_CHAT_REASONS: Schema = {"enum": ["stop", "length", "tool_calls"]}
_ALWAYS = {"431": "headers too large"}
_KEYED = {"401": "no valid key", "403": "the key lacks the right"}
_POSTED = {
    "400": "a field, or the body, is wrong",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "415": "not application/json",
    "429": "over a limit of the key; see Retry-After",
    "500": "a defect of the server",
    "503": "overloaded, or not ready; see Retry-After",
    "504": "a time limit",
}
_ADAPTER_CALLS = (Kind.LOAD_ADAPTER.value, Kind.UNLOAD_ADAPTER.value)
_PLACES = {
    "completions": "Continue a text, or several",
    "chat_completions": "Answer a conversation",
    "embeddings": "The last token's state of every input",
    "models": "Models that are served",
    "tokenize": "Text or a conversation as token ids",
    "detokenize": "Token ids as text",
    "tokenizer_info": "Special tokens and chat template",
    "version": "Version of the server",
    "openapi": "This document",
    "load_lora_adapter": "Serve a low-rank adapter, or read it again",
    "unload_lora_adapter": "Serve a low-rank adapter no more",
    "status": "The workers and adapters",
    "metrics": "Prometheus metrics",
    "health": "200 while the process runs",
    "ready": "200 while requests can be served",
    "live": "200 while the process need not be restarted",
}


def openapi_document(shape: Shape, version: str, switches: dict[str, bool]) -> dict[str, Any]:
    """The document for a server of this shape. `switches`: which routes of the table there are."""
    paths = {path: _operations(route) for path, route in ROUTES.items() if switches[route.name]}
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    one = {"parameters": [name], **_operations(ONE_MODEL, "One model", {"404": "no such model"})}
    bodies = {kind.value: body_schema(kind, shape) for kind in Kind if switches[kind.value]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version, "description": "OpenAI-compatible serving of a model"},
        "paths": {**paths, f"{MODEL_PREFIX}{{model}}": one},
        "components": {
            "schemas": {**bodies, "error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operations(route: Route, summary: str = "", more: dict[str, str] | None = None) -> dict[str, Any]:
    """One entry per method. HEAD answers as GET, without a body."""
    errors = {**_ALWAYS, **(_KEYED if route.door is not Door.OPEN else {}), **(more or {})}
    if route.methods == ("POST",):
        errors |= _POSTED
    if route.name in _ADAPTER_CALLS:
        errors |= {"404": "no such adapter", "409": "it, or the list, cannot be changed"}
    if route.name == "ready":
        errors["503"] = "not ready; see Retry-After"
    described: dict[str, Any] = {
        "operationId": route.name,
        "summary": summary or _PLACES[route.name],
        "security": [] if route.door is Door.OPEN else [{}, {"key": []}],
        "responses": {"200": _answer(route), **{status: _problem(text) for status, text in errors.items()}},
    }
    if "POST" in route.methods:
        content = {JSON: {"schema": {"$ref": f"#/components/schemas/{route.name}"}}}
        return {"post": {**described, "requestBody": {"required": True, "content": content}}}
    bare = {status: {"description": found["description"]} for status, found in described["responses"].items()}
    return {"get": described, "head": {**described, "operationId": f"{route.name}_head", "responses": bare}}


def _problem(text: str) -> dict[str, Any]:
    return {"description": text, "content": {JSON: {"schema": {"$ref": "#/components/schemas/error"}}}}


def _answer(route: Route) -> dict[str, Any]:
    if route.name == "metrics":
        return {"description": "Prometheus text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    content: dict[str, Any] = {JSON: {"schema": _ANSWERS.get(route.name, _OBJECT)}}
    if route.name in {Kind.COMPLETION.value, Kind.CHAT.value}:
        # no type: some readers take the schema for one event, others for the whole stream
        content["text/event-stream"] = {"schema": {"description": "chunks as JSON in `data`, at last `[DONE]`"}}
    return {"description": "the answer", "content": content}


def _listed(properties: Schema) -> Schema:
    return {"type": "array", "items": {"type": "object", "properties": properties, "required": list(properties)}}


def _object(properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


_TEXT: Schema = {"type": "string"}
_GENERATED: Schema = {"id": _TEXT, "object": _TEXT, "created": _INTEGER, "model": _TEXT, "usage": _USAGE}
_ANSWERS: dict[str, Schema] = {
    "completions": _object(
        {**_GENERATED, "choices": _listed({"index": _INTEGER, "text": _TEXT, "finish_reason": _REASONS})}
    ),
    "chat_completions": _object(
        {**_GENERATED, "choices": _listed({"index": _INTEGER, "message": _OBJECT, "finish_reason": _CHAT_REASONS})}
    ),
    "embeddings": _object(
        {
            "object": {"const": "list"},
            "model": _TEXT,
            "data": _listed({"index": _INTEGER, "embedding": {"type": ["array", "string"]}}),
            "usage": _USAGE,
        }
    ),
    "tokenize": _object(
        {
            "tokens": {"type": "array", "items": _INTEGER},
            "count": _INTEGER,
            "max_model_len": _INTEGER,
            "token_strs": {"type": ["array", "null"], "items": _TEXT},
        }
    ),
    "detokenize": _object({"prompt": _TEXT}),
    "models": _object({"object": {"const": "list"}, "data": _listed({"id": _TEXT, "max_model_len": _INTEGER})}),
    "model": _object({"id": _TEXT, "object": {"const": "model"}, "max_model_len": _INTEGER}),
    "load_lora_adapter": _object({"id": _TEXT, "revision": _TEXT, "folder": _TEXT}),
    "unload_lora_adapter": _object({"id": _TEXT}),
    "version": _object({"version": _TEXT}),
}
