"""The gRPC front on a port of this machine, over a generator that follows a script; its loop runs in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from fakes.fake_generator import FakeFleet, FakeGenerator
from fakes.tiny_model import CONTEXT

from penstock.cluster.grpc_front.server import GrpcServer
from penstock.cluster.grpc_front.servicer import GenerationServicer
from penstock.cluster.ingress.service import OpenAIService
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.settings import TlsSettings
from penstock.workers.tls import server_pair


class FakeGrpcServer:
    """A context manager; `address` is host:port."""

    def __init__(
        self,
        codec: TextCodec,
        generator: FakeGenerator,
        fleet: FakeFleet | None = None,
        tls: TlsSettings | None = None,
        **settings: Any,
    ):
        self._tls = tls or TlsSettings()
        self.settings = IngressSettings(("tiny",), CONTEXT, **settings)
        self.metrics = Metrics()
        self.service = OpenAIService(self.settings, codec, generator, self.metrics)
        self.servicer = GenerationServicer(self.service, fleet or FakeFleet())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FakeGrpcServer:
        self._thread.start()
        self._server = self.run(self._start)
        self.address = f"127.0.0.1:{self._server.port}"
        return self

    def run(self, work: Callable[[], Any]) -> Any:
        """A coroutine function's result, run on the server's loop."""
        pending: Future[Any] = asyncio.run_coroutine_threadsafe(work(), self._loop)
        return pending.result(20)

    async def _start(self) -> GrpcServer:
        pair = server_pair(self._tls)
        server = GrpcServer(self.servicer, self.settings.limits, "127.0.0.1", 0, shared=False, tls=pair)
        await server.start()
        return server

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.run(lambda: self._server.stop(0.5))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
