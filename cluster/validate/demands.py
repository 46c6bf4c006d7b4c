"""What applications ask of a Ray cluster, and what its groups offer: the two sides of the sums in `capacity_rules.py`.

Read from a Serve configuration and from a `RayCluster` spec with defaults put in. Pure.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.settings import ClusterConfig
from penstock.cluster.validate.application_rules import DEPLOYMENT, application_config, is_ours
from penstock.cluster.validate.findings import Path
from penstock.cluster.validate.loose import at, entries, mapping, number, switch, text, whole
from penstock.cluster.validate.quantities import quantity
from penstock.cluster.validate.resource_rules import LEAST_MEMORY
from penstock.workers.protocol import Role

CONTROL_CPUS = 0.01  # our controller
Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Demand:
    """`count` times something that needs `each` on one node."""

    path: Path
    what: str
    count: int
    each: Resources
    per_node: int = 0  # most on one node; 0 = any number
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes it may be on
    together: int = 1  # so many of it belong on one node, if one can hold them


@dataclass(frozen=True, slots=True)
class Group:
    """One group of pods. `most` pods of it, each offering `each`."""

    path: Path
    name: str
    most: int
    each: Resources
    is_head: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    memory: float = 0.0  # bytes of one pod; 0 = not stated


def configs_of(serve_config: object) -> list[ClusterConfig]:
    """The configuration of every Penstock application."""
    return [application_config(one) for _, one in entries(serve_config, "applications") if is_ours(one)]


def longest_shutdown_s(serve_config: object) -> float:
    """The longest `graceful_shutdown_timeout_s` that a deployment of Penstock states; 0 where none does."""
    stated = [
        number(deployment, "graceful_shutdown_timeout_s") or 0.0
        for _, application in entries(serve_config, "applications")
        if is_ours(application)
        for _, deployment in entries(application, "deployments")
    ]
    return max(stated, default=0.0)


def demands_of(serve_config: object, base: Path) -> Iterator[Demand]:
    """Everything that a Serve configuration asks for."""
    for index, application in entries(serve_config, "applications"):
        path = (*base, "applications", index)
        if is_ours(application):
            yield from _ours(application_config(application), application, path)
        for number_, deployment in entries(application, "deployments"):
            if not is_ours(application):
                yield from _theirs(deployment, (*path, "deployments", number_))


def _ours(config: ClusterConfig, application: dict[str, Any], path: Path) -> Iterator[Demand]:
    pools, ray = config.pools, config.ray
    place = (*path, "args")
    own = {Role.PREFILL: ray.prefill_resources, Role.DECODE: ray.decode_resources, Role.MIXED: ray.mixed_resources}
    for role in (Role.PREFILL, Role.DECODE, Role.MIXED):
        count, width = pools.count(role), pools.width(role)
        if count:
            # One bundle for every rank.
            each = {"CPU": ray.worker_num_cpus, "GPU": ray.worker_num_gpus, **_numbers(own[role])}
            what = f"{role.value} workers" if width == 1 else f"ranks of {role.value} workers ({count} of {width})"
            yield Demand(place, what, count * width, each, labels=ray.worker_label_selector, together=width)
    per_node = ray.max_ingress_per_node
    actor: dict[str, float] = {"CPU": ray.ingress_num_cpus}
    for _, deployment in entries(application, "deployments"):
        if text(deployment, "name") == DEPLOYMENT:
            per_node = whole(deployment, "max_replicas_per_node") or per_node
            actor |= _actor_options(deployment)
        for number_, bundle in entries(deployment, "placement_group_bundles"):
            here = (*path, "deployments", 0, "placement_group_bundles", number_)
            yield Demand(here, "bundles of the ingress", ray.ingress_replicas, _numbers(bundle))
    yield Demand(place, "ingress replicas", ray.ingress_replicas, actor, per_node)
    yield Demand(place, "controller", 1, {"CPU": CONTROL_CPUS})


def _theirs(deployment: dict[str, Any], path: Path) -> Iterator[Demand]:
    count = whole(deployment, "num_replicas")
    if count is None:
        count = whole(deployment, "autoscaling_config", "min_replicas") or 1
    name = text(deployment, "name")
    per_node = whole(deployment, "max_replicas_per_node") or 0
    bundles = [_numbers(bundle) for _, bundle in entries(deployment, "placement_group_bundles")]
    if not bundles:
        yield Demand(path, f"replicas of {name}", count, _actor_options(deployment), per_node)
    elif text(deployment, "placement_group_strategy") == "STRICT_PACK":
        together = {key: sum(bundle.get(key, 0.0) for bundle in bundles) for bundle in bundles for key in bundle}
        place = (*path, "placement_group_bundles")
        yield Demand(place, f"replicas of {name}, each on one node (STRICT_PACK)", count, together, per_node)
    else:
        for index, bundle in enumerate(bundles):
            yield Demand((*path, "placement_group_bundles", index), f"bundles of {name}", count, bundle)


def _actor_options(deployment: dict[str, Any]) -> dict[str, float]:
    """Only what is stated: what the code asks for is not known here."""
    options = mapping(deployment, "ray_actor_options")
    found = _numbers(mapping(options, "resources"))
    for key, name in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        amount = number(options, key)
        if amount is not None:
            found[name] = amount
    return found


def _numbers(raw: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): amount for key in raw if (amount := number(raw, key)) is not None}


def groups_of(spec: dict[str, Any], path: Path) -> list[Group]:
    """The head and the worker groups of a `RayCluster` spec at `path`."""
    scaling = switch(spec, "enableInTreeAutoscaling")
    head = mapping(spec, "headGroupSpec")
    groups = [Group((*path, "headGroupSpec"), "head", 1, offered(head), True, mapping(head, "labels"))]
    for index, group in entries(spec, "workerGroupSpecs"):
        replicas = whole(group, "replicas") or 0
        least, most = whole(group, "minReplicas") or 0, whole(group, "maxReplicas")
        pods = most if scaling and most is not None else max(replicas, least)
        pods = 0 if switch(group, "suspend") else pods
        hosts = whole(group, "numOfHosts") or 1
        place = (*path, "workerGroupSpecs", index)
        groups.append(
            Group(
                place,
                text(group, "groupName"),
                pods * hosts,
                offered(group),
                labels=mapping(group, "labels"),
                memory=_memory(group),
            )
        )
    return groups


def _memory(group: dict[str, Any]) -> float:
    resources = mapping(group, "template", "spec", "containers", 0, "resources")
    stated = quantity(at(resources, "limits", "memory")) or 0.0
    return stated if stated >= LEAST_MEMORY else 0.0  # less is a mistake of its own


def offered(group: dict[str, Any]) -> dict[str, float]:
    """What Ray takes one pod of a group for: its start parameters, its `resources`, else the container's limits."""
    container = mapping(group, "template", "spec", "containers", 0, "resources")
    limits = {**mapping(container, "requests"), **mapping(container, "limits")}
    found: dict[str, float] = {}
    cpu = quantity(limits.get("cpu"))
    if cpu is not None:
        found["CPU"] = float(math.ceil(cpu))
    found["GPU"] = sum(quantity(amount) or 0.0 for name, amount in limits.items() if name.endswith("/gpu"))
    parameters = mapping(group, "rayStartParams")
    for name, key in (("num-cpus", "CPU"), ("num-gpus", "GPU")):
        stated = quantity(parameters.get(name))
        if stated is not None:
            found[key] = stated
    found |= custom_resources(parameters.get("resources")) or {}
    for name, amount in mapping(group, "resources").items():
        stated = quantity(amount)
        if stated is not None:
            found[name] = stated
    return found


def custom_resources(text_: object) -> dict[str, float] | None:
    """`rayStartParams.resources`, a JSON object within (shell) quotes; None for what is none."""
    if not isinstance(text_, str):
        return None
    plain = text_.strip().strip("'")
    for attempt in (plain, plain.strip('"').replace('\\"', '"')):
        try:
            raw = json.loads(attempt)
        except ValueError:
            continue
        if isinstance(raw, str):
            return custom_resources(raw) if raw != text_ else None
        if isinstance(raw, dict) and all(at(raw, key) is not None for key in raw):
            return _numbers(raw)
    return None
