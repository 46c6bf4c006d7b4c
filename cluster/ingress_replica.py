"""One ingress process inside a Ray Serve replica: HTTP application, generator, worker links, and its own listener.

`serve_app.py` makes a deployment of the class. Serve constructs it, hands it `user_config`, asks for its health, and
destroys it. Requests come by its own socket (`ingress/listener.py`), so that no proxy relays chunks, and, under `serve
run` and `serve deploy`, through Serve's proxies. No Ray call is on a request's path.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve

from penstock.cluster.attendance import Attendant
from penstock.cluster.closing import close_fronts
from penstock.cluster.config import ClusterIdentity
from penstock.cluster.controller import ControllerSpec
from penstock.cluster.discovery import node_address
from penstock.cluster.editions import counts_of, edition_of
from penstock.cluster.fleet_view import LinkedFleet
from penstock.cluster.generation import Generator, open_generator
from penstock.cluster.grpc_front.deployment import GrpcMethods
from penstock.cluster.grpc_front.proxy_watch import ProxyWatch
from penstock.cluster.grpc_front.server import GrpcServer
from penstock.cluster.grpc_front.servicer import GenerationServicer
from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.ingress.app import Ingress, build_app
from penstock.cluster.ingress.exchange import Receive, Send
from penstock.cluster.ingress.key_watch import KeyWatch
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import ingress_settings
from penstock.cluster.ledger.recorder import Ledger, followed
from penstock.cluster.live_settings import live_pools
from penstock.cluster.logs import begin_logs
from penstock.cluster.membership import Membership
from penstock.cluster.metrics import Metrics
from penstock.cluster.model_directory import describe
from penstock.cluster.settings import ClusterConfig, PoolSettings
from penstock.cluster.startup_report import generation_lines
from penstock.cluster.supervision import StartError
from penstock.cluster.text import load_text
from penstock.cluster.tracing import observing, open_tracer
from penstock.workers.errors import ConfigError
from penstock.workers.priority import take_normal_priority
from penstock.workers.tls import open_peer_tls, server_context, server_pair

log = logging.getLogger(__name__)

LAUNCHED_DRAIN_S = 5.0  # `penstock serve` ends with its terminal
READY_TIMEOUT_S = 60.0
LINK_S = 5.0  # time to find workers that serve already
ADAPTERS_S = 30.0  # longest wait for the first look at all adapters


@dataclass(frozen=True, slots=True)
class IngressSpec:
    """What one ingress replica is made of. Without `identity` it belongs to the cluster named after its application."""

    config: ClusterConfig
    identity: ClusterIdentity | None = None
    node: str = ""  # address of the node it must run on; empty = any

    @property
    def drain_s(self) -> float:
        """How long answers under way get when the replica ends."""
        return LAUNCHED_DRAIN_S if self.identity is not None else self.config.health.drain_s


class IngressReplica(GrpcMethods):
    """See the module's docstring."""

    async def __init__(self, spec: IngressSpec) -> None:  # type: ignore[misc]  # Serve awaits it, on the serving loop
        self._spec = spec
        config = spec.config
        self._edition = edition_of(config)
        model = describe(config.runner, config.weights)
        front = config.front
        text = load_text(model, front.skip_tokenizer_init, config.scheduler.max_model_len, front.tool_call_parser)
        begin_logs(config.logs, f"ingress-{os.getpid()}")
        take_normal_priority()
        if spec.identity is None and config.tls.cert_file:
            log.warning("tls is for our own listeners; Serve's proxies speak as their own options say (http_options)")
        if spec.identity is None:  # `penstock serve` says it on its terminal
            for line in generation_lines(model, config.front.generation_config):
                log.info(line)
        metrics = Metrics(config.model_name, config.front.metrics_aliases, config.router.placement.policy)
        self._tracer = tracer = open_tracer(config.tracing)
        metrics.watch_spans(lambda: 0 if tracer is None else tracer.dropped)
        ledger = Ledger(config.ledger.share, metrics.violated) if config.ledger.share > 0 else None
        self._wanted: PoolSettings | None = None
        self._fleet_changed = asyncio.Event()
        self._work: set[asyncio.Future[None]] = set()
        context = serve.get_replica_context()
        attendant = Attendant(
            context.replica_tag,
            self._edition.key,
            own_url(config),
            config.front.served_model_name,
            bool(config.front.api_key or config.front.api_keys_file),
        )
        self._membership = Membership(controller_spec(spec, context.app_name), attendant)
        key = spec.identity.key if spec.identity is not None else await self._membership.join()
        self._generator: Generator = open_generator(
            config.router,
            key,
            lease_s=config.health.router_lease_s,
            observe=observing(metrics, self._tracer, ledger),
            on_fleet_change=self._fleet_changed.set,
            tls=open_peer_tls(config.tls),
        )
        self._fleet = LinkedFleet(self._generator.links)
        settings = ingress_settings(config, model)
        self._app: Ingress = build_app(
            settings, text, followed(ledger, self._generator), metrics, self._fleet, self._tracer
        )
        await self._follow_files(settings.adapters)
        self.grpc_servicer = GenerationServicer(self._app.service, self._fleet, self._tracer)
        self.grpc_proxies = ProxyWatch()
        self._grpc: GrpcServer | None = None
        self._listeners: list[Listener] = []
        shared = spec.identity is None or config.ray.ingress_replicas > 1
        if config.front.grpc_port:
            pair, port = server_pair(config.tls), config.front.grpc_port
            self._grpc = GrpcServer(self.grpc_servicer, config.limits, config.front.host, port, shared, pair)
            if spec.identity is not None:
                await self._grpc.start()
        self._listeners = [*self._bind(config, shared)]
        if spec.identity is not None:
            for listener in self._listeners:
                listener.start()
        self._follower = asyncio.ensure_future(self._membership.follow(self._generator.links.update))

    async def _follow_files(self, adapters: Adapters) -> None:
        """Keys and adapters: what is read soon is there for the first request, and nothing keeps us from serving."""
        keys = self._spec.config.front.api_keys_file
        if keys:
            watch = KeyWatch(Path(keys), self._app.service.access)
            self._work.add(asyncio.ensure_future(watch.follow()))
        if adapters.enabled:
            self._work.add(asyncio.ensure_future(adapters.follow()))
            with suppress(TimeoutError):
                async with asyncio.timeout(ADAPTERS_S):
                    await adapters.looked.wait()

    def _bind(self, config: ClusterConfig, shared: bool) -> Iterator[Listener]:
        """The public listener and that of the operators, as far as they are wanted."""
        front, limits, drain_s = config.front, config.limits, self._spec.drain_s
        tls = server_context(config.tls)
        if front.port:
            yield Listener(self._app, front.host, front.port, shared=shared, drain_s=drain_s, limits=limits, tls=tls)
        if front.admin == "apart":
            host, port = front.admin_host, front.operators_port
            operators = Listener(
                self._app.operators, host, port, shared=shared and port > 0, drain_s=drain_s, limits=limits, tls=tls
            )
            log.info("/metrics and /status are at %s, port %d", host, operators.port)
            yield operators

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve's proxies talk to."""
        return Mounted(self._app)

    async def reconfigure(self, user_config: Any) -> None:
        """Serve's word about the pool sizes. Later ones take effect beside this call, which must not hold up requests.

        A mistake in the first one ends the replica with ConfigError; in a later one it is logged and the pools stay.
        """
        if self._wanted is None:
            await self._bring_up(live_pools(self._spec.config, user_config))
            return
        try:
            pools = live_pools(self._spec.config, user_config)
        except ConfigError:
            log.exception("user_config is wrong; the pools stay as they are")
            return
        self._wanted = pools
        work = asyncio.ensure_future(self._rescale(pools))
        self._work.add(work)
        work.add_done_callback(self._work.discard)

    async def check_health(self) -> None:
        """Serve's question; an exception makes it start another replica. The first one comes before any request."""
        if self._wanted is None and self._spec.identity is None:
            await self._bring_up(self._spec.config.pools)
        if self._follower.done() or not all(listener.serving for listener in self._listeners):
            raise RuntimeError("an HTTP server or the controller's follower has ended")

    async def __del__(self) -> None:  # Serve awaits it when the replica is to end, after what came by its proxies
        await close_fronts(self._fleet, self._generator, self._listeners, self._grpc, self._spec.drain_s)
        self._follower.cancel()
        for work in self._work:
            work.cancel()
        await self._membership.leave()
        await self._generator.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

    async def _bring_up(self, pools: PoolSettings) -> None:
        """Have workers, see that they serve, and only then listen. Raises StartError.

        Where the edition has served before, missing workers hold nothing up: requests are refused with Retry-After.
        """
        settled = await self._membership.apply(self._edition, counts_of(pools))
        if settled.problem:
            self._follower.cancel()
            await self._membership.leave()
            raise StartError(settled.problem)
        try:
            async with asyncio.timeout(LINK_S if settled.established else READY_TIMEOUT_S):
                while self._fleet.unready():
                    self._fleet_changed.clear()
                    await self._fleet_changed.wait()
        except TimeoutError:
            if not settled.established:
                raise StartError(f"the workers run but cannot be reached: {self._fleet.unready()}") from None
            log.warning("back without workers: %s", self._fleet.unready())
        self._wanted = pools
        for listener in self._listeners:
            listener.start()
        if self._grpc is not None:
            await self._grpc.start()

    async def _rescale(self, pools: PoolSettings) -> None:
        settled = await self._membership.apply(self._edition, counts_of(pools), patient=True)
        if settled.problem:
            log.error("the pools are not what was asked for: %s", settled.problem)


class Mounted:
    """The application behind Serve's proxies: paths lose the route prefix, and Serve sends the request's id itself."""

    def __init__(self, app: Ingress) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        root, path = scope.get("root_path", ""), scope.get("path", "")
        if root and path.startswith(root):
            scope = {**scope, "path": path[len(root) :] or "/"}

        async def send_on(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message.get("headers", ()) if name != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_on)


def controller_spec(spec: IngressSpec, app_name: str) -> ControllerSpec:
    """The controller that an ingress of this spec belongs to, or creates."""
    health = spec.config.health
    if spec.identity is not None:
        return ControllerSpec(spec.identity, app_name, True, health.worker_lease_s, logs=spec.config.logs)
    name = spec.config.ray.cluster_name or app_name
    identity = ClusterIdentity(name, secrets.token_hex(32))
    return ControllerSpec(
        identity, app_name, False, health.worker_lease_s, drain_s=health.drain_s, logs=spec.config.logs
    )


def own_url(config: ClusterConfig) -> str:
    """Where this process's own listener can be reached; empty without one."""
    host, port = config.front.host, config.front.port
    if not port:
        return ""
    host = node_address() if host in ("0.0.0.0", "::") else host
    return f"{config.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
