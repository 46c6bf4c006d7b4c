"""Penstock as a Ray Serve application: `build` for `serve run` and `serve deploy`, `app` for `serve build`.

    serve run penstock.cluster.serve_app:build model=/models/llama prefill=2 decode=4
    serve deploy config.yaml        # import_path: penstock.cluster.serve_app:build, args: {pools: {decode: 4}, ...}
    serve build penstock.cluster.serve_app:app -o config.yaml

`launch.py` deploys the same replica for `penstock serve`, behind no proxy. What is built here needs no GPU and starts
nothing; the replica does (`ingress_replica.py`).
"""

from __future__ import annotations

from typing import Any

from ray import serve

from penstock.cluster.app_arguments import config_of
from penstock.cluster.ingress_replica import IngressReplica, IngressSpec
from penstock.cluster.live_settings import user_config_of

DEPLOYMENT = "ingress"
HEALTH_PERIOD_S = 2.0
WAIT_LOOP_S = 0.05
SHUTDOWN_MARGIN_S = 5.0
NODE_SHARE = 0.001  # Ray gives every node one unit of a resource named after its address


def build(args: dict[str, Any]) -> serve.Application:
    """The application that Serve's command line and configuration files ask for.

    `args` are configuration keys, nested or dotted, or flags of `penstock serve` without dashes; `config` names a YAML
    file. Values may be text. Raises ConfigError naming the key, ModelError naming the file.
    """
    return build_serve_app(IngressSpec(config_of(args)))


def build_serve_app(spec: IngressSpec) -> serve.Application:
    """The deployable application; with an identity (`penstock serve`) it stands behind no proxy."""
    config = spec.config
    actor_options: dict[str, Any] = {"num_cpus": config.ray.ingress_num_cpus}
    if spec.node:
        actor_options["resources"] = {f"node:{spec.node}": NODE_SHARE}
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "num_replicas": config.ray.ingress_replicas,
        # Ours refuses what is too much, with Retry-After; Serve's own bound must not hold requests back before that.
        "max_ongoing_requests": 2 * config.limits.max_open_requests,
        "health_check_period_s": HEALTH_PERIOD_S,
        # What comes by the proxies is let go first, then what comes by the listener.
        "graceful_shutdown_timeout_s": 2 * spec.drain_s + SHUTDOWN_MARGIN_S,
        "graceful_shutdown_wait_loop_s": WAIT_LOOP_S,
        "ray_actor_options": actor_options,
    }
    if config.ray.max_ingress_per_node:
        options["max_replicas_per_node"] = config.ray.max_ingress_per_node
    replica: Any = IngressReplica
    if spec.identity is None:
        replica = serve.ingress()(IngressReplica)
        options["user_config"] = user_config_of(config)
        options["logging_config"] = {"enable_access_log": False}  # requests are logged by us, once
        options["max_surge_percent"] = 100  # new replicas, and their workers, are up before old ones let go
    deployment: Any = serve.deployment(replica, **options)
    application: serve.Application = deployment.bind(spec)
    return application


def __getattr__(name: str) -> Any:
    """`app`: the application with all defaults, made when somebody asks for it."""
    if name == "app":
        return build({})
    raise AttributeError(name)
