"""Rules for `RayJob`: what KubeRay's operator refuses. Used by `object_rules.py`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.cluster_rules import Surroundings, check_cluster
from penstock.cluster.validate.demands import custom_resources
from penstock.cluster.validate.findings import Path, Problem, warning
from penstock.cluster.validate.loose import at, entries, mapping, switch, text, whole
from penstock.cluster.validate.pod_rules import check_pod
from penstock.cluster.validate.runtime_env_rules import check_runtime_env
from penstock.cluster.validate.yaml_tree import read_documents

SELECTOR_KEY = "ray.io/cluster"
_PLACE = ("spec",)


def check_job(tree: dict[str, Any], stated: dict[str, Any]) -> Iterator[Problem]:
    """Everything wrong with a RayJob. `tree` has its defaults, `stated` has not."""
    spec = mapping(tree, "spec")
    selector = mapping(spec, "clusterSelector")
    if not selector and "rayClusterSpec" not in spec:
        yield Problem((*_PLACE, "rayClusterSpec"), "either rayClusterSpec or clusterSelector must be there")
    if selector and not text(selector, SELECTOR_KEY):
        yield Problem((*_PLACE, "clusterSelector"), f"the cluster is named under the key {SELECTOR_KEY!r}")
    if not text(spec, "entrypoint") and text(spec, "submissionMode") != "InteractiveMode":
        yield Problem((*_PLACE, "entrypoint"), "there is no command to run")
    yield from _numbers(spec)
    yield from _modes(spec, bool(selector))
    yield from _deletion(spec, bool(selector))
    if text(spec, "runtimeEnvYAML"):
        documents, misread = read_documents(text(spec, "runtimeEnvYAML"))
        for one in misread[:1]:
            yield Problem((*_PLACE, "runtimeEnvYAML"), one.problem.reason)
        for document in documents[:1]:
            yield from check_runtime_env(document.plain(), (*_PLACE, "runtimeEnvYAML"), remote=False)
    yield from _submitter(spec)
    if "rayClusterSpec" in spec:
        annotations = mapping(tree, "metadata", "annotations")
        around = Surroundings("RayJob", annotations, mapping(stated, "spec", "rayClusterSpec"))
        yield from check_cluster(mapping(spec, "rayClusterSpec"), (*_PLACE, "rayClusterSpec"), around)


def _submitter(spec: dict[str, Any]) -> Iterator[Problem]:
    resources = text(spec, "entrypointResources")
    if resources and custom_resources(resources) is None:
        yield Problem((*_PLACE, "entrypointResources"), f"{resources!r} is no JSON object of numbers")
    if "submitterPodTemplate" not in spec:
        return
    place = (*_PLACE, "submitterPodTemplate")
    yield from check_pod(spec.get("submitterPodTemplate"), place)
    policy = text(spec, "submitterPodTemplate", "spec", "restartPolicy")
    if policy not in ("OnFailure", "Never"):
        reason = f"the submitter is a job; its pod needs OnFailure or Never, not {policy or 'nothing, which is Always'}"
        yield Problem((*place, "spec", "restartPolicy"), reason)


def _numbers(spec: dict[str, Any]) -> Iterator[Problem]:
    for name, least in (
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
        ("backoffLimit", 0),
        ("ttlSecondsAfterFinished", 0),
    ):
        value = whole(spec, name)
        if value is not None and value < least:
            yield Problem((*_PLACE, name), f"{value} is less than {least}")


def _modes(spec: dict[str, Any], selects: bool) -> Iterator[Problem]:
    mode = text(spec, "submissionMode")
    if switch(spec, "suspend"):
        if not switch(spec, "shutdownAfterJobFinishes"):
            yield Problem((*_PLACE, "suspend"), "only a job with shutdownAfterJobFinishes: true can be suspended")
        if selects:
            yield Problem((*_PLACE, "suspend"), "a job that selects its cluster cannot be suspended")
    if mode == "InteractiveMode" and (whole(spec, "backoffLimit") or 0) > 0:
        yield Problem((*_PLACE, "backoffLimit"), "InteractiveMode cannot retry")
    if mode == "SidecarMode":
        if selects:
            yield Problem((*_PLACE, "clusterSelector"), "SidecarMode cannot select a cluster")
        for name in ("submitterPodTemplate", "submitterConfig"):
            if name in spec:
                yield Problem((*_PLACE, name), "SidecarMode has no submitter of its own")
        policy = text(spec, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
        if policy not in ("", "Never"):
            where = (*_PLACE, "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicy")
            yield Problem(where, f"SidecarMode needs restartPolicy Never, not {policy}")


def _deletion(spec: dict[str, Any], selects: bool) -> Iterator[Problem]:
    shutdown = switch(spec, "shutdownAfterJobFinishes")
    if (whole(spec, "ttlSecondsAfterFinished") or 0) > 0 and not shutdown:
        yield Problem((*_PLACE, "ttlSecondsAfterFinished"), "without shutdownAfterJobFinishes: true nothing is deleted")
    elif "rayClusterSpec" in spec and not shutdown and "deletionStrategy" not in spec:
        yield warning((*_PLACE, "shutdownAfterJobFinishes"), "the cluster stays when the job has ended")
    if "deletionStrategy" not in spec:
        return
    strategy, place = mapping(spec, "deletionStrategy"), (*_PLACE, "deletionStrategy")
    rules = entries(strategy, "deletionRules")
    legacy = [name for name in ("onSuccess", "onFailure") if name in strategy]
    if rules and (shutdown or legacy):
        other = "shutdownAfterJobFinishes" if shutdown else "onSuccess and onFailure"
        yield Problem((*place, "deletionRules"), f"deletionRules and {other} exclude each other")
    elif not rules and len(legacy) != 2:
        yield Problem(place, "either deletionRules, or both onSuccess and onFailure")
    policies: list[tuple[Path, str]] = [((*place, name, "policy"), text(strategy, name, "policy")) for name in legacy]
    policies += [((*place, "deletionRules", i, "policy"), text(rule, "policy")) for i, rule in rules]
    for where, policy in policies:
        if selects and policy in ("DeleteCluster", "DeleteWorkers"):
            yield Problem(where, f"{policy} is not for a cluster that was selected")
        if policy == "DeleteWorkers" and at(spec, "rayClusterSpec", "enableInTreeAutoscaling") is True:
            yield Problem(where, "DeleteWorkers does not go with the autoscaler")
        if policy == "DeleteNone" and shutdown:
            yield Problem(where, "DeleteNone contradicts shutdownAfterJobFinishes: true")
