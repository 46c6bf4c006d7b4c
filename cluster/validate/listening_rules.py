"""Rules for who listens where in a RayService's pods: Serve's proxies, Penstock's ingress, Ray itself; and who asks.

A port that two want, a probe or a service port that nobody answers, a path that does not exist. Used by
`service_rules.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.cluster.ingress.gate import ROUTES, UNKNOWN, Door, route_of
from penstock.cluster.settings import ClusterConfig
from penstock.cluster.validate.application_rules import LOOPBACK, PROXY_PORT, application_config, is_ours, stated_of
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import at, entries, mapping, switch, text, whole
from penstock.cluster.validate.pod_rules import PROBES

RAYS_PORTS = {6379: "GCS", 8265: "dashboard", 10001: "client", 52365: "agent", 8080: "metrics"}
SERVE_PORT_NAME = "serve"
_CONTAINER = ("template", "spec", "containers", 0)


@dataclass(frozen=True, slots=True)
class Listeners:
    """Ports of one Penstock application's pods. `by_port`: who listens; `front` is 0 where only proxies answer."""

    proxy: int  # 0 = Disabled
    front: int
    by_port: Mapping[int, str]


def check_listening(
    serve_config: Any, serve_place: Path, spec: dict[str, Any], cluster_place: Path
) -> Iterator[Problem]:
    """`spec`: of the RayService, with its defaults."""
    cluster = mapping(spec, "rayClusterConfig")
    yield from _proxies(serve_config, serve_place, spec, cluster)
    for index, application in entries(serve_config, "applications"):
        if is_ours(application):
            place = (*serve_place, "applications", index, "args")
            stated = stated_of(application, place)
            config = application_config(application)
            front_stated = stated.places.get("front.port")
            listeners = _listeners(serve_config, config, front_stated is not None)
            yield from _clashes(config, listeners, stated.places, place)
            if front_stated is not None:
                yield from _declared(cluster, listeners, front_stated)
            for group, where in _groups(cluster, cluster_place):
                yield from _probes(group, where, listeners)


def _listeners(serve_config: Any, config: ClusterConfig, front_stated: bool) -> Listeners:
    disabled = text(serve_config, "proxy_location") == "Disabled"
    proxy = 0 if disabled else whole(serve_config, "http_options", "port") or PROXY_PORT
    front = config.front.port if front_stated else 0
    apart = config.front.operators_port if config.front.admin == "apart" and (front or config.front.admin_port) else 0
    by_port = {
        **RAYS_PORTS,
        apart: "the listener for operators",
        proxy: "Serve's proxies",
        front: "the ingress",
        config.front.grpc_port: "gRPC",
    }
    grpc = whole(serve_config, "grpc_options", "port")
    if grpc and at(serve_config, "grpc_options", "grpc_servicer_functions"):
        by_port[grpc] = "Serve's gRPC proxies"
    by_port.pop(0, None)
    return Listeners(proxy, front, by_port)


def _proxies(serve_config: Any, serve_place: Path, spec: dict[str, Any], cluster: dict[str, Any]) -> Iterator[Problem]:
    location, options = text(serve_config, "proxy_location"), mapping(serve_config, "http_options")
    if location == "Disabled" or not isinstance(serve_config, dict):
        return
    if text(options, "host") in LOOPBACK:
        yield Problem((*serve_place, "http_options", "host"), f"{options['host']}: no other pod reaches the proxies")
    if location == "HeadOnly" and switch(spec, "excludeHeadPodFromServeSvc"):
        reason = "the proxy is on the head only, which excludeHeadPodFromServeSvc keeps out of the service"
        yield Problem((*serve_place, "proxy_location"), reason)
    port = whole(options, "port") or PROXY_PORT
    ports = [one for group, _ in _groups(cluster, ()) for _, one in entries(group, *_CONTAINER, "ports")]
    named = {whole(one, "containerPort") for one in ports if text(one, "name") == SERVE_PORT_NAME}
    if named and port not in named:
        told = ", ".join(sorted(map(str, named)))
        place = (*serve_place, "http_options", "port")
        yield Problem(place, f"Serve's proxies listen on {port}, but the pods' port {SERVE_PORT_NAME!r} is {told}")


def _clashes(config: ClusterConfig, listeners: Listeners, places: Mapping[str, Path], args: Path) -> Iterator[Problem]:
    stated = {"front.grpc_port": config.front.grpc_port, "front.admin_port": config.front.admin_port}
    for key, port in {"front.port": listeners.front, **stated}.items():
        if port in RAYS_PORTS:
            yield Problem(places.get(key, args), f"Ray's own {RAYS_PORTS[port]} uses port {port}; take another")
    if config.front.grpc_port and config.front.grpc_port == listeners.proxy:
        yield Problem(places.get("front.grpc_port", args), f"Serve's proxies listen on {listeners.proxy} too")


def _declared(cluster: dict[str, Any], listeners: Listeners, place: Path) -> Iterator[Problem]:
    """A declared port that nobody listens on, while the ingress listens where none is declared."""
    ports = [one for group, _ in _groups(cluster, ()) for _, one in entries(group, *_CONTAINER, "ports")]
    declared = {number: text(one, "name") for one in ports if (number := whole(one, "containerPort")) is not None}
    idle = [f"{number} ({name})" for number, name in declared.items() if number not in listeners.by_port]
    if listeners.front not in declared and idle:
        reason = f"no container declares port {listeners.front}, and nobody listens on {', '.join(idle)}"
        yield Problem(place, reason)


def _probes(group: dict[str, Any], path: Path, listeners: Listeners) -> Iterator[Problem]:
    container, place = mapping(group, *_CONTAINER), (*path, *_CONTAINER)
    parameters = mapping(group, "rayStartParams")
    own = {int(value) for name, value in parameters.items() if name.endswith("port") and str(value).isdigit()}
    names = {text(one, "name"): whole(one, "containerPort") for _, one in entries(container, "ports")}
    for probe in PROBES:
        for kind in ("httpGet", "tcpSocket"):
            port = at(container, probe, kind, "port")
            number = names.get(port) if isinstance(port, str) else port
            if not isinstance(number, int):
                continue
            here = (*place, probe, kind)
            if number not in listeners.by_port and number not in own:
                known = ", ".join(f"{one} ({who})" for one, who in sorted(listeners.by_port.items()))
                yield Problem((*here, "port"), f"nobody listens on {number} in this pod; there are {known}")
            elif kind == "httpGet" and number == listeners.front:
                yield from _path(text(container, probe, kind, "path"), (*here, "path"))


def _path(stated: str, path: Path) -> Iterator[Problem]:
    route = route_of(stated.partition("?")[0])
    open_routes = [name for name, one in ROUTES.items() if one.door is Door.OPEN]
    if route is UNKNOWN:
        yield Problem(path, f"the ingress has no path {stated!r}", nearest(stated, open_routes))
    elif route.door is not Door.OPEN:
        yield warning(path, f"{stated} asks for a key where there is one; ask {' or '.join(open_routes)}")


def _groups(cluster: dict[str, Any], path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    yield mapping(cluster, "headGroupSpec"), (*path, "headGroupSpec")
    for index, group in entries(cluster, "workerGroupSpecs"):
        yield group, (*path, "workerGroupSpecs", index)
