"""A whole split cluster under a virtual clock: the serving router over simulated workers.

The router, the request path, the engine, the scheduler, the prefix cache and the oracle are the code that serves;
only wires, clocks and block transport are stand-ins (a message takes `latency_s`, a transfer `transfer_s`). Workers
can be killed at any moment, restarted, frozen and drained.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from fakes.loopback_transfer import LoopbackFabric
from fakes.virtual_worker import ROUTER, VOCAB, Shape, VirtualWorker

from penstock.cluster.channel import RequestChannel
from penstock.router.emission import Emission
from penstock.router.journey import RequestReport
from penstock.router.request_path import serve_request
from penstock.router.router import Router
from penstock.router.settings import RouterSettings
from penstock.workers.engine import Drain
from penstock.workers.inbox import Attached, Detached
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import GenerateRequest, RequestSnapshot, Role, SamplingParams

ROOT = b"\2" * 32
__all__ = ["Served", "Shape", "VirtualCluster", "oracle_request"]


@dataclass
class Served:
    """What became of one request."""

    request: GenerateRequest
    emission: Emission
    report: RequestReport | None = None
    error: BaseException | None = None
    begun_at: float = 0.0
    done_at: float = 0.0

    @property
    def right(self) -> bool:
        """Whole, and what the oracle demands."""
        wanted = expected_tokens(self.request.prompt, self.request.sampling, VOCAB)
        return self.emission.ended and tuple(self.emission.tokens) == wanted

    @property
    def a_prefix(self) -> bool:
        """Whatever came out is the start of the right text."""
        wanted = expected_tokens(self.request.prompt, self.request.sampling, VOCAB)
        return tuple(self.emission.tokens) == wanted[: self.emission.count]


class VirtualCluster:
    """The fleet and the world of its request paths (`router/port.py:Port`)."""

    def __init__(
        self, roles: dict[str, Role], shape: Shape | None = None, settings: RouterSettings | None = None
    ) -> None:
        self.shape = shape or Shape()
        self.fabric = LoopbackFabric()
        self.reports: list[RequestReport] = []
        self.router = Router(settings or RouterSettings(), seed=1, observe=self.reports.append)
        self.workers: dict[str, VirtualWorker] = {}
        self.poison: set[tuple[int, ...]] = set()
        self.kills: list[tuple[float, str]] = []
        self.roles = roles
        self._incarnations: dict[str, int] = {}
        self._sessions = itertools.count(1)
        self._pumping = False

    async def __aenter__(self) -> VirtualCluster:
        for worker_id in self.roles:
            self.start(worker_id)
        self._watcher = asyncio.ensure_future(self._watch())
        await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watcher.cancel()
        for worker in self.workers.values():
            for task in worker.tasks:
                task.cancel()
            worker.storage.close()

    # --- port -----------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def signal(self) -> VirtualSignal:
        return VirtualSignal()

    def open_channel(self, emission: Emission) -> RequestChannel:
        return RequestChannel(self, emission)

    def post_to(self, worker_id: str) -> VirtualWorker | None:
        worker = self.workers.get(worker_id)
        return worker if worker is not None and worker.attached else None

    # --- fleet ----------------------------------------------------------------------------------------------------

    def start(self, worker_id: str) -> VirtualWorker:
        incarnation = self._incarnations[worker_id] = self._incarnations.get(worker_id, 0) + 1
        worker = VirtualWorker(self, worker_id, self.roles[worker_id], incarnation)
        self.workers[worker_id] = worker
        worker.attached = True
        self.router.worker_joined(worker.welcome, self.now())
        worker.post(RequestSnapshot())
        return worker

    def kill(self, worker_id: str, restart_s: float | None = None) -> None:
        """SIGKILL: nothing more comes from it, peers' sessions break, the link notices at once."""
        worker = self.workers[worker_id]
        if not worker.alive:
            return
        self.kills.append((self.now(), worker_id))
        worker.alive = False
        for task in worker.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for session_id, sending in worker.transfer.outgoing.items():
            self.fabric.lose(sending.grant.address, session_id)
        worker.transfer.outgoing.clear()
        worker.transfer.incoming.clear()
        del self.fabric.ports[worker.transfer.address]
        worker.storage.close()
        self.pump_later()
        self.later(self.shape.latency_s, lambda: self._cut(worker, "killed"))
        if restart_s is not None:
            self.later(restart_s, lambda: self.start(worker_id))

    def break_stream(self, worker_id: str, back_s: float) -> None:
        """The connection breaks: the router loses sight of the worker, which drops its work and goes on living."""
        worker = self.workers[worker_id]
        if not (worker.alive and worker.attached):
            return
        worker.engine.post(ROUTER, Detached())
        self._cut(worker, "the stream broke")
        self.later(back_s, lambda: self._attach_again(worker))

    def _attach_again(self, worker: VirtualWorker) -> None:
        if worker.alive and not worker.attached:
            worker.engine.post(ROUTER, Attached(1e9))
            worker.attached = True
            self.router.worker_joined(worker.welcome, self.now())
            worker.post(RequestSnapshot())

    def drain(self, worker_id: str) -> None:
        self.workers[worker_id].post(Drain())

    def _cut(self, worker: VirtualWorker, reason: str) -> None:
        if not worker.attached:
            return
        worker.attached = False
        self.router.worker_lost(worker.worker_id, reason, self.now())
        seats, worker.seats = list(worker.seats.values()), {}
        for seat in seats:
            seat.lost(reason)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            for worker_id, reason in self.router.overdue(self.now()):
                self._cut(self.workers[worker_id], reason)
            self.router.check_integrity()

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(delay_s, call)

    def pump_later(self) -> None:
        """Whatever has been offered arrives after the transfer time."""
        if not self._pumping:
            self._pumping = True
            self.later(self.shape.transfer_s, self._pump)

    def _pump(self) -> None:
        self._pumping = False
        self.fabric.pump()
        for worker in self.workers.values():
            worker.wake()

    def sessions(self) -> int:
        """A range of session ids nobody else uses."""
        return next(self._sessions) << 32

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, on_progress: Callable[[], None] | None = None) -> asyncio.Task[Served]:
        return asyncio.ensure_future(self.serve(request, on_progress))

    async def serve(self, request: GenerateRequest, on_progress: Callable[[], None] | None = None) -> Served:
        served = Served(request, Emission.for_request(request, on_progress), begun_at=self.now())
        try:
            served.report = await serve_request(request, self, self.router, served.emission)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            served.error = error
        served.emission.check_integrity()
        served.done_at = self.now()
        return served

    async def assert_quiet(self) -> None:
        """Some seconds after the last request nothing is held anywhere, at no worker and not by the router."""
        await asyncio.sleep(3.0)
        self.router.check_integrity()
        assert self.router.admission.inside == self.router.admission.waiting == self.router.attempts.homeless == 0
        for view in self.router.fleet.workers.values():
            assert (view.sequences, view.prefill_tokens, view.blocks) == (0, 0, 0), view
        for worker in self.workers.values():
            if worker.alive:
                worker.scheduler.check_integrity()
                stats = worker.scheduler.stats()
                held = (stats.running, stats.waiting, stats.sending, stats.quarantined_blocks)
                assert held == (0, 0, 0, 0), (worker.worker_id, stats)
                assert stats.free_blocks == self.shape.num_blocks
                assert not worker.seats


class VirtualSignal:
    """See `router/port.py:Signal`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


def oracle_request(
    number: int,
    prompt_tokens: int = 40,
    max_tokens: int = 24,
    *,
    prompt: tuple[int, ...] | None = None,
    **fields: object,
) -> GenerateRequest:
    """A request whose right answer `Served.right` knows."""
    if prompt is None:
        prompt = tuple((number * 7919 + index * index * 31 + index) % VOCAB for index in range(prompt_tokens))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=number)
    request = GenerateRequest(
        f"r{number}", prompt, sampling, prefix_root=ROOT, prefix_digests=chain_digests(ROOT, prompt, 4)
    )
    return replace(request, **fields)  # type: ignore[arg-type]
