"""Rules for the environment of containers, and for secrets that stand in plain text anywhere in a document.

Used by `pod_rules.py`, `object_rules.py` and `serve_rules.py`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from penstock.cluster.config import ENVIRONMENT_KEYS, URL_VARIABLE
from penstock.cluster.validate.findings import Path, Problem, nearest
from penstock.cluster.validate.loose import at, entries, mapping, text, walk

OUR_VARIABLES = (*ENVIRONMENT_KEYS, URL_VARIABLE)
_SECRET_NAME = re.compile(
    r"((^|_)(PASS|PASSPHRASE|SECRET|TOKEN|API_?KEY|PRIVATE_KEY|ACCESS_KEY|SECRET_KEY|CREDENTIALS?)"
    r"|PASSWORD|PASSWD|APIKEY|AUTHTOKEN)([0-9]*)$",
    re.IGNORECASE,
)
_TAKEN_ELSEWHERE = re.compile(r"\$[({]?[A-Za-z_][A-Za-z0-9_]*[)}]?|[0-9]{1,6}|true|false|none", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{20,}|AIza[\w-]{35})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_SECRET_OPTION = re.compile(
    r"--?(api[-_]key|password|passwd|requirepass|token|secret|auth[-_]token)(?:[= ](.+))?", re.I
)
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_SOURCES = ("configMapKeyRef", "secretKeyRef", "fieldRef", "resourceFieldRef", "fileKeyRef")
_FIELDS = (
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
)
_FIELD_BY_KEY = re.compile(r"metadata\.(labels|annotations)\['[^']+'\]")


def check_environment(container: dict[str, Any], path: Path) -> Iterator[Problem]:
    """Everything wrong with one container's `env`, `envFrom`, and with secrets among its arguments."""
    names: set[str] = set()
    for index, variable in entries(container, "env"):
        here = (*path, "env", index)
        name, value = text(variable, "name"), text(variable, "value")
        if name in names:
            yield Problem((*here, "name"), f"the variable {name!r} is set twice")
        names.add(name)
        if not _VARIABLE.fullmatch(name):
            yield Problem((*here, "name"), f"{name!r} is no name of a variable")
        if is_secret(name, value):
            yield Problem((*here, "value"), f"{name} in plain text; take it from a secret (valueFrom.secretKeyRef)")
        if name.startswith("PENSTOCK") and name not in OUR_VARIABLES:
            yield Problem((*here, "name"), f"Penstock reads no variable {name!r}", nearest(name, OUR_VARIABLES))
        yield from _source(variable, name, here)
    for index, source in entries(container, "envFrom"):
        kinds = [kind for kind in ("configMapRef", "secretRef") if kind in source]
        if len(kinds) != 1:
            yield Problem(
                (*path, "envFrom", index), f"exactly one of configMapRef and secretRef; here are {len(kinds)}"
            )
        elif not text(source, kinds[0], "name"):
            yield Problem((*path, "envFrom", index, kinds[0], "name"), "there is no name")
    yield from _arguments(container, path)


def _source(variable: dict[str, Any], name: str, path: Path) -> Iterator[Problem]:
    if "valueFrom" not in variable:
        return
    place = (*path, "valueFrom")
    if text(variable, "value"):
        yield Problem(path, f"{name}: value and valueFrom exclude each other")
    kinds = [kind for kind in _SOURCES if kind in mapping(variable, "valueFrom")]
    if len(kinds) != 1:
        yield Problem(place, f"{name} needs exactly one of {', '.join(_SOURCES[:4])}; here are {len(kinds)}")
    elif kinds[0].endswith("KeyRef") and kinds[0] != "fileKeyRef" and not text(variable, "valueFrom", kinds[0], "name"):
        yield Problem((*place, kinds[0], "name"), "there is no name")
    elif kinds[0].endswith("KeyRef") and at(variable, "valueFrom", kinds[0], "key") == "":
        yield Problem((*place, kinds[0], "key"), "there is no key")
    field = text(variable, "valueFrom", "fieldRef", "fieldPath")
    if field and field not in _FIELDS and not _FIELD_BY_KEY.fullmatch(field):
        yield Problem((*place, "fieldRef", "fieldPath"), f"a pod cannot tell {field!r}", nearest(field, _FIELDS))


def _arguments(container: dict[str, Any], path: Path) -> Iterator[Problem]:
    for group in ("command", "args"):
        listed = at(container, group)
        words = listed if isinstance(listed, list) else []
        for index, word in enumerate(words):
            found = _SECRET_OPTION.fullmatch(word) if isinstance(word, str) else None
            after = words[index + 1] if index + 1 < len(words) else ""
            value = (found[2] or after) if found is not None else ""
            if found is not None and isinstance(value, str) and not value.startswith(("-", "$")) and value:
                reason = f"--{found[1]} in plain text; take it from a secret through a variable: $(NAME)"
                yield Problem((*path, group, index if found[2] else index + 1), reason)


def is_secret(name: str, value: object) -> bool:
    """Whether a variable of this name and value gives a secret away."""
    if not isinstance(value, str) or not value or _TAKEN_ELSEWHERE.fullmatch(value):
        return False
    return _SECRET_NAME.search(name) is not None


def keys_in_plain_text(tree: object, path: Path = ()) -> Iterator[Problem]:
    """Values anywhere that have the form of a well-known service's key."""
    for place, value in walk(tree):
        found = _SECRET_VALUE.search(value) if isinstance(value, str) else None
        if found is not None:
            shown = f"{found[0][:8]}..."
            yield Problem(
                (*path, *place), f"a key in plain text ({shown}); take it from a secret, and have it exchanged"
            )
