"""The ingress as a Ray Serve application: one replica = one HTTP server, one generator, one set of worker links.

`launch.py` deploys it. Serve starts, watches and restarts the replica, which listens itself (`ingress/listener.py`),
so that no proxy relays chunks; see `tests/benchmarks/serve_paths.py` for what Serve's own ways cost. The replica
learns the fleet by watching the controller, which is the only Ray call it makes, and none is on a request's path.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from penstock.cluster.actor_host import NAMESPACE
from penstock.cluster.controller import controller_name
from penstock.cluster.fleet_view import LinkedFleet
from penstock.cluster.generation import open_generator
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import ingress_settings
from penstock.cluster.metrics import Metrics
from penstock.cluster.model_directory import describe
from penstock.cluster.roster import Roster
from penstock.cluster.settings import ClusterConfig
from penstock.cluster.text import load_text

log = logging.getLogger(__name__)

WATCH_S = 10.0
RETRY_S = 0.5
DRAIN_S = 5.0
HEALTH_PERIOD_S = 2.0


@dataclass(frozen=True, slots=True)
class IngressSpec:
    """What one ingress replica is made of."""

    config: ClusterConfig
    cluster_id: str
    cluster_key: str = field(repr=False)


class IngressReplica:
    """One ingress process. Serve constructs it, asks for its health, and destroys it; requests do not pass Serve."""

    async def __init__(self, spec: IngressSpec) -> None:  # type: ignore[misc]  # Serve awaits it, on the serving loop
        config = spec.config
        model = describe(config.runner)
        text = load_text(model, config.front.skip_tokenizer_init, config.scheduler.max_model_len)
        metrics = Metrics()
        self._generator = open_generator(
            config.router, spec.cluster_key, lease_s=config.health.router_lease_s, observe=metrics.report
        )
        fleet = LinkedFleet(self._generator.links)
        app = build_app(ingress_settings(config, model), text, self._generator, metrics, fleet)
        shared = config.ray.ingress_replicas > 1
        self._listener = Listener(app, config.front.host, config.front.port, shared=shared, drain_s=DRAIN_S)
        self._listener.start()
        self._follower = asyncio.ensure_future(follow_controller(spec.cluster_id, self._generator.links.update))

    async def check_health(self) -> None:
        """Serve's question; an exception makes it start another replica."""
        if not self._listener.serving or self._follower.done():
            raise RuntimeError("the HTTP server or the controller's follower has ended")

    async def __del__(self) -> None:  # Serve awaits it when the replica is to end
        await self._listener.stop()
        self._follower.cancel()
        await self._generator.close()


async def follow_controller(cluster_id: str, update: Callable[[Roster], None]) -> None:
    """Hand every new roster of the cluster's controller to `update`, for ever; outlives the controller's restarts."""
    name, version = controller_name(cluster_id), -1
    while True:
        try:
            controller = await asyncio.to_thread(ray.get_actor, name, namespace=NAMESPACE)
            while True:
                roster = await _answer(controller.watch.remote(version, WATCH_S))
                version = roster.version
                update(roster)
        except (ValueError, RayError, TimeoutError) as error:  # gone, restarting, or not there yet
            log.warning("cannot ask the controller, trying again: %s", str(error).splitlines()[:1])
            await asyncio.sleep(RETRY_S)


async def _answer(pending: Awaitable[Roster]) -> Roster:
    return await asyncio.wait_for(pending, WATCH_S + 20.0)


def build_serve_app(spec: IngressSpec) -> serve.Application:
    """The deployable application."""
    options: dict[str, Any] = {
        "name": "ingress",
        "num_replicas": spec.config.ray.ingress_replicas,
        "health_check_period_s": HEALTH_PERIOD_S,
        "graceful_shutdown_timeout_s": 2 * DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.05,
        "ray_actor_options": {"num_cpus": spec.config.ray.ingress_num_cpus},
    }
    deployment: Any = serve.deployment(IngressReplica, **options)
    application: serve.Application = deployment.bind(spec)
    return application
