"""Rules for `rayStartParams`: names and values of `ray start`'s options, as KubeRay passes them on. Pure.

`cluster_rules.py` calls it for every group. All values are text; a test compares the names with `ray start` itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.demands import custom_resources
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import entries, mapping, text, whole
from penstock.cluster.validate.quantities import quantity
from penstock.cluster.validate.resource_rules import is_gpu

OPTIONS = frozenset(
    "address autoscaling-config block dashboard-agent-grpc-port dashboard-agent-listen-port "
    "dashboard-host dashboard-port disable-usage-stats enable-object-reconstruction "
    "head include-dashboard include-log-monitor labels labels-file log-color log-style "
    "max-worker-port memory metrics-export-port min-worker-port no-redirect-output node-ip-address node-manager-port "
    "node-name num-cpus num-gpus object-manager-port object-spilling-directory object-store-memory plasma-directory "
    "port ray-client-server-port ray-debugger-external redis-password "
    "redis-shard-ports redis-username resources runtime-env-agent-port system-config system-reserved-cpu "
    "system-reserved-memory temp-dir tracing-startup-hook verbose worker-port-list enable-resource-isolation "
    "cgroup-path no-monitor proxy-server-url".split()
)
COUNTS = ("num-cpus", "num-gpus", "memory", "object-store-memory")
PORTS = ("port", "dashboard-port", "metrics-export-port", "ray-client-server-port", "node-manager-port")
RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
OWN_OPTIONS = {"CPU": "num-cpus", "GPU": "num-gpus", "memory": "memory", "object_store_memory": "object-store-memory"}
# Start parameter, the name of the container's port that the operator and workers take, Ray's default.
HEAD_PORTS = (
    ("port", "gcs-server", 6379),
    ("dashboard-port", "dashboard", 8265),
    ("ray-client-server-port", "client", 10001),
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SWITCHES = ("block", "include-dashboard", "no-redirect-output", "disable-usage-stats")


def check_start_parameters(group: dict[str, Any], path: Path, is_head: bool) -> Iterator[Problem]:
    """Everything wrong with one group's start parameters."""
    parameters, place = mapping(group, "rayStartParams"), (*path, "rayStartParams")
    for name, value in parameters.items():
        here = (*place, name)
        if name not in OPTIONS:
            yield Problem(here, f"`ray start` has no option {name!r}", nearest(name, OPTIONS))
        elif isinstance(value, str):
            yield from _value(name, value, here)
    if "labels" in parameters:
        yield Problem((*place, "labels"), "the operator refuses it here; set the group's own field `labels`")
    both = [name for name in RESOURCES if text(parameters, name)]
    if both and mapping(group, "resources"):
        yield Problem((*path, "resources"), f"resources stand here and in rayStartParams ({', '.join(both)}); use one")
    if not is_head:
        for name in ("dashboard-host", "port", "head", "ray-client-server-port"):
            if name in parameters:
                yield warning((*place, name), "only the head takes notice of it")
    yield from _devices(group, path)
    if is_head:
        yield from _head(group, parameters, place)


def _devices(group: dict[str, Any], path: Path) -> Iterator[Problem]:
    """Amounts that Ray is told against those that the container has."""
    limits = mapping(group, "template", "spec", "containers", 0, "resources", "limits")
    there = sum(quantity(amount) or 0.0 for name, amount in limits.items() if is_gpu(name))
    own, told = mapping(group, "resources"), mapping(group, "rayStartParams")
    for value, where in (
        (own.get("GPU"), ("resources", "GPU")),
        (told.get("num-gpus"), ("rayStartParams", "num-gpus")),
    ):
        gpus = quantity(value)
        if gpus is not None and gpus > there:
            yield Problem((*path, *where), f"{gpus:g} GPUs are told to Ray; the container has {there:g}")
    for name, amount in own.items():
        if isinstance(amount, str) and (quantity(amount) is None or (quantity(amount) or 0.0) < 0):
            yield Problem((*path, "resources", name), f"{amount!r} is no amount")
    memory, cpus = quantity(limits.get("memory")), quantity(limits.get("cpu"))
    for name in ("memory", "object-store-memory"):
        stated = quantity(told.get(name))
        if memory is not None and stated is not None and stated > memory:
            reason = f"{stated:.0f} bytes are told to Ray; the container has {memory:.0f}"
            yield Problem((*path, "rayStartParams", name), reason)
    stated = quantity(told.get("num-cpus"))
    if cpus is not None and stated is not None and stated > math.ceil(cpus):
        yield warning(
            (*path, "rayStartParams", "num-cpus"), f"{stated:g} CPUs are told to Ray; the container has {cpus:g}"
        )


def _head(group: dict[str, Any], parameters: dict[str, Any], path: Path) -> Iterator[Problem]:
    if text(parameters, "dashboard-host") in LOOPBACK:
        reason = f"{parameters['dashboard-host']}: the operator reaches the dashboard from another pod; 0.0.0.0"
        yield Problem((*path, "dashboard-host"), reason)
    ports = {text(one, "name"): whole(one, "containerPort") for _, one in _container_ports(group)}
    for name, port_name, usual in HEAD_PORTS:
        stated, declared = text(parameters, name) or str(usual), ports.get(port_name)
        if declared is not None and str(declared) != stated:
            reason = f"{name} is {stated}, but the head's port {port_name!r} is {declared}; others ask there"
            yield Problem((*path, name), reason)


def _container_ports(group: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return entries(group, "template", "spec", "containers", 0, "ports")


def _value(name: str, value: str, path: Path) -> Iterator[Problem]:
    if name in COUNTS and (not value.isdigit()):
        yield Problem(path, f"{value!r} is not a whole number")
    elif name in PORTS and not (value.isdigit() and 1 <= int(value) <= 65535):
        yield Problem(path, f"{value!r} is no port")
    elif name in SWITCHES and value not in ("true", "false", ""):
        yield Problem(path, f"{value!r} is neither 'true' nor 'false'", nearest(value, ("true", "false")))
    elif name == "resources" and custom_resources(value) is None:
        yield Problem(path, f'{value!r} is no JSON object of numbers, like \'"{{\\"prefill\\": 1}}"\'')
    elif name == "resources" and (own := [one for one in custom_resources(value) or {} if one in OWN_OPTIONS]):
        yield Problem(path, f"Ray refuses {own[0]} among custom resources; use the option {OWN_OPTIONS[own[0]]}")
    elif name == "object-store-memory" and int(value) < 75 << 20:
        yield Problem(path, f"{value} bytes; Ray wants at least 78643200")
