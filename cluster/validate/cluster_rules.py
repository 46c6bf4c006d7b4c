"""Rules for a `RayCluster` spec, wherever it stands: what KubeRay's operator refuses, and what would not serve.

Used by `service_rules.py`, `job_rules.py` and `object_rules.py`. Rules of the operator that a schema cannot state are
stated again here. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from penstock.cluster.settings import ClusterConfig
from penstock.cluster.validate.authentication_rules import check_authentication
from penstock.cluster.validate.environment_rules import check_environment
from penstock.cluster.validate.findings import Path, Problem, warning
from penstock.cluster.validate.image_rules import check_image
from penstock.cluster.validate.loose import at, entries, mapping, switch, text, whole
from penstock.cluster.validate.pod_rules import check_pod
from penstock.cluster.validate.ray_pod_rules import check_ray_pod, check_shutdown
from penstock.cluster.validate.resource_rules import check_resources
from penstock.cluster.validate.start_parameters import check_start_parameters
from penstock.cluster.validate.version_rules import check_versions

UNBOUNDED = 2147483647
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_GROUP_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_HOST_PORT = re.compile(r"(rediss?://)?[A-Za-z0-9.-]+:[0-9]{1,5}(,(rediss?://)?[A-Za-z0-9.-]+:[0-9]{1,5})*")
GATED = {
    "networkPolicy": "the operator's feature gate for network policies",
    "tlsOptions": "the operator's feature gate for mTLS",
    "historyServerOptions": "the operator's feature gate for the history server",
}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the rules of a cluster have to know of the object it stands in."""

    kind: str
    annotations: dict[str, Any]
    stated: dict[str, Any]  # the spec as written, without defaults
    configs: tuple[ClusterConfig, ...] = ()  # of the Penstock applications that run in it

    shutdown_s: float = 0.0  # the longest graceful_shutdown_timeout_s that is stated

    @property
    def drain_s(self) -> float | None:
        """The longest drain of those applications."""
        return max((config.health.drain_s for config in self.configs), default=None)


def check_cluster(spec: dict[str, Any], path: Path, around: Surroundings) -> Iterator[Problem]:
    """Everything wrong with a spec that has its defaults."""
    yield from check_versions(spec, path, around.kind, bool(around.configs))
    yield from check_authentication(spec, path, around.kind)
    yield from _head(spec, path, around)
    yield from _groups(spec, path, around)
    yield from _autoscaling(spec, path)
    yield from _fault_tolerance(spec, path, around)
    for name, gate in GATED.items():
        if mapping(spec, name):
            yield warning((*path, name), f"needs {gate}, which is off by default")


def _each_group(group: dict[str, Any], path: Path, around: Surroundings, is_head: bool = False) -> Iterator[Problem]:
    template = (*path, "template")
    if not entries(group, "template", "spec", "containers"):
        yield Problem((*template, "spec", "containers"), "there is no container")
    widest = max((config.pools.widest for config in around.configs), default=1)
    yield from check_pod(group.get("template"), template)
    drain = None if is_head else around.drain_s
    yield from check_ray_pod(group.get("template"), template, drain, widest)
    if drain is not None:
        yield from check_shutdown(group.get("template"), template, around.shutdown_s)
    yield from check_start_parameters(group, path, is_head)
    for key, value in mapping(group, "labels").items():
        if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(str(value)):
            yield Problem((*path, "labels", key), f"{key}={value} is no label")


def _head(spec: dict[str, Any], path: Path, around: Surroundings) -> Iterator[Problem]:
    head, place = mapping(spec, "headGroupSpec"), (*path, "headGroupSpec")
    yield from _each_group(head, place, around, is_head=True)
    cpus = text(head, "rayStartParams", "num-cpus") or str(at(head, "resources", "CPU") or "")
    if around.configs and cpus != "0":
        where = (*place, "rayStartParams", "num-cpus")
        yield warning(where, 'set it to "0", so that no worker or ingress lands on the head')


def _groups(spec: dict[str, Any], path: Path, around: Surroundings) -> Iterator[Problem]:
    scaling = switch(spec, "enableInTreeAutoscaling")
    names: set[str] = set()
    for index, group in entries(spec, "workerGroupSpecs"):
        place = (*path, "workerGroupSpecs", index)
        name = text(group, "groupName")
        if name in names:
            yield Problem((*place, "groupName"), f"two groups are called {name!r}")
        names.add(name)
        if name == "headgroup" or not _GROUP_NAME.fullmatch(name) or len(name) > 63:
            yield Problem(
                (*place, "groupName"), f"{name!r}: lower-case letters, digits and dashes, and not 'headgroup'"
            )
        yield from _counts(group, at(around.stated, "workerGroupSpecs", index), place, scaling)
        yield from _each_group(group, place, around)
    if around.configs and not names:
        yield Problem((*path, "workerGroupSpecs"), "there is no group for workers to run on")


def _counts(group: dict[str, Any], stated: Any, path: Path, scaling: bool) -> Iterator[Problem]:
    least, most = whole(group, "minReplicas") or 0, whole(group, "maxReplicas")
    replicas, hosts = whole(group, "replicas"), whole(group, "numOfHosts")
    for name in ("minReplicas", "maxReplicas", "replicas"):
        value = whole(group, name)
        if value is not None and value < 0:
            yield Problem((*path, name), f"{value} is less than 0")
    if hosts is not None and hosts < 1:
        yield Problem((*path, "numOfHosts"), f"{hosts} is less than 1")
    if isinstance(stated, dict) and "maxReplicas" not in stated:
        if "minReplicas" not in stated and not scaling:
            yield Problem((*path, "maxReplicas"), "without minReplicas and maxReplicas the operator refuses the group")
        else:
            yield warning((*path, "maxReplicas"), f"not stated, so {UNBOUNDED}")
    elif scaling and most == UNBOUNDED:
        yield warning((*path, "maxReplicas"), "no bound for the autoscaler")
    if most is not None and least > most:
        yield Problem((*path, "minReplicas"), f"minReplicas {least} is more than maxReplicas {most}")
    elif replicas is not None and most is not None and not least <= replicas <= most and "replicas" in (stated or {}):
        yield Problem((*path, "replicas"), f"replicas {replicas} is outside minReplicas {least} to maxReplicas {most}")
    if not scaling and not replicas and not least and not switch(group, "suspend"):
        yield warning((*path, "replicas"), "the group has no pod, and no autoscaler to add one")


def _autoscaling(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    scaling = switch(spec, "enableInTreeAutoscaling")
    variables = {
        text(one, "name"): (index, text(one, "value"))
        for index, one in entries(spec, "headGroupSpec", "template", "spec", "containers", 0, "env")
    }
    chosen = variables.get("RAY_enable_autoscaler_v2")
    if chosen is not None:
        place = (*path, "headGroupSpec", "template", "spec", "containers", 0, "env", chosen[0])
        if not scaling and chosen[1] in ("1", "true"):
            yield Problem(place, "RAY_enable_autoscaler_v2 without enableInTreeAutoscaling")
        elif scaling and text(spec, "autoscalerOptions", "version"):
            yield Problem(place, "RAY_enable_autoscaler_v2 and autoscalerOptions.version are both set; use the latter")
    options, where = mapping(spec, "autoscalerOptions"), (*path, "autoscalerOptions")
    if (whole(options, "idleTimeoutSeconds") or 0) < 0:
        yield Problem((*where, "idleTimeoutSeconds"), f"{options['idleTimeoutSeconds']} is less than 0")
    yield from check_resources(mapping(options, "resources"), (*where, "resources"))
    yield from check_environment(options, where)
    if text(options, "image"):
        yield from check_image(text(options, "image"), (*where, "image"))
    if options and not scaling:
        yield warning(where, "without enableInTreeAutoscaling there is no autoscaler")
    for index, group in entries(spec, "workerGroupSpecs"):
        if switch(group, "suspend") and scaling:
            yield Problem(
                (*path, "workerGroupSpecs", index, "suspend"), "a group cannot be suspended beside autoscaling"
            )


def _fault_tolerance(spec: dict[str, Any], path: Path, around: Surroundings) -> Iterator[Problem]:
    options, place = mapping(spec, "gcsFaultToleranceOptions"), (*path, "gcsFaultToleranceOptions")
    head = mapping(spec, "headGroupSpec")
    container = (*path, "headGroupSpec", "template", "spec", "containers", 0)
    variables = {text(one, "name"): i for i, one in entries(head, "template", "spec", "containers", 0, "env")}
    on = "gcsFaultToleranceOptions" in spec
    if "ray.io/ft-enabled" in around.annotations and on:
        yield Problem(place, "the annotation ray.io/ft-enabled and gcsFaultToleranceOptions exclude each other")
    by_annotation = str(around.annotations.get("ray.io/ft-enabled", "")).lower() == "true"
    if "ray.io/external-storage-namespace" in around.annotations and on:
        reason = "the annotation ray.io/external-storage-namespace is now externalStorageNamespace of these options"
        yield Problem(place, reason)
    if "RAY_REDIS_ADDRESS" in variables and not by_annotation:
        here = (*container, "env", variables["RAY_REDIS_ADDRESS"])
        yield Problem(here, "set gcsFaultToleranceOptions.redisAddress instead of RAY_REDIS_ADDRESS")
    for name, field in (("REDIS_PASSWORD", "redisPassword"), ("REDIS_USERNAME", "redisUsername")):
        if name in variables and (on or name == "REDIS_USERNAME"):
            here = (*container, "env", variables[name])
            yield Problem(here, f"set gcsFaultToleranceOptions.{field} instead of {name}")
    for name, field in (("redis-password", "redisPassword"), ("redis-username", "redisUsername")):
        stated = text(head, "rayStartParams", name)
        if stated and (on or not stated.startswith("$")):
            here = (*path, "headGroupSpec", "rayStartParams", name)
            plain = "" if stated.startswith("$") else "in plain text; "
            yield Problem(here, f"{plain}set gcsFaultToleranceOptions.{field} from a secret")
    if not on:
        return
    if text(options, "backend") == "rocksdb":
        yield warning((*place, "backend"), "embedded storage is alpha: it needs the operator's feature gate")
        if options.get("redisAddress"):
            yield Problem((*place, "redisAddress"), "backend rocksdb uses no Redis")
        return
    address = text(options, "redisAddress")
    if not address:
        yield Problem((*place, "redisAddress"), "without an address there is no Redis to keep the state in")
    elif not _HOST_PORT.fullmatch(address):
        yield Problem((*place, "redisAddress"), f"{address!r} is not host:port")
    if options.get("storage"):
        yield Problem((*place, "storage"), "only backend rocksdb has storage of its own")
    if text(options, "redisPassword", "value"):
        here = (*place, "redisPassword", "value")
        yield Problem(here, "a password in plain text; take it from a secret (valueFrom.secretKeyRef)")
    elif "redisPassword" not in options:
        yield warning((*place, "redisPassword"), "whoever reaches this Redis owns the cluster; set a password")
    if around.kind == "RayService" and text(options, "externalStorageNamespace"):
        reason = "during an upgrade two clusters would share this namespace; leave it out"
        yield warning((*place, "externalStorageNamespace"), reason)
