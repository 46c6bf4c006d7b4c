"""Rules for Ray's version in a cluster: images against `rayVersion`, and features against the version. Pure.

Used by `cluster_rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, warning
from penstock.cluster.validate.image_rules import parse_image
from penstock.cluster.validate.loose import at, entries, mapping, switch, text, whole
from penstock.cluster.validate.quantities import Version, shown, version

_IMAGE = ("template", "spec", "containers", 0, "image")
MINIMUM = (2, 55, 0)  # what Penstock itself needs; a test compares it with the package's requirement
TOKEN_AUTH = (2, 52, 0)
KUBERNETES_AUTH = (2, 55, 0)
AUTOSCALER_V2_DEFAULT = (2, 47, 0)
GROUP_PRIORITY = (2, 56, 0)
EMBEDDED_STORAGE = (2, 57, 0)


def check_versions(spec: dict[str, Any], path: Path, kind: str, is_ours: bool) -> Iterator[Problem]:
    """`is_ours`: Penstock runs in this cluster."""
    place = (*path, "rayVersion")
    stated = text(spec, "rayVersion")
    ray = version(stated)
    if "rayVersion" not in spec:
        yield warning(place, "state Ray's version; the operator decides by it what the cluster can do")
    elif ray is None:
        yield Problem(place, f"{stated!r} is no version like 2.60.0")
    yield from _images(spec, path, ray, is_ours)
    if ray is not None:
        yield from _features(spec, path, ray, kind)
        if is_ours and ray < MINIMUM:
            yield Problem(place, f"Ray {stated} is too old; Penstock needs {shown(MINIMUM)} or newer")


def _images(spec: dict[str, Any], path: Path, ray: Version | None, is_ours: bool) -> Iterator[Problem]:
    """The Ray container is the first of a pod. All of a cluster's must hold the same Ray."""
    found: list[tuple[Path, str, Version]] = []
    head = parse_image(text(spec, "headGroupSpec", *_IMAGE))
    head_python = head.python_version
    groups = [((*path, "headGroupSpec"), mapping(spec, "headGroupSpec"))]
    groups += [((*path, "workerGroupSpecs", i), group) for i, group in entries(spec, "workerGroupSpecs")]
    for place, group in groups:
        here = (*place, *_IMAGE)
        image = parse_image(text(group, *_IMAGE))
        python = image.python_version
        if python and head_python and python != head_python:
            yield Problem(
                here, f"the tag {image.tag!r} holds Python {python}, the head's {head_python}; it cannot join"
            )
        ours, its = version(image.tag), version(head.tag)
        if is_ours and image.repository == head.repository and ours and its and ours != its:
            yield Problem(here, f"the tag {image.tag!r} holds another version than the head's {head.tag!r}")
        inside = image.ray_version
        if inside is not None:
            found.append((here, image.tag, inside))
        if inside is not None and ray is not None and inside != ray:
            yield Problem(here, f"the tag {image.tag!r} holds Ray {shown(inside)}, but rayVersion is {shown(ray)}")
        if is_ours and image.repository.split("/")[-2:-1] == ["rayproject"]:
            reason = f"{image.repository} holds no Penstock; build deploy/Dockerfile"
            yield warning(here, reason)
    sidecar = parse_image(text(spec, "autoscalerOptions", "image"))
    if ray is not None and sidecar.ray_version is not None and sidecar.ray_version != ray:
        reason = f"the tag {sidecar.tag!r} holds Ray {shown(sidecar.ray_version)}, but rayVersion is {shown(ray)}"
        yield Problem((*path, "autoscalerOptions", "image"), reason)
    if ray is None and len({inside for _, _, inside in found}) > 1:
        here, tag, inside = found[-1]
        yield Problem(here, f"the tag {tag!r} holds Ray {shown(inside)}, the head's {shown(found[0][2])}")


def _features(spec: dict[str, Any], path: Path, ray: Version, kind: str) -> Iterator[Problem]:
    def too_old(place: Path, what: str, least: Version) -> Iterator[Problem]:
        if ray < least:
            yield Problem((*path, *place), f"{what} needs Ray {shown(least)} or newer; rayVersion is {shown(ray)}")

    if text(spec, "authOptions", "mode") == "token":
        yield from too_old(("authOptions", "mode"), "token authentication", TOKEN_AUTH)
    if switch(spec, "authOptions", "enableK8sTokenAuth"):
        place: Path = ("authOptions", "enableK8sTokenAuth")
        yield from too_old(place, "authentication by Kubernetes tokens", KUBERNETES_AUTH)
        if kind != "RayCluster":
            yield Problem((*path, *place), f"only a RayCluster can use Kubernetes tokens, not a {kind}")
    if text(spec, "gcsFaultToleranceOptions", "backend") == "rocksdb":
        yield from too_old(("gcsFaultToleranceOptions", "backend"), "embedded GCS storage", EMBEDDED_STORAGE)
    for index, group in entries(spec, "workerGroupSpecs"):
        if whole(group, "priority"):
            yield from too_old(("workerGroupSpecs", index, "priority"), "the priority of a group", GROUP_PRIORITY)
    if switch(spec, "enableInTreeAutoscaling"):
        yield from _autoscaler(spec, path, ray)
        return
    for index, group in entries(spec, "workerGroupSpecs"):
        for name in ("idleTimeoutSeconds", "priority"):
            if whole(group, name):
                place = (*path, "workerGroupSpecs", index, name)
                yield warning(place, "only the autoscaler takes notice of it (enableInTreeAutoscaling)")


def _autoscaler(spec: dict[str, Any], path: Path, ray: Version) -> Iterator[Problem]:
    second = (text(spec, "autoscalerOptions", "version") or ("v2" if ray >= AUTOSCALER_V2_DEFAULT else "v1")) == "v2"
    groups: list[tuple[Path, Any]] = [((*path, "headGroupSpec"), at(spec, "headGroupSpec"))]
    groups += [((*path, "workerGroupSpecs", i), group) for i, group in entries(spec, "workerGroupSpecs")]
    for place, group in groups:
        policy = text(group, "template", "spec", "restartPolicy")
        if second and policy not in ("", "Never"):
            here = (*place, "template", "spec", "restartPolicy")
            yield Problem(here, f"autoscaler v2 needs restartPolicy Never, not {policy}")
        for name in ("idleTimeoutSeconds", "priority"):
            if whole(group, name) and not second:
                yield Problem((*place, name), f"{name} of a group needs autoscaler v2")
