"""Which kinds there are, in which API versions: what is misspelt, what is gone, what only another API knows.

A name that Kubernetes or KubeRay knows but for which nobody gave a schema is told as unchecked; kinds of other APIs
(Knative has a `Service` too) are left to those. Used by `checker.py`. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from penstock.cluster.validate.findings import Problem, nearest, warning
from penstock.cluster.validate.loose import text

FROZEN = "ray.io/v1alpha1"
# Kinds by API version; those that have a schema are added by the caller.
NAMES: dict[str, str] = {
    "v1": "Pod PodTemplate Service Endpoints Secret ConfigMap Namespace Node Event ServiceAccount List LimitRange "
    "ReplicationController PersistentVolume PersistentVolumeClaim ResourceQuota",
    "apps/v1": "Deployment StatefulSet DaemonSet ReplicaSet ControllerRevision",
    "batch/v1": "Job CronJob",
    "autoscaling/v1": "HorizontalPodAutoscaler",
    "autoscaling/v2": "HorizontalPodAutoscaler",
    "policy/v1": "PodDisruptionBudget",
    "networking.k8s.io/v1": "NetworkPolicy Ingress IngressClass",
    "rbac.authorization.k8s.io/v1": "Role RoleBinding ClusterRole ClusterRoleBinding",
    "storage.k8s.io/v1": "StorageClass VolumeAttachment CSIDriver CSINode CSIStorageCapacity",
    "scheduling.k8s.io/v1": "PriorityClass",
    "coordination.k8s.io/v1": "Lease",
    "discovery.k8s.io/v1": "EndpointSlice",
    "node.k8s.io/v1": "RuntimeClass",
    "apiextensions.k8s.io/v1": "CustomResourceDefinition",
    "apiregistration.k8s.io/v1": "APIService",
    "admissionregistration.k8s.io/v1": "ValidatingWebhookConfiguration MutatingWebhookConfiguration "
    "ValidatingAdmissionPolicy ValidatingAdmissionPolicyBinding",
    "certificates.k8s.io/v1": "CertificateSigningRequest",
    "resource.k8s.io/v1": "ResourceClaim ResourceClaimTemplate DeviceClass ResourceSlice",
    "ray.io/v1": "RayCluster RayService RayJob RayCronJob",
}
GONE_GROUPS = ("extensions",)
MISSPELT = 0.85  # how alike a group's name is to the one that was meant


def check_kind(tree: Mapping[str, Any], with_schema: Mapping[str, list[str]]) -> Iterator[Problem]:
    """What is wrong with `apiVersion` and `kind`. `with_schema`: API versions of every kind that has a schema."""
    api_version, kind = text(tree, "apiVersion"), text(tree, "kind")
    for name in ("apiVersion", "kind"):
        if not isinstance(tree.get(name), str) or not tree[name]:
            hint = nearest(name, [str(other) for other in tree if other not in ("apiVersion", "kind")])
            reason = f"required key {name!r} is missing or no text" + (f"; {hint!r} is not it" if hint else "")
            yield Problem((name,), reason)
    if not kind or not api_version:
        return
    known = known_kinds(with_schema)
    groups = {_group(version) for versions in known.values() for version in versions} | set(GONE_GROUPS)
    versions = known.get(kind, [])
    if api_version == FROZEN:
        yield warning(("apiVersion",), f"{FROZEN} is frozen and will go", "ray.io/v1")
    elif versions and api_version not in versions:
        if _meant_group(api_version, groups) is not None or versions == ["ray.io/v1"]:
            yield Problem(("apiVersion",), f"a {kind} has no version {api_version!r}", versions[0])
        else:
            yield _unchecked(api_version, kind)
    elif not versions:
        group = _meant_group(api_version, groups)
        same = [name for name, its in known.items() if group in [_group(version) for version in its]]
        hint = nearest(kind, same)
        if hint:
            yield Problem(("kind",), f"unknown kind {kind!r}", hint)
        else:
            yield _unchecked(api_version, kind)
    elif api_version not in with_schema.get(kind, []):
        yield _unchecked(api_version, kind)


def known_kinds(with_schema: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Every kind that is known by its name, with its API versions."""
    found = {kind: list(versions) for kind, versions in with_schema.items()}
    for api_version, names in NAMES.items():
        for kind in names.split():
            if api_version not in found.setdefault(kind, []):
                found[kind].append(api_version)
    return found


def is_known(tree: Mapping[str, Any], with_schema: Mapping[str, list[str]]) -> bool:
    """Whether rules of Kubernetes' and KubeRay's own kinds apply: not to another API's kind of the same name."""
    api_version, kind = text(tree, "apiVersion"), text(tree, "kind")
    known = known_kinds(with_schema)
    groups = {_group(version) for versions in known.values() for version in versions}
    ours = not api_version or kind.startswith("Ray") or _meant_group(api_version, groups) is not None
    return kind in known and ours


def _group(api_version: str) -> str:
    return api_version.partition("/")[0] if "/" in api_version else ""


def _meant_group(api_version: str, groups: set[str]) -> str | None:
    """The group itself, or the known one that it misspells."""
    group = _group(api_version)
    if group in groups:
        return group
    if beginning := [one for one in groups if group and one.startswith(f"{group}.")]:
        return beginning[0]
    return next(iter(difflib.get_close_matches(group, groups - {""}, n=1, cutoff=MISSPELT)), None)


def _unchecked(api_version: str, kind: str) -> Problem:
    reason = f"no schema for {api_version} {kind} here: checked by its name only; give its definition with --crds"
    return warning(("kind",), reason)
