"""Rules for one Kubernetes object by its kind: names, secrets, budgets, claims; other files have the larger kinds.

`checker.py` calls `check_object` after the schema. Rules between objects are in `reference_rules.py`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from penstock.cluster.validate.cluster_rules import Surroundings, check_cluster
from penstock.cluster.validate.environment_rules import keys_in_plain_text
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.job_rules import check_job
from penstock.cluster.validate.loose import at, entries, mapping, text
from penstock.cluster.validate.network_rules import check_ingress, check_policy, check_service_object
from penstock.cluster.validate.quantities import quantity
from penstock.cluster.validate.scheduling_rules import check_expressions
from penstock.cluster.validate.service_rules import SERVE_KEY, check_service
from penstock.cluster.validate.workload_rules import (
    check_autoscaler,
    check_batch_job,
    check_cron_job,
    check_pod_object,
    check_share,
    check_workload,
)

# Services get the name and a suffix, a RayService's and RayJob's cluster six characters more, of 63 in all.
NAME_LIMITS = {"RayCluster": 53, "RayService": 47, "RayJob": 47}
ACCESS_MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
SECRET_TYPES = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}
_ENTRY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_KINDS = ("RayCluster", "RayService", "RayJob", "Service")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def check_object(
    tree: dict[str, Any], stated: dict[str, Any], serve_config: object = None, several: bool = False
) -> Iterator[Problem]:
    """Everything that the rules of its kind find. `tree` has its defaults, `stated` is as written."""
    kind = text(tree, "kind")
    yield from _metadata(tree, kind)
    if kind != "Secret":
        # A Serve configuration is one text here; its own rules look into it.
        yield from (one for one in keys_in_plain_text(stated) if one.path != ("spec", SERVE_KEY))
    if kind == "RayService":
        yield from check_service(tree, stated, serve_config, several)
    elif kind == "RayJob":
        yield from check_job(tree, stated)
    elif kind == "RayCluster":
        around = Surroundings(kind, mapping(tree, "metadata", "annotations"), mapping(stated, "spec"))
        yield from check_cluster(mapping(tree, "spec"), ("spec",), around)
    elif kind in _BY_KIND:
        yield from _BY_KIND[kind](tree)


def _metadata(tree: dict[str, Any], kind: str) -> Iterator[Problem]:
    name = text(tree, "metadata", "name")
    place: Path = ("metadata", "name")
    if not name and not text(tree, "metadata", "generateName"):
        yield Problem(place, "the object has no name")
    elif name and kind in _LABEL_KINDS and not _DNS_1035.fullmatch(name):
        yield Problem(place, f"{name!r}: lower-case letters, digits and dashes; it starts with a letter")
    elif name and not _DNS_1123.fullmatch(name) and not kind.startswith(("Role", "ClusterRole")):
        yield Problem(place, f"{name!r}: lower-case letters, digits, dashes and dots only")
    limit = NAME_LIMITS.get(kind, 63 if kind in _LABEL_KINDS else 253)
    if len(name) > limit:
        yield Problem(place, f"{len(name)} characters; the name of a {kind} has at most {limit}")
    namespace = text(tree, "metadata", "namespace")
    if namespace and not _DNS_1035.fullmatch(namespace):
        yield Problem(("metadata", "namespace"), f"{namespace!r} is no name of a namespace")
    for key, value in mapping(tree, "metadata", "labels").items():
        if not _QUALIFIED.fullmatch(key) or not _LABEL_VALUE.fullmatch(str(value)):
            yield Problem(("metadata", "labels", key), f"{key}={value} is no label")
    for key in mapping(tree, "metadata", "annotations"):
        if not _QUALIFIED.fullmatch(key):
            yield Problem(("metadata", "annotations", key), f"{key!r} is no name of an annotation")


def _config_map(tree: dict[str, Any]) -> Iterator[Problem]:
    for group in ("data", "binaryData"):
        for name in mapping(tree, group):
            if not _ENTRY.fullmatch(name):
                yield Problem((group, name), f"{name!r}: a key has letters, digits, '-', '_' and '.' only")
            if group == "binaryData" and name in mapping(tree, "data"):
                yield Problem((group, name), f"{name!r} stands under data too")


def _secret(tree: dict[str, Any]) -> Iterator[Problem]:
    for name, value in mapping(tree, "data").items():
        try:
            base64.b64decode("".join(str(value).split()), validate=True)
        except (binascii.Error, ValueError):
            yield Problem(("data", name), "not base64; plain text belongs under stringData")
    keys = {*mapping(tree, "data"), *mapping(tree, "stringData")}
    for needed in SECRET_TYPES.get(text(tree, "type"), ()):
        if needed not in keys:
            yield Problem(("data", needed), f"a secret of type {tree['type']} needs {needed!r}", nearest(needed, keys))
    for name in sorted(keys):
        if not _ENTRY.fullmatch(name):
            yield Problem(("data", name), f"{name!r}: a key has letters, digits, '-', '_' and '.' only")
    for name in mapping(tree, "stringData"):
        yield warning(("stringData", name), "a secret in plain text in a file; create it with `kubectl create secret`")


def _budget(tree: dict[str, Any]) -> Iterator[Problem]:
    spec = mapping(tree, "spec")
    stated = [name for name in ("minAvailable", "maxUnavailable") if name in spec]
    if len(stated) != 1:
        yield Problem(("spec",), f"exactly one of minAvailable and maxUnavailable; here are {len(stated)}")
    for name in stated:
        yield from check_share(spec[name], ("spec", name))
        if (name, spec[name]) in (("maxUnavailable", 0), ("maxUnavailable", "0%"), ("minAvailable", "100%")):
            yield warning(("spec", name), "no pod may ever be moved, so no node can be drained")
    yield from check_expressions(spec.get("selector"), ("spec", "selector"))
    if not mapping(spec, "selector"):
        yield warning(("spec", "selector"), "without a selector it protects nothing")


def _claim(tree: dict[str, Any]) -> Iterator[Problem]:
    modes = at(tree, "spec", "accessModes")
    place: Path = ("spec", "accessModes")
    if not modes:
        yield Problem(place, f"one or more of {', '.join(ACCESS_MODES)} must be there")
    for index, mode in enumerate(modes if isinstance(modes, list) else []):
        if mode not in ACCESS_MODES:
            reason = f"{mode!r} is none of {', '.join(ACCESS_MODES)}"
            yield Problem((*place, index), reason, nearest(mode, ACCESS_MODES))
    place = ("spec", "resources", "requests", "storage")
    size = at(tree, *place)
    if size is None:
        yield Problem(place, "there is no size")
    elif (quantity(size) or 1) <= 0:
        yield Problem(place, f"{size} is not more than 0")


def _stateful_set(tree: dict[str, Any]) -> Iterator[Problem]:
    yield from check_workload(tree)
    for index, claim in entries(tree, "spec", "volumeClaimTemplates"):
        for problem in _claim(claim):
            yield replace(problem, path=("spec", "volumeClaimTemplates", index, *problem.path))


_BY_KIND: dict[str, Callable[[dict[str, Any]], Iterator[Problem]]] = {
    "Service": check_service_object,
    "ConfigMap": _config_map,
    "Secret": _secret,
    "PodDisruptionBudget": _budget,
    "NetworkPolicy": check_policy,
    "Ingress": check_ingress,
    "PersistentVolumeClaim": _claim,
    "Deployment": check_workload,
    "StatefulSet": _stateful_set,
    "DaemonSet": check_workload,
    "Job": check_batch_job,
    "CronJob": check_cron_job,
    "HorizontalPodAutoscaler": check_autoscaler,
    "Pod": check_pod_object,
}
