"""A short way to write structural schemas: Python literals in, the tree of a `structural.Schema` out.

    "str" "int" "bool" "num" "any"      a scalar, or anything
    "strs"                              a list of text
    "map"                               text to text
    "quantity"                          500m, 8Gi, 2
    "quantities"                        resource name to quantity
    "intstr"                            a number or text (ports, percentages)
    "=A|B|C"                            one of these
    [item]                              a list of items
    {"key": ..., "needed!": ...}        exactly these keys; those with "!" are required

Used by `core_tables.py` and `ray_tables.py`, which hold field names only. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTITY = {
    "x-kubernetes-int-or-string": True,
    "pattern": r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(([KMGTPE]i)|[numkMGTPE]|([eE][+-]?[0-9]+))?$",
}
# The API server reads 0.5 as a quantity in its own kinds; in custom kinds it refuses what is no integer or text.
NUMBER_TOO = {"type": ["integer", "number", "string"], "pattern": QUANTITY["pattern"]}
_LEAVES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer", "format": "int64"},
    "bool": {"type": "boolean"},
    "num": {"type": "number"},
    "any": {},
    "strs": {"type": "array", "items": {"type": "string"}},
    "map": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantity": QUANTITY,
    "quantities": {"type": "object", "additionalProperties": QUANTITY},
    "intstr": {"x-kubernetes-int-or-string": True},
}


def with_quantity(raw: Any, quantity: Mapping[str, Any]) -> Any:
    """The same tree with other quantities."""
    if raw is QUANTITY:
        return quantity
    if isinstance(raw, Mapping):
        return {name: with_quantity(part, quantity) for name, part in raw.items()}
    return raw


def raw_schema(table: object, closed: bool = True) -> dict[str, Any]:
    """The plain tree that a table means. Not `closed`: keys that the table does not know are let pass."""
    if isinstance(table, str):
        return {"type": "string", "enum": table[1:].split("|")} if table.startswith("=") else _LEAVES[table]
    if isinstance(table, list):
        return {"type": "array", "items": raw_schema(table[0], closed)}
    if isinstance(table, dict):
        return {
            "type": "object",
            "properties": {name.rstrip("!"): raw_schema(part, closed) for name, part in table.items()},
            "required": [name.rstrip("!") for name in table if name.endswith("!")],
            "additionalProperties": not closed,
        }
    raise TypeError(f"{table!r} is no schema table")
