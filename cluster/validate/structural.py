"""Values against a structural schema (OpenAPI v3 as Kubernetes writes it), the way the API server goes about it.

`complete` drops nulls and fills in defaults in tree order; `problems` then compares. One walker serves the schemas of
resource definitions (`schemas.py`), of core objects and of our own tables (`compact_schema.py`). Pure. Rules that
Kubernetes states in CEL are not evaluated.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, nearest

_INT_BOUNDS = {"int32": 1 << 31, "int64": 1 << 63}
_NAMES = {"object": "keys and values", "array": "a list", "string": "text", "integer": "a whole number"}
_NAMES |= {"number": "a number", "boolean": "true or false"}
_PRESERVE = "x-kubernetes-preserve-unknown-fields"
_INT_OR_STRING = "x-kubernetes-int-or-string"


@dataclass(frozen=True, slots=True)
class Schema:
    """One node of a schema; `definitions` holds what its `$ref`s name."""

    raw: Mapping[str, Any]
    definitions: Mapping[str, Any] = field(default_factory=dict)

    def resolved(self) -> Schema:
        """Itself, or what it refers to."""
        node = self
        while isinstance(reference := node.raw.get("$ref"), str):
            node = Schema(self.definitions.get(reference.rpartition("/")[2], {}), self.definitions)
        return node

    def child(self, raw: object) -> Schema:
        """A part of it."""
        return Schema(raw if isinstance(raw, Mapping) else {}, self.definitions).resolved()

    @property
    def kinds(self) -> tuple[str, ...]:
        """JSON types that are allowed; empty = any."""
        stated = self.raw.get("type")
        listed = stated if isinstance(stated, list) else [stated] if stated else []
        return tuple(kind for kind in listed if kind != "null")

    @property
    def nullable(self) -> bool:
        """Whether null is a value of its own."""
        return self.raw.get("nullable") is True

    @property
    def properties(self) -> Mapping[str, Any]:
        """Named fields."""
        found = self.raw.get("properties")
        return found if isinstance(found, Mapping) else {}


def complete(value: Any, schema: Schema) -> Any:
    """A copy of `value` with nulls of fields that are not nullable gone, then defaults put in, outside in."""
    schema = schema.resolved()
    if isinstance(value, dict):
        result: dict[str, Any] = {}
        for name, one in value.items():
            inner = schema.child(schema.properties.get(name) or schema.raw.get("additionalProperties"))
            if one is not None or inner.nullable:
                result[name] = one
        for name, raw in schema.properties.items():
            inner = schema.child(raw)
            if name not in result and "default" in inner.raw:
                result[name] = copy.deepcopy(inner.raw["default"])
        extra = schema.raw.get("additionalProperties")
        return {name: complete(one, schema.child(schema.properties.get(name, extra))) for name, one in result.items()}
    if isinstance(value, list):
        return [complete(one, schema.child(schema.raw.get("items"))) for one in value]
    return value


def problems(value: Any, schema: Schema, path: Path = ()) -> Iterator[Problem]:
    """Everything about `value` that the schema does not allow."""
    schema = schema.resolved()
    if value is None and (schema.nullable or not schema.kinds):
        return
    if schema.raw.get(_INT_OR_STRING) or "oneOf" in schema.raw:
        yield from _alternatives(value, schema, path)
        return
    if schema.kinds and not any(_is_of(value, kind) for kind in schema.kinds):
        quote = "; quote it" if schema.kinds == ("string",) and isinstance(value, (int, float)) else ""
        wanted = " or ".join(_NAMES.get(kind, kind) for kind in schema.kinds)
        yield Problem(path, f"{_shown(value)} is not {wanted}{quote}")
        return
    if isinstance(value, dict):
        yield from _object(value, schema, path)
    elif isinstance(value, list):
        yield from _array(value, schema, path)
    else:
        yield from _scalar(value, schema, path)


def _alternatives(value: Any, schema: Schema, path: Path) -> Iterator[Problem]:
    options = [schema.child(one) for one in schema.raw.get("oneOf", [])]
    kinds = {kind for one in options for kind in one.kinds} or {"integer", "string"}
    if not any(_is_of(value, kind) for kind in kinds):
        yield Problem(path, f"{_shown(value)} is not {' or '.join(_NAMES.get(kind, kind) for kind in sorted(kinds))}")
    else:
        yield from _scalar(value, schema, path)


def _object(value: dict[str, Any], schema: Schema, path: Path) -> Iterator[Problem]:
    extra = schema.raw.get("additionalProperties")
    closed = bool(schema.properties) and not extra and not schema.raw.get(_PRESERVE)
    for name, one in value.items():
        if name in schema.properties:
            yield from problems(one, schema.child(schema.properties[name]), (*path, name))
        elif isinstance(extra, Mapping):
            yield from problems(one, schema.child(extra), (*path, name))
        elif closed:
            yield Problem((*path, name), f"unknown key {name!r}", nearest(name, schema.properties))
    for name in schema.raw.get("required", []):
        if name not in value:
            yield Problem((*path, name), f"required key {name!r} is missing")


def _array(value: list[Any], schema: Schema, path: Path) -> Iterator[Problem]:
    low, high = schema.raw.get("minItems", 0), schema.raw.get("maxItems")
    if len(value) < low or (high is not None and len(value) > high):
        yield Problem(path, f"{len(value)} entries; it must be {low} to {high if high is not None else 'any'}")
    items = schema.child(schema.raw.get("items"))
    keys = schema.raw.get("x-kubernetes-list-map-keys")
    seen: dict[tuple[str, ...], int] = {}
    for index, one in enumerate(value):
        yield from problems(one, items, (*path, index))
        if keys and isinstance(one, dict) and all(name in one for name in keys):
            identity = tuple(str(one[name]) for name in keys)
            if identity in seen:
                named = ", ".join(f"{name} {part!r}" for name, part in zip(keys, identity, strict=True))
                yield Problem((*path, index), f"{named} stands twice in this list, first in entry {seen[identity]}")
            seen.setdefault(identity, index)


def _scalar(value: Any, schema: Schema, path: Path) -> Iterator[Problem]:
    raw = schema.raw
    if "enum" in raw and value not in raw["enum"]:
        allowed = ", ".join(str(one) for one in raw["enum"] if one is not None)
        yield Problem(path, f"{_shown(value)} is none of {allowed}", nearest(value, map(str, raw["enum"])))
    if "pattern" in raw and re.search(str(raw["pattern"]), str(value)) is None:
        yield Problem(path, f"{_shown(value)} does not have the right form")
    if isinstance(value, str):
        if len(value) < raw.get("minLength", 0) or len(value) > raw.get("maxLength", len(value)):
            bounds = f"{raw.get('minLength', 0)} to {raw.get('maxLength', 'any')}"
            yield Problem(path, f"{len(value)} characters; it must be {bounds}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        bound = _INT_BOUNDS.get(str(raw.get("format")))
        low = raw.get("minimum", -bound if bound else value)
        high = raw.get("maximum", bound - 1 if bound else value)
        if not low <= value <= high:
            yield Problem(path, f"{value} is outside {low} to {high}")


def _is_of(value: Any, kind: str) -> bool:
    if kind == "integer":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "number":
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, {"object": dict, "array": list, "string": str, "boolean": bool}.get(kind, object))


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value if len(str(value)) <= 60 else str(value)[:57] + "...")
