"""Rules for one Kubernetes object by its kind: names, services, budgets, policies, workloads, and KubeRay's kinds.

`checker.py` calls `check_object` after the schema. Rules between objects are in `reference_rules.py`.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable, Iterator
from typing import Any

from penstock.cluster.validate.cluster_rules import Surroundings, check_cluster
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.job_rules import check_job
from penstock.cluster.validate.loose import entries, mapping, text, whole
from penstock.cluster.validate.pod_rules import check_pod
from penstock.cluster.validate.service_rules import check_service

# Services get the name and a suffix, a RayService's and RayJob's cluster six characters more, of 63 in all.
NAME_LIMITS = {"RayCluster": 53, "RayService": 47, "RayJob": 47}
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
    elif name and not _DNS_1123.fullmatch(name) and kind not in ("Role", "RoleBinding", "ClusterRole"):
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


def _service(tree: dict[str, Any]) -> Iterator[Problem]:
    spec = mapping(tree, "spec")
    ports = entries(spec, "ports")
    names: set[str] = set()
    if not ports and text(spec, "type") != "ExternalName" and text(spec, "clusterIP") != "None":
        yield Problem(("spec", "ports"), "there is no port")
    for index, port in ports:
        place = ("spec", "ports", index)
        number, name, node_port = whole(port, "port"), text(port, "name"), whole(port, "nodePort")
        if number is not None and not 1 <= number <= 65535:
            yield Problem((*place, "port"), f"{number} is outside 1 to 65535")
        if len(ports) > 1 and not name:
            yield Problem((*place, "name"), "each of several ports needs a name")
        if name and name in names:
            yield Problem((*place, "name"), f"two ports are called {name!r}")
        names.add(name)
        if node_port is not None and text(spec, "type") not in ("NodePort", "LoadBalancer"):
            yield Problem((*place, "nodePort"), "only a service of type NodePort or LoadBalancer has one")
        elif node_port is not None and not 30000 <= node_port <= 32767:
            yield warning((*place, "nodePort"), f"{node_port} is outside the usual 30000 to 32767")
    if not mapping(spec, "selector") and text(spec, "type") != "ExternalName":
        yield warning(("spec", "selector"), "without a selector the service leads nowhere")


def _secret(tree: dict[str, Any]) -> Iterator[Problem]:
    for name, value in mapping(tree, "data").items():
        try:
            base64.b64decode(str(value), validate=True)
        except (binascii.Error, ValueError):
            yield Problem(("data", name), "not base64; plain text belongs under stringData")
    for name in mapping(tree, "stringData"):
        yield warning(("stringData", name), "a secret in plain text in a file; create it with `kubectl create secret`")


def _budget(tree: dict[str, Any]) -> Iterator[Problem]:
    spec = mapping(tree, "spec")
    stated = [name for name in ("minAvailable", "maxUnavailable") if name in spec]
    if len(stated) != 1:
        yield Problem(("spec",), f"exactly one of minAvailable and maxUnavailable; here are {len(stated)}")
    for name in stated:
        value = spec[name]
        if isinstance(value, str) and not re.fullmatch(r"(100|[0-9]{1,2})%", value):
            yield Problem(("spec", name), f"{value!r} is neither a number nor a percentage")
        elif isinstance(value, int) and value < 0:
            yield Problem(("spec", name), f"{value} is less than 0")
    if not mapping(spec, "selector"):
        yield warning(("spec", "selector"), "without a selector it protects nothing")


def _policy(tree: dict[str, Any]) -> Iterator[Problem]:
    spec = mapping(tree, "spec")
    kinds = spec.get("policyTypes")
    for name in ("ingress", "egress"):
        if name in spec and isinstance(kinds, list) and name.title() not in kinds:
            yield Problem(("spec", name), f"policyTypes does not hold {name.title()}, so these rules do nothing")
        for index, rule in entries(spec, name):
            for number, peer in entries(rule, "from" if name == "ingress" else "to"):
                cidr = text(peer, "ipBlock", "cidr")
                place = ("spec", name, index, "from" if name == "ingress" else "to", number)
                if "ipBlock" in peer and not _is_network(cidr):
                    yield Problem((*place, "ipBlock", "cidr"), f"{cidr!r} is no network like 10.0.0.0/8")
                if "ipBlock" in peer and len(peer) > 1:
                    yield Problem(place, "ipBlock and selectors exclude each other")
    rules = entries(spec, "egress")
    if isinstance(kinds, list) and "Egress" in kinds and not any(_allows_names(rule) for _, rule in rules):
        yield warning(("spec", "egress"), "no rule lets port 53 out; names cannot be looked up")


def _allows_names(rule: dict[str, Any]) -> bool:
    ports = entries(rule, "ports")
    if ports:
        return any(one.get("port") in (53, "dns", None) for _, one in ports)
    peers = entries(rule, "to")  # the name server is in another namespace
    return not peers or any("namespaceSelector" in peer or "ipBlock" in peer for _, peer in peers)


def _is_network(cidr: str) -> bool:
    try:
        ipaddress.ip_network(cidr)
    except ValueError:
        return False
    return "/" in cidr


def _workload(tree: dict[str, Any]) -> Iterator[Problem]:
    spec = mapping(tree, "spec")
    claims = frozenset(text(claim, "metadata", "name") for _, claim in entries(spec, "volumeClaimTemplates"))
    labels = mapping(spec, "template", "metadata", "labels")
    for key, value in mapping(spec, "selector", "matchLabels").items():
        if labels.get(key) != value:
            reason = f"the pods are not labelled {key}={value}; the API server refuses this"
            yield Problem(("spec", "selector", "matchLabels", key), reason, nearest(value, map(str, labels.values())))
    replicas = whole(spec, "replicas")
    if replicas is not None and replicas < 0:
        yield Problem(("spec", "replicas"), f"{replicas} is less than 0")
    yield from check_pod(spec.get("template"), ("spec", "template"), claims)


def _pod(tree: dict[str, Any]) -> Iterator[Problem]:
    yield from check_pod(tree, ())


_BY_KIND: dict[str, Callable[[dict[str, Any]], Iterator[Problem]]] = {
    "Service": _service,
    "Secret": _secret,
    "PodDisruptionBudget": _budget,
    "NetworkPolicy": _policy,
    "Deployment": _workload,
    "StatefulSet": _workload,
    "Pod": _pod,
}
