"""The HTTP application over real oracle worker processes, with everything that looks on: metrics, spans, logs.

The application runs on the test's loop and is asked without a socket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from fakes.worker_process import VOCAB, oracle_settings

from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.local import LocalCluster
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.cluster.tracing import observing, open_tracer
from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.workers.protocol import Role
from penstock.workers.settings import LogSettings, RunnerSettings, TracingSettings, WorkerSettings

MODEL = "oracle-model"
PREFILL, DECODE, MIXED = Role.PREFILL, Role.DECODE, Role.MIXED
ALWAYS_SPLIT = RouterSettings(PlacementSettings(local_prefill_tokens=0))  # no prompt is computed where others decode


class ObservedCluster:
    """An async context manager over one worker per role given."""

    def __init__(
        self,
        roles: Sequence[Role],
        *,
        tracing: TracingSettings | None = None,
        logs: LogSettings | None = None,
        log_file: Path | None = None,
        step_s: float = 0.0,
        settings: IngressSettings | None = None,
        router: RouterSettings | None = None,
    ) -> None:
        tracing = dataclasses.replace(tracing or TracingSettings(), export_interval_s=0.1)
        self.tracer = open_tracer(tracing)
        self.metrics = Metrics(MODEL, "vllm")
        runner = RunnerSettings(kind="oracle", oracle_vocab=VOCAB, oracle_step_s=step_s)
        workers: list[WorkerSettings] = [
            oracle_settings(
                f"{role.value}-{index}", role=role, runner=runner, tracing=tracing, logs=logs or LogSettings()
            )
            for index, role in enumerate(roles)
        ]
        observe = observing(self.metrics, self.tracer)
        self.cluster = LocalCluster(workers, router, log_file=log_file, observe=observe)
        self.settings = settings or IngressSettings(model_names=(MODEL,), max_model_len=1024)
        self.http: httpx.AsyncClient

    async def __aenter__(self) -> ObservedCluster:
        await self.cluster.start()
        self.app = build_app(
            self.settings,
            TextCodec(VOCAB, ()),
            self.cluster.generator,
            self.metrics,
            self.cluster.fleet,
            self.tracer,
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://observed", timeout=30.0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.http.aclose()
        await self.cluster.stop()
        if self.tracer is not None:
            self.tracer.close()

    async def complete(
        self, prompt: Sequence[int], headers: dict[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        return await self.http.post(
            "/v1/completions", json={"prompt": list(prompt), "max_tokens": 8, **body}, headers=headers or {}
        )

    async def scrape(self) -> str:
        return (await self.http.get("/metrics")).text
