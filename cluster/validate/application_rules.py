"""Rules for Penstock as an application of a Serve configuration: its arguments, its deployment, its ports.

`serve_rules.py` calls `check_application`; `demands.py` asks `application_config` what will run. The same readings as
`app_arguments.py`, but all mistakes at once and without reading another machine's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from penstock.cluster.app_arguments import CONFIG_FILE, MODEL_NAMES
from penstock.cluster.commands.flags import SERVE_FLAGS
from penstock.cluster.live_settings import live_pools
from penstock.cluster.llm_config import is_llm_config, translate
from penstock.cluster.settings import ClusterConfig, with_value
from penstock.cluster.validate.configuration_rules import Stated, check_stated, read_stated
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import at, entries, mapping, number, text, walk, whole
from penstock.workers.errors import ConfigError

BUILDER = "penstock.cluster.serve_app:build"
DEPLOYMENT = "ingress"
SHUTDOWN_MARGIN_S = 5.0
PROXY_PORT = 8000
LOOPBACK = ("127.0.0.1", "::1", "localhost")
SPELLINGS = {flag.parameter: flag.key for flag in SERVE_FLAGS} | dict.fromkeys(MODEL_NAMES, "runner.model_dir")


def is_ours(application: dict[str, Any]) -> bool:
    """Whether an application is Penstock's."""
    return text(application, "import_path").replace(":", ".") == BUILDER.replace(":", ".")


def application_config(application: dict[str, Any]) -> ClusterConfig:
    """What an application of ours runs, as far as it can be read: arguments, then what its deployment overrides."""
    stated, _ = _stated(application, ())
    config = stated.config()
    pools = config.pools
    if pools.mixed and not {"pools.prefill", "pools.decode"} & set(stated.values):
        config = dataclasses.replace(config, pools=dataclasses.replace(pools, prefill=0, decode=0))
    for _, deployment in entries(application, "deployments"):
        replicas = whole(deployment, "num_replicas")
        if replicas is not None and text(deployment, "name") == DEPLOYMENT:
            config = with_value(config, "ray.ingress_replicas", replicas)
        try:
            config = dataclasses.replace(config, pools=live_pools(config, mapping(deployment, "user_config")))
        except ConfigError:
            continue  # told by check_application
    return config


def stated_of(application: dict[str, Any], base: Path) -> Stated:
    """What an application of ours states, and where; `base` is the place of its arguments."""
    return _stated(application, base)[0]


def check_together(raw: dict[str, Any], base: Path) -> Iterator[Problem]:
    """Several applications of ours in one configuration: ingresses of the same nodes need ports of their own."""
    taken: dict[int, int] = {}
    for index, application in entries(raw, "applications"):
        stated = stated_of(application, (*base, "applications", index, "args")) if is_ours(application) else None
        place = stated.places.get("front.port") if stated is not None else None
        if stated is None or place is None:
            continue
        port = stated.config().front.port
        if port and port in taken:
            yield Problem(place, f"the ingress of application {taken[port]} listens on {port} too")
        taken.setdefault(port, index)


def check_application(raw: dict[str, Any], index: int, path: Path, elsewhere: bool) -> Iterator[Problem]:
    """Everything wrong with application `index` of a Serve configuration, which is one of ours."""
    application = mapping(raw, "applications", index)
    stated, found = _stated(application, (*path, "args"))
    yield from found
    yield from check_stated(stated, (*path, "args"), elsewhere)
    if "ray.address" in stated.values:
        yield Problem(stated.places["ray.address"], "an application runs where it is deployed; leave it out")
    config = application_config(application)
    route = text(application, "route_prefix")
    if route.strip("/"):
        yield warning((*path, "route_prefix"), f"OpenAI clients then need the base URL .../{route.strip('/')}/v1")
    if "route_prefix" in application and application["route_prefix"] is None and "front.port" not in stated.places:
        yield Problem((*path, "route_prefix"), "without a route, and without front.port, nobody can ask")
    yield from _ports(raw, config, stated, (*path, "args"), elsewhere)
    yield from _deployment(application, config, path)


def _stated(application: dict[str, Any], base: Path) -> tuple[Stated, list[Problem]]:
    args = application.get("args")
    if not isinstance(args, dict):
        return read_stated(args, base, SPELLINGS)
    if is_llm_config(args):
        try:
            translated = translate(args)
        except ConfigError as error:
            return Stated({}, {}), [Problem((*base, *_within(args, str(error.key or ""))), str(error))]
        return Stated(translated, dict.fromkeys(translated, base)), []
    return read_stated({name: value for name, value in args.items() if name != CONFIG_FILE}, base, SPELLINGS)


def _within(args: Any, key: str) -> Path:
    """Where the deepest part of a dotted key stands in arguments of the foreign shape."""
    parts = key.split(".")
    for place, value in walk(args):
        if isinstance(value, dict) and parts[0] in value:
            deepest = [parts[: n + 1] for n in range(len(parts)) if at(value, *parts[: n + 1]) is not None]
            return (*place, *(deepest[-1] if deepest else ()))
    return ()


def _ports(
    raw: dict[str, Any], config: ClusterConfig, stated: Stated, base: Path, elsewhere: bool
) -> Iterator[Problem]:
    """Serve's proxies listen, and, where `front.port` is stated, every ingress itself."""
    if not isinstance(stated.values.get("front.port"), (int, str)) or not config.front.port:
        if text(raw, "proxy_location") == "Disabled":
            yield Problem(base, "nobody listens: proxy_location is Disabled and front.port is not stated")
        return
    place = stated.places["front.port"]
    proxy_port = whole(raw, "http_options", "port") or PROXY_PORT
    if text(raw, "proxy_location") != "Disabled" and config.front.port == proxy_port:
        yield Problem(place, f"Serve's proxies listen on {proxy_port} too; the ingress needs a port of its own")
    if elsewhere and config.front.host in LOOPBACK:
        yield Problem(
            stated.places.get("front.host", place), f"front.host {config.front.host}: no other pod reaches it"
        )


def _deployment(application: dict[str, Any], config: ClusterConfig, path: Path) -> Iterator[Problem]:
    for index, deployment in entries(application, "deployments"):
        place = (*path, "deployments", index)
        name = text(deployment, "name")
        if name != DEPLOYMENT:
            hint = nearest(name, [DEPLOYMENT]) or DEPLOYMENT
            yield Problem((*place, "name"), f"Penstock has no deployment {name!r}", hint)
        if "user_config" in deployment:
            try:
                live_pools(config, deployment["user_config"])
            except ConfigError as error:
                yield Problem((*place, "user_config"), str(error).removeprefix("user_config: "))
        if "autoscaling_config" in deployment:
            reason = "the ingress replicas scale; the pools of workers do not follow"
            yield warning((*place, "autoscaling_config"), reason)
        least = 2 * config.health.drain_s
        stated = number(deployment, "graceful_shutdown_timeout_s")
        if stated is not None and stated < least:
            reason = f"{stated:g} s is less than twice health.drain_s ({least:g} s); running streams would be cut off"
            yield Problem((*place, "graceful_shutdown_timeout_s"), reason)
