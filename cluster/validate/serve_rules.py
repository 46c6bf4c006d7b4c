"""Rules for Ray Serve configurations, as files or inside a RayService's `serveConfigV2`.

Serve's own schema decides what it decides; what it lets pass silently is added here: unknown keys at every level,
and routes that cannot work. Penstock's own application is looked into by `application_rules.py`. Used by `checker.py`
and `service_rules.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import ipaddress
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from penstock.cluster.validate.application_rules import BUILDER, check_application, check_together, is_ours
from penstock.cluster.validate.environment_rules import keys_in_plain_text
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import at, entries, mapping, text, whole
from penstock.cluster.validate.runtime_env_rules import check_runtime_env

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


def serve_keys() -> frozenset[str]:
    """The keys that may stand at the top of a Serve configuration."""
    return frozenset(_schema().model_fields)


def check_serve(raw: object, base: Path = (), elsewhere: bool = False) -> Iterator[Problem]:
    """Everything wrong with a Serve configuration. `elsewhere`: paths in it are those of another machine."""
    if not isinstance(raw, dict):
        yield Problem(base, "expected the keys of a Serve configuration")
        return
    yield from _unknown_keys(raw, _schema(), base)
    yield from _schema_problems(raw, _schema(), base)
    applications = entries(raw, "applications")
    if not applications:
        yield Problem((*base, "applications"), "there is no application")
    yield from _options(raw, base)
    yield from keys_in_plain_text(raw, base)
    yield from _routes_and_names(applications, base)
    yield from check_together(raw, base)
    for index, application in applications:
        path = (*base, "applications", index)
        yield from _import_path(application, path)
        yield from check_runtime_env(application.get("runtime_env"), (*path, "runtime_env"))
        yield from _deployments(application, path)
        if is_ours(application):
            yield from check_application(raw, index, path, elsewhere)


def _options(raw: dict[str, Any], base: Path) -> Iterator[Problem]:
    """What Serve only notices when it starts."""
    for group in ("http_options", "grpc_options"):
        port = whole(raw, group, "port")
        if port is not None and not 1 <= port <= 65535:
            yield Problem((*base, group, "port"), f"{port} is outside 1 to 65535")
    ports = [whole(raw, group, "port") for group in ("http_options", "grpc_options")]
    if ports[0] is not None and ports[0] == ports[1]:
        yield Problem((*base, "grpc_options", "port"), f"the HTTP proxies listen on {ports[1]} too")
    http, place = mapping(raw, "http_options"), (*base, "http_options")
    host = text(http, "host")
    if host and host.replace(".", "").isdigit() and not _is_address(host):
        yield Problem((*place, "host"), f"{host!r} is no IP address", nearest(host, ("0.0.0.0", "127.0.0.1")))
    root = text(http, "root_path")
    if root and not root.startswith("/"):
        yield Problem((*place, "root_path"), f"{root!r} must start with '/'", f"/{root}")
    for name, other in (("ssl_keyfile", "ssl_certfile"), ("ssl_certfile", "ssl_keyfile")):
        if http.get(name) and not http.get(other):
            yield Problem((*place, name), f"{name} needs {other}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _schema() -> type[BaseModel]:
    # Late: Ray takes a second to import, and files without a Serve part do not need it.
    from ray.serve.schema import ServeDeploySchema

    schema: type[BaseModel] = ServeDeploySchema
    return schema


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _unknown_keys(raw: dict[str, Any], model: type[BaseModel], path: Path) -> Iterator[Problem]:
    names = set(model.model_fields) | {field.alias for field in model.model_fields.values() if field.alias}
    for name, value in raw.items():
        if name not in names:
            yield Problem((*path, name), f"unknown key {name!r}, which Serve would ignore", nearest(name, names))
            continue
        for inner in _models_in(getattr(model.model_fields.get(name), "annotation", None))[:1]:
            children = value if isinstance(value, list) else [value]
            for index, child in enumerate(children):
                place = (*path, name, index) if isinstance(value, list) else (*path, name)
                if isinstance(child, dict):
                    yield from _unknown_keys(child, inner, place)


def _schema_problems(raw: dict[str, Any], model: type[BaseModel], base: Path) -> Iterator[Problem]:
    """What the schema refuses; of the several messages about one value, the first."""
    told: set[Path] = set()
    try:
        model.model_validate(raw)
    except ValidationError as error:
        for one in error.errors(include_url=False, include_context=False, include_input=False):
            path = (*base, *_existing(raw, one["loc"]))
            if path == base or (path and isinstance(path[-1], int)):
                path = (*path, *_field_in(str(one["msg"]), at(raw, *path[len(base) :])))
            if path not in told and "multiple configs for application" not in one["msg"]:
                told.add(path)
                yield Problem(path, str(one["msg"]).removeprefix("Value error, "))
    except (TypeError, ValueError, KeyError, AttributeError) as error:  # some of its validators raise these themselves
        yield Problem(base, f"Serve refuses it: {error}")


def _field_in(message: str, tree: Any) -> Path:
    """The key of a mapping that a message about the whole of it names."""
    named = [name for name in re.findall(r"[a-z_]{4,}", message) if isinstance(tree, dict) and name in tree]
    return (named[0],) if named else ()


def _existing(raw: Any, location: tuple[int | str, ...]) -> Path:
    """The part of pydantic's location that is a path; it also names the branches of unions."""
    path: Path = ()
    for part in location:
        here = at(raw, *path)
        named = isinstance(here, dict) and isinstance(part, str) and (part in here or part == location[-1])
        if named or (isinstance(here, list) and isinstance(part, int)):
            path = (*path, part)
    return path


def _routes_and_names(applications: list[tuple[int, dict[str, Any]]], base: Path) -> Iterator[Problem]:
    routes: dict[str, int] = {}
    names: dict[str, int] = {}
    for index, application in applications:
        path = (*base, "applications", index)
        name = text(application, "name")
        if name in names:
            yield Problem((*path, "name"), f"application {name!r} stands twice, first in entry {names[name]}")
        names.setdefault(name, index)
        if len(applications) > 1 and not name:
            yield Problem((*path, "name"), "each of several applications needs a name")
        if "route_prefix" not in application:
            routes.setdefault("/", index)
            continue
        route = application["route_prefix"]
        if not isinstance(route, str):
            continue  # null: no route over HTTP
        if not route.startswith("/"):
            yield Problem((*path, "route_prefix"), f"{route!r} must start with '/'", f"/{route}")
        elif route != "/" and route.endswith("/"):
            yield Problem((*path, "route_prefix"), f"{route!r} must not end with '/'", route.rstrip("/"))
        elif "{" in route or "}" in route:
            yield Problem((*path, "route_prefix"), f"{route!r} must not hold wildcards")
        if route in routes:
            yield Problem((*path, "route_prefix"), f"{route!r} is also the route of application {routes[route]}")
        routes.setdefault(route, index)


def _import_path(application: dict[str, Any], path: Path) -> Iterator[Problem]:
    """Penstock's modules can be looked into without importing them; others are not on this machine."""
    stated = text(application, "import_path")
    module, _, attribute = stated.partition(":") if ":" in stated else stated.rpartition(".")
    place = (*path, "import_path")
    if not module.startswith("penstock"):
        hint = nearest(stated, [BUILDER])
        if hint:
            yield Problem(place, f"there is no {stated!r} in Penstock", hint)
        return
    names = _functions_of(module)
    if names is None or attribute not in names:
        yield Problem(place, f"there is no {stated!r} in Penstock", BUILDER)
    elif f"{module}:{attribute}" != BUILDER:
        yield warning(place, f"{stated!r} is no application builder", BUILDER)


def _functions_of(module: str) -> set[str] | None:
    """Names that a module defines, read from its source; None where there is no such module."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None or not found.origin.endswith(".py"):
        return None
    with open(found.origin, encoding="utf-8") as source:
        tree = ast.parse(source.read())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}


def _deployments(application: dict[str, Any], path: Path) -> Iterator[Problem]:
    from ray.serve.config import AutoscalingConfig

    seen: dict[str, int] = {}
    for index, deployment in entries(application, "deployments"):
        place = (*path, "deployments", index)
        name = text(deployment, "name")
        if name in seen:
            yield Problem((*place, "name"), f"deployment {name!r} stands twice, first in entry {seen[name]}")
        seen.setdefault(name, index)
        scaling = deployment.get("autoscaling_config")
        if isinstance(scaling, dict):
            yield from _schema_problems(scaling, AutoscalingConfig, (*place, "autoscaling_config"))
        actor = (*place, "ray_actor_options", "runtime_env")
        yield from check_runtime_env(at(deployment, "ray_actor_options", "runtime_env"), actor)
        strategy = deployment.get("placement_group_strategy")
        if strategy is not None and strategy not in STRATEGIES:
            reason = f"{strategy!r} is none of {', '.join(STRATEGIES)}"
            yield Problem((*place, "placement_group_strategy"), reason, nearest(strategy, STRATEGIES))
        per_node = whole(deployment, "max_replicas_per_node")
        if per_node is not None and not 1 <= per_node <= 100:
            yield Problem((*place, "max_replicas_per_node"), f"{per_node} is outside 1 to 100")
        if per_node is not None and deployment.get("placement_group_bundles"):
            yield Problem((*place, "max_replicas_per_node"), "Serve does not allow it beside placement_group_bundles")
        if number_of_bundles := len(deployment.get("placement_group_bundles") or []):
            selectors = deployment.get("placement_group_bundle_label_selector") or []
            if len(selectors) not in (0, 1, number_of_bundles):
                reason = f"{len(selectors)} selectors for {number_of_bundles} bundles"
                yield Problem((*place, "placement_group_bundle_label_selector"), reason)
