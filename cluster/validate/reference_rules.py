"""Rules between the objects of all given files: names that are referred to, selectors that should select, twins.

What is created by other means (a secret made with kubectl, say) is declared in the annotation
`penstock/created-elsewhere: "secret/a, configmap/b"`; anything else that is missing is told. Used by `checker.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import at, entries, mapping, switch, text, walk, whole

ELSEWHERE = "penstock/created-elsewhere"
AUTH_SECRET_KEY = ("authOptions", "secretName")
_KEYED = {"secretKeyRef": ("secret", "name"), "configMapKeyRef": ("configmap", "name")}
_NAMED = {
    "secretRef": ("secret", "name"),
    "configMapRef": ("configmap", "name"),
    "persistentVolumeClaim": ("persistentvolumeclaim", "claimName"),
    **_KEYED,
}
GROUP_LABEL, NODE_LABEL = "ray.io/group", "ray.io/node-type"
SET_BY_OPERATOR = (
    (NODE_LABEL, "redis-cleanup"),
    ("app.kubernetes.io/name", "kuberay"),
    ("app.kubernetes.io/created-by", "kuberay-operator"),
)
# Beginnings of labels that pods get when they are made.
MADE_LATER = (
    "ray.io/",
    "kubernetes.io/",
    "statefulset.kubernetes.io/",
    "apps.kubernetes.io/",
    "batch.kubernetes.io/",
    "job-name",
    "controller-uid",
    "pod-template-hash",
)
MISSPELT = 0.8  # how alike a name is to the one that was meant; below it, it is another's


@dataclass(frozen=True, slots=True)
class KubernetesObject:
    """One object of the given files; `number` says which, for the caller."""

    number: int
    tree: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """As written."""
        return text(self.tree, "kind")

    @property
    def name(self) -> str:
        """`metadata.name`."""
        return text(self.tree, "metadata", "name")

    @property
    def namespace(self) -> str:
        """`metadata.namespace`; two objects that leave it out are in the same one."""
        return text(self.tree, "metadata", "namespace")


@dataclass(frozen=True, slots=True)
class Reference:
    """One object names another."""

    path: Path
    kind: str  # lower case
    name: str
    key: str = ""
    optional: bool = False


def check_references(objects: list[KubernetesObject]) -> Iterator[tuple[int, Problem]]:
    """Problems with the number of the object that they are in."""
    yield from _twins(objects)
    declared = {entry for one in objects for entry in _declared(one)}
    for one in objects:
        present = {(other.kind.lower(), other.name): other for other in objects if other.namespace == one.namespace}
        for reference in _references(one):
            problem = _resolve(reference, present, declared)
            if problem is not None:
                yield one.number, problem
        for problem in _peers(one, objects):
            yield one.number, problem
        if one.kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
            for problem in _selects(one, objects):
                yield one.number, problem
        for problem in _backends(one, present):
            yield one.number, problem
        for problem in _redis(one, objects, declared):
            yield one.number, problem


def _twins(objects: list[KubernetesObject]) -> Iterator[tuple[int, Problem]]:
    seen: set[tuple[str, str, str, str]] = set()
    for one in objects:
        identity = (text(one.tree, "apiVersion").split("/")[0], one.kind, one.namespace, one.name)
        if one.name and identity in seen:
            yield one.number, Problem(("metadata", "name"), f"a {one.kind} called {one.name!r} stands here already")
        seen.add(identity)


def _declared(one: KubernetesObject) -> set[str]:
    stated = text(one.tree, "metadata", "annotations", ELSEWHERE)
    return {entry.strip().lower() for entry in stated.split(",") if entry.strip()}


def _references(one: KubernetesObject) -> Iterator[Reference]:
    for path, value in walk(dict(one.tree)):
        last = path[-1] if path else None
        if last in _NAMED and isinstance(value, dict):
            kind, field = _NAMED[str(last)]
            key = text(value, "key") if last in _KEYED else ""
            optional = value.get("optional") is True
            if name := text(value, field):
                yield Reference((*path, field), kind, name, key, optional)
        elif last == "secret" and isinstance(value, dict) and text(value, "secretName"):
            yield Reference((*path, "secretName"), "secret", text(value, "secretName"))
        elif last == "configMap" and isinstance(value, dict) and text(value, "name"):
            yield Reference((*path, "name"), "configmap", text(value, "name"))
        elif path[-2:] == AUTH_SECRET_KEY and isinstance(value, str):
            yield Reference(path, "secret", value)
        elif last == "serviceAccountName" and isinstance(value, str) and value != "default":
            yield Reference(path, "serviceaccount", value)
        elif path[-2:] == ("scaleTargetRef", "name") and isinstance(value, str):
            yield Reference(path, text(one.tree, *path[:-1], "kind").lower(), value)
        elif isinstance(value, str) and (path[-2:] == ("service", "name") or path == ("spec", "serviceName")):
            yield Reference(path, "service", value)
        elif last == "imagePullSecrets":
            yield from (Reference((*path, i, "name"), "secret", text(e, "name")) for i, e in entries(value) if e)


def _resolve(
    reference: Reference, present: Mapping[tuple[str, str], KubernetesObject], declared: set[str]
) -> Problem | None:
    found = present.get((reference.kind, reference.name))
    if found is not None:
        keys = {*mapping(found.tree, "data"), *mapping(found.tree, "stringData"), *mapping(found.tree, "binaryData")}
        if reference.key and reference.key not in keys and not reference.optional:
            place = (*reference.path[:-1], "key")
            return Problem(
                place, f"{reference.kind} {reference.name} has no key {reference.key!r}", nearest(reference.key, keys)
            )
        return None
    if reference.optional or f"{reference.kind}/{reference.name}".lower() in declared:
        return None
    names = {name for kind, name in present if kind == reference.kind}
    names |= {entry.partition("/")[2] for entry in declared if entry.startswith(f"{reference.kind}/")}
    hint = nearest(reference.name, names, MISSPELT)
    reason = f"no {reference.kind} {reference.name!r} in the given files"
    if hint:
        return Problem(reference.path, reason, hint)
    return warning(reference.path, f"{reason}; if it is made by other means, say so in the annotation {ELSEWHERE}")


def _pod_templates(objects: list[KubernetesObject]) -> Iterator[tuple[KubernetesObject, dict[str, Any]]]:
    """Every pod template with the object that it stands in."""
    yield from ((one, pod) for one, pod, _ in _counted_templates(objects))


def _counted_templates(objects: list[KubernetesObject]) -> Iterator[tuple[KubernetesObject, dict[str, Any], int]]:
    """The same with how many pods of it there are at most."""
    for one in objects:
        for path, value in walk(dict(one.tree)):
            if path and path[-1] == "template" and isinstance(value, dict) and "spec" in value:
                above = at(one.tree, *path[:-1])
                scaling = switch(at(one.tree, *path[:-3]), "enableInTreeAutoscaling")
                names = ("replicas", "minReplicas", *(["maxReplicas"] if scaling else []))
                stated = [whole(above, name) for name in names]
                count = max((count for count in stated if count is not None), default=1)
                yield one, _labelled(value, above, str(path[-2]) if len(path) > 1 else ""), count
            elif not path and one.kind == "Pod":
                yield one, dict(one.tree), 1


def _selects(one: KubernetesObject, objects: list[KubernetesObject]) -> Iterator[Problem]:
    place: Path = ("spec", "selector") if one.kind == "Service" else ("spec", "selector", "matchLabels")
    place = ("spec", "podSelector", "matchLabels") if one.kind == "NetworkPolicy" else place
    wanted = _wanted(mapping(one.tree, *place))
    templates = [found for found in _counted_templates(objects) if found[0].namespace == one.namespace]
    if not wanted or not templates:
        return
    chosen = [
        (pod, count)
        for _, pod, count in templates
        if all(mapping(pod, "metadata", "labels").get(key) == value for key, value in wanted.items())
    ]
    if not chosen:
        near = {str(v) for _, pod, _ in templates for v in mapping(pod, "metadata", "labels").values()}
        hint = next((h for value in wanted.values() if value not in near and (h := nearest(value, near))), None)
        shown = ", ".join(f"{key}={value}" for key, value in wanted.items())
        yield Problem(place, f"no pod in the given files is labelled {shown}", hint)
    elif one.kind == "Service":
        yield from _target_ports(one, [pod for pod, _ in chosen])
    elif (least := whole(one.tree, "spec", "minAvailable")) is not None:
        count = sum(count for _, count in chosen)
        if least >= count:
            place = ("spec", "minAvailable")
            yield warning(place, f"{least} of {count} pods: none may ever be moved, so no node can be drained")


def _peers(one: KubernetesObject, objects: list[KubernetesObject]) -> Iterator[Problem]:
    """Selectors inside an object (peers of a policy, affinities, spreads) that no pod of the files answers to."""
    labels = [mapping(pod, "metadata", "labels") for owner, pod in _pod_templates(objects)]
    if not labels:
        return
    for path, value in walk(dict(one.tree)):
        if path[-2:-1] not in (("podSelector",), ("labelSelector",)) or path[-1] != "matchLabels" or len(path) <= 3:
            continue
        above: Any = one.tree
        for part in path[:-2]:
            above = above[part]
        if not isinstance(value, dict) or mapping(above, "namespaceSelector") or "namespaceSelector" in above:
            continue  # pods of other namespaces need not be in these files
        wanted = _wanted(value)
        if wanted and not any(all(found.get(key) == want for key, want in wanted.items()) for found in labels):
            shown = ", ".join(f"{key}={want}" for key, want in wanted.items())
            near = {str(found) for one_pod in labels for found in one_pod.values()}
            hint = next((h for want in wanted.values() if want not in near and (h := nearest(want, near))), None)
            yield warning(path, f"no pod in the given files is labelled {shown}", hint)


def _labelled(template: dict[str, Any], above: Any, field: str) -> dict[str, Any]:
    """The template with the labels that KubeRay gives to the pods of a group."""
    metadata = mapping(template, "metadata")
    if field == "headGroupSpec":
        own = {GROUP_LABEL: "headgroup", NODE_LABEL: "head"}
    elif group := text(above, "groupName"):
        own = {GROUP_LABEL: group, NODE_LABEL: "worker"}
    else:
        return template
    return {**template, "metadata": {**metadata, "labels": {**mapping(metadata, "labels"), **own}}}


def _wanted(labels: Mapping[str, Any]) -> dict[str, str]:
    """What a selector asks of pods, without what they only get when they are made."""
    return {
        key: value
        for key, value in labels.items()
        if isinstance(value, str)
        and not (key.startswith(MADE_LATER) and key not in (GROUP_LABEL, NODE_LABEL))
        and (key, value) not in SET_BY_OPERATOR
    }


def _target_ports(one: KubernetesObject, pods: list[dict[str, Any]]) -> Iterator[Problem]:
    ports = [port for pod in pods for _, c in entries(pod, "spec", "containers") for _, port in entries(c, "ports")]
    numbers, names = {whole(port, "containerPort") for port in ports}, {text(port, "name") for port in ports}
    for index, port in entries(one.tree, "spec", "ports"):
        target = port.get("targetPort", port.get("port"))
        place = ("spec", "ports", index, "targetPort" if "targetPort" in port else "port")
        if isinstance(target, str) and target not in names:
            yield Problem(place, f"no selected pod has a port called {target!r}", nearest(target, names))
        elif isinstance(target, int) and ports and target not in numbers:
            yield warning(place, f"no selected pod declares port {target}")


def _backends(one: KubernetesObject, present: Mapping[tuple[str, str], KubernetesObject]) -> Iterator[Problem]:
    """Ports that an Ingress asks of services that are among the files."""
    for path, value in walk(dict(one.tree)) if one.kind == "Ingress" else ():
        service = present.get(("service", text(value, "name"))) if path[-1:] == ("service",) else None
        if service is None:
            continue
        ports = [port for _, port in entries(service.tree, "spec", "ports")]
        for field, offered in (("number", "port"), ("name", "name")):
            wanted = at(value, "port", field)
            if wanted is not None and wanted not in [port.get(offered) for port in ports]:
                yield Problem((*path, "port", field), f"the service {service.name} has no port {wanted!r}")


def _redis(one: KubernetesObject, objects: list[KubernetesObject], declared: set[str]) -> Iterator[Problem]:
    for path, value in walk(dict(one.tree)):
        if not path or path[-1] != "redisAddress" or not isinstance(value, str):
            continue
        host, _, port = value.split("://")[-1].partition(":")
        services = {other.name: other for other in objects if other.kind == "Service"}
        name = host.split(".")[0]
        if name in services:
            offered = {whole(entry, "port") for _, entry in entries(services[name].tree, "spec", "ports")}
            if port.isdigit() and int(port) not in offered:
                yield Problem(path, f"the service {name} has no port {port}")
        elif f"service/{name}" not in declared and services and "." not in host:
            yield warning(path, f"no service {name!r} in the given files", nearest(name, services))
