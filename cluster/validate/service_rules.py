"""Rules for `RayService`: its Serve configuration, its cluster, its upgrades, and the sums between them.

Used by `object_rules.py`. The Serve configuration is a string to Kubernetes; `embedded` reads it with its own lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from penstock.cluster.validate.capacity_rules import check_capacity
from penstock.cluster.validate.cluster_rules import Surroundings, check_cluster
from penstock.cluster.validate.demands import configs_of, demands_of, groups_of, longest_shutdown_s
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.listening_rules import check_listening
from penstock.cluster.validate.loose import at, mapping, switch, text, whole
from penstock.cluster.validate.memory_rules import check_memory
from penstock.cluster.validate.quantities import duration_s
from penstock.cluster.validate.serve_rules import check_serve
from penstock.cluster.validate.yaml_tree import Misread, Node, read_documents

SERVE_KEY = "serveConfigV2"
INCREMENTAL = "NewClusterWithIncrementalUpgrade"
UPGRADES = ("NewCluster", INCREMENTAL, "None")
TIMEOUT_ANNOTATION = "ray.io/initializing-timeout"
DELETION_DELAY_S = 60


@dataclass(frozen=True, slots=True)
class Embedded:
    """The Serve configuration inside a RayService: its tree with the manifest's lines, and mistakes of reading."""

    node: Node | None
    misread: tuple[Misread, ...]
    several: bool = False


def embedded(manifest: Node) -> Embedded:
    """Read `spec.serveConfigV2`."""
    place = manifest.at(("spec", SERVE_KEY))
    if place is None or not isinstance(place.value, str):
        return Embedded(None, ())
    documents, misread = read_documents(place.value, place.first_text_line or place.line)
    return Embedded(documents[0] if documents else None, tuple(misread), len(documents) > 1)


def check_service(
    tree: dict[str, Any], stated: dict[str, Any], serve_config: object, several: bool
) -> Iterator[Problem]:
    """Everything wrong with a RayService. `tree` has its defaults, `stated` has not."""
    spec, place = mapping(tree, "spec"), ("spec",)
    serve_place: Path = ("spec", SERVE_KEY)
    annotations = mapping(tree, "metadata", "annotations")
    if serve_config is None:
        yield Problem(serve_place, "there is no Serve configuration to run")
    else:
        yield from check_serve(serve_config, serve_place, elsewhere=True)
    if several:
        yield Problem(serve_place, "several documents; Serve reads the first one only")
    configs = tuple(configs_of(serve_config))
    cluster, cluster_place = mapping(spec, "rayClusterConfig"), (*place, "rayClusterConfig")
    shutdown_s = longest_shutdown_s(serve_config)
    around = Surroundings("RayService", annotations, mapping(stated, "spec", "rayClusterConfig"), configs, shutdown_s)
    yield from check_cluster(cluster, cluster_place, around)
    groups = groups_of(cluster, cluster_place)
    yield from check_capacity(list(demands_of(serve_config, serve_place)), groups)
    yield from check_memory(serve_config, serve_place, groups)
    yield from check_listening(serve_config, serve_place, spec, cluster_place)
    yield from _upgrade(spec, place)
    yield from _lifetime(spec, place, around)
    if text(cluster, "headGroupSpec", "headService", "metadata", "name"):
        named = (*cluster_place, "headGroupSpec", "headService", "metadata", "name")
        yield Problem(named, "the operator names this service itself")
    if TIMEOUT_ANNOTATION in annotations:
        timeout = duration_s(str(annotations[TIMEOUT_ANNOTATION]))
        if not timeout:
            where = ("metadata", "annotations", TIMEOUT_ANNOTATION)
            yield Problem(where, f"{annotations[TIMEOUT_ANNOTATION]!r} is no duration like 10m or 600")


def _upgrade(spec: dict[str, Any], path: Path) -> Iterator[Problem]:
    strategy, place = mapping(spec, "upgradeStrategy"), (*path, "upgradeStrategy")
    kind = strategy.get("type")
    if kind is not None and kind not in UPGRADES:
        yield Problem((*place, "type"), f"{kind!r} is none of {', '.join(UPGRADES)}", nearest(kind, UPGRADES))
    options, inside = mapping(strategy, "clusterUpgradeOptions"), (*place, "clusterUpgradeOptions")
    if kind != INCREMENTAL:
        if options:
            yield warning(inside, f"only upgradeStrategy.type {INCREMENTAL} takes notice of it")
        return
    if not switch(spec, "rayClusterConfig", "enableInTreeAutoscaling"):
        where = (*path, "rayClusterConfig", "enableInTreeAutoscaling")
        yield Problem(where, f"{INCREMENTAL} needs the autoscaler")
    if not options:
        yield Problem(inside, f"{INCREMENTAL} needs clusterUpgradeOptions")
        return
    for name in ("stepSizePercent", "maxSurgePercent"):
        value = whole(options, name)
        if value is not None and not 0 <= value <= 100:
            yield Problem((*inside, name), f"{value} is outside 0 to 100")
    interval = whole(options, "intervalSeconds")
    if interval is not None and interval <= 0:
        yield Problem((*inside, "intervalSeconds"), f"{interval} is not more than 0")
    if not text(options, "gatewayClassName"):
        yield Problem((*inside, "gatewayClassName"), "without a gateway class traffic cannot be shifted")


def _lifetime(spec: dict[str, Any], path: Path, around: Surroundings) -> Iterator[Problem]:
    name = "rayClusterDeletionDelaySeconds"
    stated = whole(spec, name)
    delay = DELETION_DELAY_S if stated is None else stated
    if delay < 0:
        yield Problem((*path, name), f"{delay} is less than 0")
    elif around.drain_s is not None and delay < around.drain_s:
        reason = f"the old cluster is deleted after {delay} s, before its requests have drained ({around.drain_s:g} s)"
        yield Problem((*path, name), reason)
    if around.configs and at(spec, "excludeHeadPodFromServeSvc") is not True:
        yield warning((*path, "excludeHeadPodFromServeSvc"), "set it to true; requests should not pass the head")
    for old in ("deploymentUnhealthySecondThreshold", "serviceUnhealthySecondThreshold"):
        if old in spec:
            yield warning((*path, old), "the operator takes no notice of it any more")
