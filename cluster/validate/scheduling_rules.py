"""Rules for where pods may run: tolerations, affinities, spreads, and the label selectors in them.

Used by `pod_rules.py` and, for selectors alone, by `object_rules.py`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem
from penstock.cluster.validate.loose import entries, text, walk, whole

_WITH_VALUES, _WITHOUT_VALUES, _COMPARING = ("In", "NotIn"), ("Exists", "DoesNotExist"), ("Gt", "Lt")


def check_scheduling(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    """Everything wrong with where one pod may run."""
    for index, toleration in entries(spec, "tolerations"):
        here = (*path, "tolerations", index)
        operator = text(toleration, "operator") or "Equal"
        if operator == "Exists" and text(toleration, "value"):
            yield Problem((*here, "value"), "with operator Exists there is no value")
        if operator == "Equal" and not text(toleration, "key"):
            yield Problem(here, "with operator Equal there must be a key")
        if "tolerationSeconds" in toleration and text(toleration, "effect") != "NoExecute":
            yield Problem((*here, "tolerationSeconds"), "only the effect NoExecute has a time")
    for index, spread in entries(spec, "topologySpreadConstraints"):
        skew = whole(spread, "maxSkew")
        if skew is not None and skew < 1:
            yield Problem((*path, "topologySpreadConstraints", index, "maxSkew"), f"{skew} is less than 1")
    for group in ("affinity", "topologySpreadConstraints"):
        yield from check_expressions(spec.get(group), (*path, group))


def check_expressions(tree: object, path: Path) -> Iterator[Problem]:
    """Expressions of selectors anywhere below, and weights of preferences."""
    for place, value in walk(tree):
        if not isinstance(value, dict):
            continue
        here = (*path, *place)
        if place[-2:-1] in (("matchExpressions",), ("matchFields",)):
            yield from _expression(value, here)
        weight = whole(value, "weight")
        if weight is not None and place and isinstance(place[-1], int) and not 1 <= weight <= 100:
            yield Problem((*here, "weight"), f"{weight} is outside 1 to 100")


def _expression(value: dict[str, Any], path: Path) -> Iterator[Problem]:
    operator, values = text(value, "operator"), value.get("values")
    count = len(values) if isinstance(values, list) else 0
    if operator in _WITH_VALUES and not count:
        yield Problem((*path, "values"), f"with operator {operator} there must be values")
    elif operator in _WITHOUT_VALUES and count:
        yield Problem((*path, "values"), f"with operator {operator} there are no values")
    elif operator in _COMPARING and count != 1:
        yield Problem((*path, "values"), f"with operator {operator} there must be exactly one value")
