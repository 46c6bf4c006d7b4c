"""Rules for services and network policies. Used by `object_rules.py`. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, warning
from penstock.cluster.validate.loose import entries, mapping, text, whole
from penstock.cluster.validate.scheduling_rules import check_expressions

_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?")


def check_service_object(tree: dict[str, Any]) -> Iterator[Problem]:
    """A Service."""
    spec = mapping(tree, "spec")
    ports = entries(spec, "ports")
    names: set[str] = set()
    numbers: set[tuple[int | None, str]] = set()
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
        protocol = text(port, "protocol") or "TCP"
        if number is not None and (number, protocol) in numbers:
            yield Problem((*place, "port"), f"{number} stands twice among this service's ports")
        numbers.add((number, protocol))
        yield from _target(port.get("targetPort"), (*place, "targetPort"))
        if node_port is not None and text(spec, "type") not in ("NodePort", "LoadBalancer"):
            yield Problem((*place, "nodePort"), "only a service of type NodePort or LoadBalancer has one")
        elif node_port is not None and not 30000 <= node_port <= 32767:
            yield warning((*place, "nodePort"), f"{node_port} is outside the usual 30000 to 32767")
    if text(spec, "clusterIP") == "None" and text(spec, "type") in ("NodePort", "LoadBalancer"):
        yield Problem(("spec", "clusterIP"), f"a service of type {text(spec, 'type')} needs an address of its own")
    if not mapping(spec, "selector") and text(spec, "type") != "ExternalName":
        yield warning(("spec", "selector"), "without a selector the service leads nowhere")


def _target(target: object, path: Path) -> Iterator[Problem]:
    if isinstance(target, int) and not 1 <= target <= 65535:
        yield Problem(path, f"{target} is outside 1 to 65535")
    elif isinstance(target, str) and not _PORT_NAME.fullmatch(target):
        yield Problem(path, f"{target!r}: a port's name has at most 15 lower-case letters, digits and dashes")


def check_policy(tree: dict[str, Any]) -> Iterator[Problem]:
    """A NetworkPolicy."""
    spec = mapping(tree, "spec")
    kinds = spec.get("policyTypes")
    yield from check_expressions(spec, ("spec",))
    for name in ("ingress", "egress"):
        if name in spec and isinstance(kinds, list) and name.title() not in kinds:
            yield Problem(("spec", name), f"policyTypes does not hold {name.title()}, so these rules do nothing")
        for index, rule in entries(spec, name):
            for number, port in entries(rule, "ports"):
                if isinstance(port.get("port"), str) and not _PORT_NAME.fullmatch(port["port"]):
                    quoted: Path = ("spec", name, index, "ports", number, "port")
                    yield Problem(quoted, f"{port['port']!r} in quotes is a port's name, and no name has this form")
                first, last = whole(port, "port"), whole(port, "endPort")
                if first is not None and last is not None and last < first:
                    yield Problem(("spec", name, index, "ports", number, "endPort"), f"{last} is less than {first}")
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


def check_ingress(tree: dict[str, Any]) -> Iterator[Problem]:
    """An Ingress."""
    for index, rule in entries(tree, "spec", "rules"):
        for number, route in entries(rule, "http", "paths"):
            place = ("spec", "rules", index, "http", "paths", number)
            stated = text(route, "path")
            if text(route, "pathType") != "ImplementationSpecific" and not stated.startswith("/"):
                yield Problem((*place, "path"), f"{stated!r} must start with '/'")
            if len([name for name in ("service", "resource") if name in mapping(route, "backend")]) != 1:
                yield Problem((*place, "backend"), "exactly one of service and resource")
            port = mapping(route, "backend", "service", "port")
            if "service" in mapping(route, "backend") and len(port) != 1:
                yield Problem((*place, "backend", "service", "port"), "exactly one of name and number")


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
