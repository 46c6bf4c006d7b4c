"""Rules for pod templates of any kind: images, mounts, resources, ports, probes, rights.

The environment is in `environment_rules.py`, where pods may run in `scheduling_rules.py`; what only concerns Ray's pods
stands in `ray_pod_rules.py`. Used by `workload_rules.py`, `job_rules.py` and `cluster_rules.py`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.environment_rules import check_environment
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.image_rules import check_image
from penstock.cluster.validate.loose import at, entries, mapping, switch, text, whole
from penstock.cluster.validate.resource_rules import check_resources
from penstock.cluster.validate.scheduling_rules import check_scheduling

PROBES = ("readinessProbe", "livenessProbe", "startupProbe")
_PROBE_LEAST = {"periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 1, "initialDelaySeconds": 0}
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?")


def check_pod(template: Any, path: Path, claims: frozenset[str] = frozenset()) -> Iterator[Problem]:
    """Everything wrong with one pod template. `claims`: volumes that a StatefulSet adds."""
    spec, place = mapping(template, "spec"), (*path, "spec")
    volumes = [text(volume, "name") for _, volume in entries(spec, "volumes")]
    names: set[str] = set()
    for group in ("initContainers", "containers"):
        for index, container in entries(spec, group):
            here = (*place, group, index)
            if (name := text(container, "name")) in names:
                yield Problem((*here, "name"), f"two containers are called {name!r}")
            names.add(name)
            if name and (not _LABEL.fullmatch(name) or len(name) > 63):
                yield Problem((*here, "name"), f"{name!r}: at most 63 lower-case letters, digits and dashes")
            yield from _container(container, here)
            yield from _mounts(container, here, {*volumes, *claims})
    yield from _volumes(spec, place)
    grace = whole(spec, "terminationGracePeriodSeconds")
    if grace is not None and grace < 0:
        yield Problem((*place, "terminationGracePeriodSeconds"), f"{grace} is less than 0")
    yield from check_scheduling(spec, place)
    yield from _security(spec, place)


def _container(container: dict[str, Any], path: Path) -> Iterator[Problem]:
    image = text(container, "image")
    if image:
        yield from check_image(image, (*path, "image"))
    elif "image" not in container:
        yield Problem((*path, "image"), "there is no image")
    yield from check_resources(mapping(container, "resources"), (*path, "resources"))
    yield from _ports(container, path)
    for name in PROBES:
        if name in container:
            yield from _probe(container, name, path)
    yield from check_environment(container, path)


def _ports(container: dict[str, Any], path: Path) -> Iterator[Problem]:
    names: set[str] = set()
    numbers: set[tuple[int | None, str]] = set()
    for index, port in entries(container, "ports"):
        here = (*path, "ports", index)
        number, name = whole(port, "containerPort"), text(port, "name")
        if number is not None and not 1 <= number <= 65535:
            yield Problem((*here, "containerPort"), f"{number} is outside 1 to 65535")
        if name and not _PORT_NAME.fullmatch(name):
            yield Problem(
                (*here, "name"), f"{name!r}: a port's name has at most 15 lower-case letters, digits and dashes"
            )
        if name and name in names:
            yield Problem((*here, "name"), f"two ports are called {name!r}")
        names.add(name)
        if number is not None and (number, text(port, "protocol")) in numbers:
            yield Problem((*here, "containerPort"), f"{number} stands twice among this container's ports")
        numbers.add((number, text(port, "protocol")))


def _probe(container: dict[str, Any], name: str, path: Path) -> Iterator[Problem]:
    probe, place = mapping(container, name), (*path, name)
    kinds = [kind for kind in ("exec", "httpGet", "tcpSocket", "grpc") if kind in probe]
    if len(kinds) != 1:
        yield Problem(place, f"a probe has exactly one of exec, httpGet, tcpSocket, grpc; here are {len(kinds)}")
        return
    for key, least in _PROBE_LEAST.items():
        value = whole(probe, key)
        if value is not None and value < least:
            yield Problem((*place, key), f"{value} is less than {least}")
    if name != "readinessProbe" and whole(probe, "successThreshold") not in (None, 1):
        yield Problem((*place, "successThreshold"), "must be 1 but for readiness")
    port = at(probe, kinds[0], "port")
    declared = {text(one, "name"): whole(one, "containerPort") for _, one in entries(container, "ports")}
    if isinstance(port, str) and port not in declared:
        reason = f"no port of this container is called {port!r}"
        yield Problem((*place, kinds[0], "port"), reason, nearest(port, declared))
    elif isinstance(port, int) and not 1 <= port <= 65535:
        yield Problem((*place, kinds[0], "port"), f"{port} is outside 1 to 65535")
    elif isinstance(port, int) and declared and port not in declared.values():
        yield warning((*place, kinds[0], "port"), f"{port} is no port that this container declares")
    route = text(probe, "httpGet", "path")
    if kinds[0] == "httpGet" and not route.startswith("/"):
        yield Problem((*place, "httpGet", "path"), f"{route!r} must start with '/'")


def _mounts(container: dict[str, Any], path: Path, volumes: set[str]) -> Iterator[Problem]:
    targets: set[str] = set()
    for index, mount in entries(container, "volumeMounts"):
        here = (*path, "volumeMounts", index)
        name, target = text(mount, "name"), text(mount, "mountPath")
        if name and name not in volumes:
            yield Problem((*here, "name"), f"this pod has no volume {name!r}", nearest(name, volumes))
        if target and not target.startswith("/"):
            yield Problem((*here, "mountPath"), f"{target!r} is not an absolute path")
        if target and target in targets:
            yield Problem((*here, "mountPath"), f"two volumes are mounted at {target}")
        targets.add(target)


def _volumes(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    names: set[str] = set()
    for index, volume in entries(spec, "volumes"):
        here, name = (*path, "volumes", index), text(volume, "name")
        if name in names:
            yield Problem((*here, "name"), f"two volumes are called {name!r}")
        names.add(name)
        sources = [key for key in volume if key != "name"]
        if len(sources) != 1:
            yield Problem(here, f"volume {name!r} has {len(sources)} sources; it needs exactly one")


def _security(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    pod = mapping(spec, "securityContext")
    if switch(spec, "hostNetwork") or switch(spec, "hostPID") or switch(spec, "hostIPC"):
        yield warning(path, "the pod shares its node's network or processes (hostNetwork, hostPID, hostIPC)")
    for index, container in entries(spec, "containers"):
        here = (*path, "containers", index, "securityContext")
        own = mapping(container, "securityContext")
        merged = {**pod, **own}
        if merged.get("runAsUser") == 0:
            place = here if "runAsUser" in own else (*path, "securityContext")
            reason = "the pod runs as root"
            yield (
                Problem((*place, "runAsUser"), reason)
                if switch(merged, "runAsNonRoot")
                else warning((*place, "runAsUser"), reason)
            )
        elif not switch(merged, "runAsNonRoot"):
            yield warning(here, "the container may run as root; set securityContext.runAsNonRoot: true")
        if switch(own, "privileged"):
            yield warning((*here, "privileged"), "a privileged container owns its node")
        elif at(own, "allowPrivilegeEscalation") is not False:
            yield warning((*here, "allowPrivilegeEscalation"), "set it to false; nothing here needs more rights")
