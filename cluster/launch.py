"""Brings a cluster up and takes it down: Ray, the controller with its workers, the HTTP ingress, then waiting.

`penstock serve` calls `serve`; tests call `start_cluster` and `Cluster.stop`. Everything that was started is ended
again: on Ctrl-C or SIGTERM, on a failure half-way, and by leases when this process is killed.

    1. Ray         a private head, or the cluster at `ray.address`
    2. workers     one detached controller, which starts the worker actors      } at the same time
    3. ingress     one Serve application with the HTTP server                   }
    4. ready       `/ready` answers
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import FrameType
from typing import Any

import httpx
import ray
from ray import serve as ray_serve
from ray.exceptions import GetTimeoutError, RayError

from penstock.cluster.config import ClusterIdentity
from penstock.cluster.controller import ControllerSpec, create_controller
from penstock.cluster.discovery import ClusterAddress, node_address
from penstock.cluster.editions import counts_of, edition_of
from penstock.cluster.fleet_plan import Settled
from penstock.cluster.ingress_replica import IngressSpec
from penstock.cluster.listen_address import settle
from penstock.cluster.model_directory import describe
from penstock.cluster.ray_runtime import RayRuntime
from penstock.cluster.serve_app import build_serve_app
from penstock.cluster.settings import ClusterConfig
from penstock.cluster.startup_report import StartupReport
from penstock.cluster.supervision import StartError
from penstock.cluster.text import load_text
from penstock.cluster.trust import pinned
from penstock.cluster.widths import check_nodes
from penstock.workers.process_limits import LEAST_THREADS, require_threads

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 120.0
POLL_S = 0.1
RENEW_S = 2.0
LEAST_RAY_THREADS = 256  # of a private head with controller and ingress; with fewer it hangs, or aborts
STOP_DRAIN_S = 5.0
STOP_TIMEOUT_S = 20.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVERY_INTERFACE = ("0.0.0.0", "::")


class Interrupted(BaseException):
    """A signal asked us to end. Not an Exception: nothing on the way may take it for a failure."""


def serve(config: ClusterConfig) -> None:
    """Run a cluster until a signal ends it. Raises ConfigError, ModelError or StartError when it does not come up."""
    report = StartupReport()
    stop = threading.Event()
    with _signals(stop):
        cluster = None
        try:
            cluster = start_cluster(config, report, stop)
            cluster.wait(stop)
            report.note("Shutting down")
        except Interrupted:
            report.note("Interrupted")
        finally:
            report.end_loading()
            if cluster is not None:
                cluster.stop()


def start_cluster(config: ClusterConfig, report: StartupReport, stop: threading.Event) -> Cluster:
    """Start everything and return when requests are served; ends what it started if it cannot."""
    config = settle(config)
    # Read here only to fail early and clearly; the ingress reads it again in its own process.
    model = describe(config.runner, config.weights)
    load_text(model, config.front.skip_tokenizer_init, config.scheduler.max_model_len, config.front.tool_call_parser)
    report.configuration(config)
    report.generation(model, config.front.generation_config)
    cluster = Cluster(config, report, stop)
    try:
        cluster.start()
    except BaseException as error:
        cluster.stop(failed=not isinstance(error, Interrupted))
        raise
    return cluster


class Cluster:
    """One running cluster, as the process that launched it holds it."""

    def __init__(self, config: ClusterConfig, report: StartupReport, stop: threading.Event) -> None:
        self.config = config
        self.identity = ClusterIdentity(secrets.token_hex(8), secrets.token_hex(32))
        self._report = report
        self._stop = stop
        self._runtime = RayRuntime(config.ray.address)
        self._controller: Any = None
        self._renewed = 0.0
        self._ingress: Future[None] | None = None
        self._waiting = ""
        self._served_at = ""
        self._owns_serve = False
        self._served = False

    @property
    def url(self) -> str:
        """Where the HTTP server listens."""
        host = self.config.front.host
        if host in EVERY_INTERFACE and self._runtime.private:  # every one; this one is sure to reach it
            host = "127.0.0.1"
        elif host in EVERY_INTERFACE and self._served_at:
            return self._served_at
        return f"{self.config.scheme}://{f'[{host}]' if ':' in host else host}:{self.config.front.port}"

    @property
    def app_name(self) -> str:
        """The Serve application's name."""
        return f"penstock-{self.identity.cluster_id}"

    def start(self) -> None:
        """Bring everything up. Raises StartError, ConfigError, or Interrupted."""
        report, config = self._report, self.config
        report.begin_loading(steps=4)
        if self._runtime.private:
            require_threads(LEAST_RAY_THREADS + LEAST_THREADS * config.pools.ranks, "a private Ray with its workers")
        with report.phase("Ray"):
            self._runtime.start(_logical_cpus(config))
            if not self._runtime.private:
                check_nodes(config, [node["Resources"] for node in ray.nodes() if node["Alive"]])  # type: ignore[no-untyped-call]
        report.step("Ray runs")
        with report.phase("workers and ingress"):
            self._controller = create_controller(
                ControllerSpec(self.identity, self.app_name, True, config.health.worker_lease_s, logs=config.logs)
            )
            self._ingress = in_background(self._start_ingress)
            facts = self._await_workers()
            report.step(f"{len(facts)} workers are loaded")
            self._await_ingress()
        report.step("the ingress listens")
        with report.phase("first contact"):
            self._await_ready()
        report.step("ready")
        report.end_loading()
        report.sizes(facts, config.scheduler.max_model_len)
        report.ready(self.url, config.model_name, chat=not config.front.skip_tokenizer_init)
        if config.front.admin == "apart":
            at = f"{config.front.admin_host}:{config.front.operators_port}"
            report.note(f"/metrics and /status: {config.scheme}://{at}")
        if config.front.grpc_port:
            report.note(f"gRPC: {config.front.host}:{config.front.grpc_port}, with reflection")
        self._runtime.remember_processes()
        self._served = True

    def wait(self, stop: threading.Event) -> None:
        """Keep the cluster's lease until `stop` is set. Raises StartError when the controller is gone for good."""
        misses = 0
        while not stop.wait(RENEW_S):
            try:
                ray.get(self._handle.renew.remote(), timeout=5 * RENEW_S)
                misses = 0
            except (RayError, GetTimeoutError) as error:
                misses += 1
                log.warning("the controller does not answer: %s", str(error).splitlines()[:1])
                if misses >= 5:
                    raise StartError("the cluster's controller is gone; see its log") from error

    def stop(self, failed: bool = False) -> None:
        """End the ingress, the workers, the controller and a private Ray. Safe at any stage."""
        # A private Ray that never served takes everything with it; otherwise each part is asked to end.
        if ray.is_initialized() and (self._served or not self._runtime.private):
            self._stop_ingress()
            self._stop_workers()
        self._runtime.stop(keep_logs=failed)
        if failed and self._runtime.log_folder is not None:
            self._report.note(f"The logs are in {self._runtime.log_folder}")

    # --------------------------------------------------------------------------------------------------------------

    @property
    def _handle(self) -> Any:
        if self._controller is None:
            raise StartError("the cluster has not been started")
        return self._controller

    def _start_ingress(self) -> None:
        """Start Serve and deploy. Runs beside the workers' loading; both take their time in other processes."""
        self._owns_serve = not _serve_runs()
        # No proxies: the replica listens itself. A Serve that runs here already stays as it is.
        ray_serve.start(proxy_location="Disabled", logging_config={"enable_access_log": False, "log_level": "WARNING"})
        # On another node nobody could reach a loopback address from here.
        pinned = not self._runtime.private and self.config.front.host in LOOPBACK
        spec = IngressSpec(self.config, self.identity, node=node_address() if pinned else "")
        try:
            ray_serve.run(build_serve_app(spec), name=self.app_name, route_prefix=None)
        except RuntimeError as error:  # how Serve says that the replica could not be constructed
            raise StartError(f"the ingress did not start: {error}") from error

    def _await_workers(self) -> list[dict[str, object]]:
        pending = self._handle.apply.remote(edition_of(self.config), counts_of(self.config.pools), True)
        done: list[Any] = []
        while not done:
            self._keep_going()
            done, _ = ray.wait([pending], timeout=POLL_S)
        settled: Settled = ray.get(done[0])
        if settled.problem:
            raise StartError(settled.problem)
        facts: list[dict[str, object]] = ray.get(self._handle.ready.remote())
        return facts

    def _await_ingress(self) -> None:
        if self._ingress is None:
            return
        while not self._ingress.done():
            self._keep_going()
            time.sleep(POLL_S)
        self._ingress.result()

    def _await_ready(self) -> None:
        if not self._runtime.private:
            address: ClusterAddress = ray.get(self._handle.address.remote(), timeout=READY_TIMEOUT_S)
            self._served_at = address.urls[0] if address.urls else ""
        deadline = time.monotonic() + READY_TIMEOUT_S
        reason = "no answer"
        with httpx.Client(trust_env=False, timeout=5.0, verify=pinned(self.config.tls.cert_file)) as client:
            while time.monotonic() < deadline:
                self._keep_going()
                try:
                    answer = client.get(f"{self.url}/ready")
                    if answer.status_code == 200:
                        return
                    reason = answer.text
                except httpx.HTTPError as error:
                    reason = str(error)
                time.sleep(POLL_S)
        raise StartError(f"the cluster runs but does not get ready: {reason}")

    def _keep_going(self) -> None:
        """What every wait of the start does often: hear signals, keep the lease, note new processes."""
        if self._stop.is_set():
            raise Interrupted
        if time.monotonic() - self._renewed > RENEW_S:
            self._renewed = time.monotonic()
            waiting = ray.get(self._handle.renew.remote())
            if waiting and waiting != self._waiting:
                self._report.note(f"The workers are {waiting}")
            self._waiting = waiting
            self._runtime.remember_processes()

    def _stop_ingress(self) -> None:
        with contextlib.suppress(RayError, RuntimeError, StartError, TimeoutError):
            if self._ingress is not None:
                self._ingress.result(STOP_TIMEOUT_S)
                ray_serve.delete(self.app_name)  # streams get DRAIN_S to end
            if self._owns_serve and not self._runtime.private and not ray_serve.status().applications:
                ray_serve.shutdown()  # type: ignore[no-untyped-call]

    def _stop_workers(self) -> None:
        if self._controller is not None:
            with contextlib.suppress(RayError):  # GetTimeoutError is one
                ray.get(self._controller.stop.remote(STOP_DRAIN_S), timeout=STOP_TIMEOUT_S)
            with contextlib.suppress(RayError):
                ray.kill(self._controller)


def in_background(work: Callable[[], None]) -> Future[None]:
    """Run `work` in a thread that does not keep the process alive."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the edge of the thread: whoever asks for the result gets it
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=run, name="launch", daemon=True).start()
    return outcome


def _logical_cpus(config: ClusterConfig) -> int:
    """Enough for every actor's share; threads, not Ray, divide the real cores."""
    shares = config.pools.ranks * config.ray.worker_num_cpus + config.ray.ingress_replicas * config.ray.ingress_num_cpus
    return math.ceil(shares) + 1


def _serve_runs() -> bool:
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`. Installed again after Ray, which puts in its own."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
