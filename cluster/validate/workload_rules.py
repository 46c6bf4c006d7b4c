"""Rules for what runs pods (deployments, stateful and daemon sets, jobs) and for autoscalers.

What the API server refuses without its schema saying so. Used by `object_rules.py`. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, nearest
from penstock.cluster.validate.loose import entries, mapping, text, whole
from penstock.cluster.validate.pod_rules import check_pod
from penstock.cluster.validate.scheduling_rules import check_expressions

_STRATEGIES = {
    "Deployment": ("strategy", ("RollingUpdate", "Recreate")),
    "StatefulSet": ("updateStrategy", ("RollingUpdate", "OnDelete")),
    "DaemonSet": ("updateStrategy", ("RollingUpdate", "OnDelete")),
}
_PERCENTAGE = re.compile(r"(100|[0-9]{1,2})%")
_CRON_FIELD = re.compile(r"[0-9A-Za-z*?/,#-]+")
_CRON_MACROS = ("@hourly", "@daily", "@midnight", "@weekly", "@monthly", "@yearly", "@annually")
_SCALED = ("Deployment", "StatefulSet", "ReplicaSet", "ReplicationController")
_NOT_SCALED = ("Service", "DaemonSet", "Pod", "Job", "RayService", "RayCluster")
_METRIC_FIELDS = {
    "Resource": "resource",
    "Pods": "pods",
    "Object": "object",
    "External": "external",
    "ContainerResource": "containerResource",
}


def check_workload(tree: dict[str, Any]) -> Iterator[Problem]:
    """A Deployment, StatefulSet or DaemonSet."""
    spec, kind = mapping(tree, "spec"), text(tree, "kind")
    claims = frozenset(text(claim, "metadata", "name") for _, claim in entries(spec, "volumeClaimTemplates"))
    labels = mapping(spec, "template", "metadata", "labels")
    for key, value in mapping(spec, "selector", "matchLabels").items():
        if labels.get(key) != value:
            reason = f"the pods are not labelled {key}={value}; the API server refuses this"
            yield Problem(("spec", "selector", "matchLabels", key), reason, nearest(value, map(str, labels.values())))
    if "selector" in spec and not any(mapping(spec, "selector").values()):
        yield Problem(("spec", "selector"), "an empty selector; the API server refuses this")
    yield from check_expressions(spec.get("selector"), ("spec", "selector"))
    replicas = whole(spec, "replicas")
    if replicas is not None and replicas < 0:
        yield Problem(("spec", "replicas"), f"{replicas} is less than 0")
    yield from _strategy(spec, *_STRATEGIES[kind])
    policy = text(spec, "template", "spec", "restartPolicy")
    if policy not in ("", "Always"):
        yield Problem(("spec", "template", "spec", "restartPolicy"), f"the pods of a {kind} have Always, not {policy}")
    yield from check_pod(spec.get("template"), ("spec", "template"), claims)


def _strategy(spec: dict[str, Any], name: str, kinds: tuple[str, ...]) -> Iterator[Problem]:
    strategy, place = mapping(spec, name), ("spec", name)
    kind = strategy.get("type")
    if kind is not None and kind not in kinds:
        yield Problem((*place, "type"), f"{kind!r} is none of {', '.join(kinds)}", nearest(kind, kinds))
    rolling = mapping(strategy, "rollingUpdate")
    if rolling and kind not in (None, "RollingUpdate"):
        yield Problem((*place, "rollingUpdate"), f"the type {kind} has none")
    for field in ("maxSurge", "maxUnavailable"):
        yield from check_share(rolling.get(field), (*place, "rollingUpdate", field))


def check_share(value: object, path: Path) -> Iterator[Problem]:
    """A number of pods or a percentage of them."""
    if isinstance(value, str) and not _PERCENTAGE.fullmatch(value):
        yield Problem(path, f"{value!r} is neither a number nor a percentage")
    elif isinstance(value, int) and value < 0:
        yield Problem(path, f"{value} is less than 0")


def check_pod_object(tree: dict[str, Any]) -> Iterator[Problem]:
    """A Pod."""
    yield from check_pod(tree, ())


def check_batch_job(tree: dict[str, Any]) -> Iterator[Problem]:
    """A Job."""
    yield from _job(mapping(tree, "spec"), ("spec",))


def check_cron_job(tree: dict[str, Any]) -> Iterator[Problem]:
    """A CronJob."""
    yield from check_schedule(text(tree, "spec", "schedule"), ("spec", "schedule"))
    yield from _job(mapping(tree, "spec", "jobTemplate", "spec"), ("spec", "jobTemplate", "spec"))


def check_schedule(stated: str, path: Path) -> Iterator[Problem]:
    """Five fields, or one of the words for them."""
    if not stated or stated in _CRON_MACROS or stated.startswith("@every "):
        return
    if stated.startswith("@"):
        yield Problem(path, f"{stated!r} is none of {', '.join(_CRON_MACROS)}", nearest(stated, _CRON_MACROS))
        return
    fields = [part for part in stated.split() if not part.startswith(("TZ=", "CRON_TZ="))]
    if len(fields) != 5 or not all(_CRON_FIELD.fullmatch(field) for field in fields):
        yield Problem(path, f"{stated!r} is no schedule of five fields, like '*/5 * * * *'")


def _job(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    place = (*path, "template", "spec", "restartPolicy")
    policy = text(spec, "template", "spec", "restartPolicy")
    if policy not in ("OnFailure", "Never") and mapping(spec, "template", "spec"):
        yield Problem(place, f"the pods of a job need OnFailure or Never, not {policy or 'nothing, which is Always'}")
    for name in ("backoffLimit", "completions", "parallelism", "ttlSecondsAfterFinished"):
        value = whole(spec, name)
        if value is not None and value < 0:
            yield Problem((*path, name), f"{value} is less than 0")
    yield from check_pod(spec.get("template"), (*path, "template"))


def check_autoscaler(tree: dict[str, Any]) -> Iterator[Problem]:
    """A HorizontalPodAutoscaler."""
    spec, place = mapping(tree, "spec"), ("spec",)
    least, most = whole(spec, "minReplicas"), whole(spec, "maxReplicas")
    if most is not None and most < 1:
        yield Problem((*place, "maxReplicas"), f"{most} is less than 1")
    elif least is not None and most is not None and least > most:
        yield Problem((*place, "minReplicas"), f"minReplicas {least} is more than maxReplicas {most}")
    if least is not None and least < 0:
        yield Problem((*place, "minReplicas"), f"{least} is less than 0")
    for index, metric in entries(spec, "metrics"):
        here = (*place, "metrics", index)
        name = _METRIC_FIELDS.get(text(metric, "type"))
        if name is None:
            continue  # the schema has told
        if not mapping(metric, name):
            yield Problem((*here, name), f"a metric of type {metric['type']} needs {name!r}")
        target, inside = mapping(metric, name, "target"), (*here, name, "target")
        kind = text(target, "type")
        wanted = {"Utilization": "averageUtilization", "AverageValue": "averageValue", "Value": "value"}.get(kind)
        if wanted is not None and wanted not in target:
            yield Problem((*inside, wanted), f"a target of type {kind} needs {wanted!r}")
        share = whole(target, "averageUtilization")
        if share is not None and share < 1:
            yield Problem((*inside, "averageUtilization"), f"{share} is less than 1")
    scaled = text(spec, "scaleTargetRef", "kind")
    if scaled in _NOT_SCALED or (scaled not in _SCALED and nearest(scaled, _SCALED)):
        yield Problem((*place, "scaleTargetRef", "kind"), f"a {scaled} has no replicas", nearest(scaled, _SCALED))
