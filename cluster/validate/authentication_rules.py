"""Rules for Ray's token authentication: by the operator (`authOptions`), or by hand in every container. Pure.

Used by `cluster_rules.py`. A pod without the others' mode or token cannot join; without any, everybody gets in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import at, entries, mapping, text
from penstock.cluster.validate.quantities import shown, version
from penstock.cluster.validate.version_rules import TOKEN_AUTH

MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
MODES = ("disabled", "token")
OPEN_HOSTS = ("0.0.0.0", "::")


def check_authentication(spec: dict[str, Any], path: Path, kind: str) -> Iterator[Problem]:
    """`kind`: of the object that the cluster's spec stands in."""
    by_operator = text(spec, "authOptions", "mode") == "token"
    containers = list(_containers(spec, path))
    modes = {place: text(_variables(one).get(MODE, (0, {}))[1], "value") for place, one in containers}
    if by_operator:
        for place, container in containers:
            for name in (MODE, TOKEN):
                if name in _variables(container):
                    here = (*place, "env", _variables(container)[name][0])
                    yield Problem(here, f"authOptions sets {name} already; leave it out")
        if not text(spec, "rayVersion"):
            yield Problem((*path, "rayVersion"), "with authOptions.mode: token the operator asks for Ray's version")
    elif "token" not in modes.values():
        yield from _everybody(spec, path)
        yield from _misspelt(containers)
    else:
        yield from _misspelt(containers)
        yield from _by_hand(spec, path, containers, modes)
        if kind != "RayCluster":
            reason = f"the operator itself has no token where {MODE} is set by hand; set authOptions.mode: token"
            yield warning((*path, "authOptions"), reason)


def _everybody(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    host = text(spec, "headGroupSpec", "rayStartParams", "dashboard-host")
    opened = "whoever reaches the dashboard" if host in OPEN_HOSTS else "whoever reaches Ray's ports"
    stated = (*path, "headGroupSpec", "rayStartParams", "dashboard-host")
    place = stated if host in OPEN_HOSTS else (*path, "authOptions")
    yield warning(place, f"without authOptions.mode: token {opened} can run code in this cluster")


def _misspelt(containers: list[tuple[Path, dict[str, Any]]]) -> Iterator[Problem]:
    for place, container in containers:
        index, variable = _variables(container).get(MODE, (0, {}))
        value = text(variable, "value")
        if value and value not in MODES:
            here = (*place, "env", index, "value")
            yield Problem(here, f"{MODE} {value!r} is none of {', '.join(MODES)}", nearest(value, MODES))


def _by_hand(
    spec: dict[str, Any], path: Path, containers: list[tuple[Path, dict[str, Any]]], modes: dict[Path, str]
) -> Iterator[Problem]:
    for place, container in containers:
        if at(container, "envFrom"):
            continue  # what those variables are stands elsewhere
        if modes[place] == "":
            yield Problem(
                (*place, "env"), f"{MODE} is token in other pods of this cluster and not here; it cannot join"
            )
        elif modes[place] == "token" and not {TOKEN, TOKEN_FILE} & set(_variables(container)):
            yield Problem((*place, "env"), f"{MODE} is token, but there is neither {TOKEN} nor {TOKEN_FILE}")
    ray = version(text(spec, "rayVersion"))
    if ray is not None and ray < TOKEN_AUTH:
        reason = f"{MODE} needs Ray {shown(TOKEN_AUTH)} or newer; rayVersion is {shown(ray)}"
        yield Problem((*path, "rayVersion"), reason)


def _containers(spec: dict[str, Any], path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Ray's container of the head and of every worker group, with its place."""
    inside = ("template", "spec", "containers", 0)
    yield (*path, "headGroupSpec", *inside), mapping(spec, "headGroupSpec", *inside)
    for index, group in entries(spec, "workerGroupSpecs"):
        yield (*path, "workerGroupSpecs", index, *inside), mapping(group, *inside)


def _variables(container: dict[str, Any]) -> dict[str, tuple[int, dict[str, Any]]]:
    return {text(one, "name"): (index, one) for index, one in entries(container, "env")}
