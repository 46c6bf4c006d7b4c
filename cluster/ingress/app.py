"""The HTTP application: routes, headers, limits, errors; what the routes mean is `service.py`'s.

`build_app` makes one ASGI application per ingress process; uvicorn runs it in tests, our listener in production. It
is written on ASGI directly: one exact table of routes, and nothing between a token and the socket.

A generating request: check headers and key -> count it -> read the body -> parse and tokenise -> run -> answer.
Nothing is sent before the first token is there, so refusals keep their status; after it, a failure is an `error`
event and a broken connection. A caller who leaves cancels all of its choices.

Headers that callers may send: `authorization`, `x-request-id`, `traceparent`, `x-penstock-timings: 1` (how long each
stage took), `x-penstock-debug: fields` (names of fields that were ignored), `x-penstock-ttft-target: SECONDS` (refuse
at once what would wait longer for its first token).
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, MutableMapping
from importlib import metadata
from typing import Any

from penstock.cluster.ingress.errors import HttpProblem, problem_of
from penstock.cluster.ingress.exchange import Disconnected, Exchange, Receive, Send, SlowReader
from penstock.cluster.ingress.gate import (
    MODEL_PREFIX,
    ROUTES,
    UNKNOWN,
    Route,
    Side,
    admit,
    labels_of,
    on_side,
    route_of,
)
from penstock.cluster.ingress.generator import Generator
from penstock.cluster.ingress.keys import Caller
from penstock.cluster.ingress.openapi import openapi_document
from penstock.cluster.ingress.openapi_bodies import Kind, Shape
from penstock.cluster.ingress.service import Job, OpenAIService
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.stopwatch import Stopwatch
from penstock.cluster.ingress.tokenize_request import tokenizer_info
from penstock.cluster.metrics import CONTENT_TYPE, Metrics
from penstock.cluster.status import FleetView
from penstock.cluster.text import TextCodec
from penstock.cluster.tracing import IngressTracer
from penstock.workers.errors import RefusedError, RequestError

log = logging.getLogger(__name__)
VERSION = metadata.version("penstock")
TTFT_TARGET = b"x-penstock-ttft-target"
_SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?\Z")
IGNORED_FIELDS = b"x-penstock-ignored-fields"


def build_app(
    settings: IngressSettings,
    text: TextCodec,
    generator: Generator,
    metrics: Metrics,
    fleet: FleetView,
    tracer: IngressTracer | None = None,
) -> Ingress:
    """The application over one generator. `fleet` tells `/status`, `/ready` and the metrics page about the workers."""
    metrics.watch(fleet)
    return Ingress(OpenAIService(settings, text, generator, metrics), fleet, tracer)


class Ingress:
    """An ASGI application; `operators` is another one, where what operators ask for is apart.

    `service` is there for other fronts of the process: same limits, same keys.
    """

    def __init__(self, service: OpenAIService, fleet: FleetView, tracer: IngressTracer | None = None) -> None:
        self.service = service
        self._settings = service.settings
        self._fleet = fleet
        self._tracer = tracer
        shape = Shape(self._settings.limits, service.text.vocab_size, self._settings.max_model_len)
        self._side = Side.PUBLIC if self._settings.operators_apart else Side.WHOLE
        adapters = self._settings.adapters.enabled
        self._switches = {"tokenizer_info": self._settings.enable_tokenizer_info}
        self._switches |= {"load_lora_adapter": adapters, "unload_lora_adapter": adapters}
        described = {
            route.name: on_side(route, self._side) and self._switches.get(route.name, True) for route in ROUTES.values()
        }
        self._document = json.dumps(openapi_document(shape, VERSION, described)).encode()
        self._plain: dict[str, Callable[[], bytes]] = {
            "health": lambda: b'{"status":"ok"}',
            "live": lambda: b'{"status":"alive"}',
            "version": lambda: json.dumps({"version": VERSION}).encode(),
            "openapi": lambda: self._document,
            "status": lambda: json.dumps(self._status()).encode(),
            "tokenizer_info": lambda: json.dumps(tokenizer_info(service.text)).encode(),
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        await self._enter(scope, receive, send, self._side)

    async def operators(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """The application of the listener for operators."""
        await self._enter(scope, receive, send, Side.OPERATORS)

    async def _enter(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, side: Side) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._exchange(Exchange(scope, receive, send, self._settings.limits), side)
        else:  # websockets: refused by closing before the handshake is accepted
            await send({"type": "websocket.close", "code": 1008})

    async def _exchange(self, exchange: Exchange, side: Side) -> None:
        route = route_of(exchange.path)
        if not on_side(route, side) or (route.switched and not self._switches[route.name]):
            route = UNKNOWN
        watch = Stopwatch(self.service.metrics, self._tracer)
        try:
            exchange.check_headers()
            watch.opened(
                exchange.request_id, exchange.single(b"traceparent"), exchange.asks(b"x-penstock-timings", b"1")
            )
            caller = admit(exchange, route, self.service.access)
            await self._serve(exchange, route, caller, watch)
        except Disconnected as left:
            exchange.status = 499
            if isinstance(left, SlowReader):
                self.service.metrics.slow_readers.inc()
                log.info("request %s was cancelled: its caller did not read for too long", exchange.id)
        except asyncio.CancelledError:
            exchange.status = exchange.status or 499
            raise
        # The edge of the process: whatever went wrong with one request becomes its answer and touches no other.
        except Exception as error:
            if not isinstance(error, (HttpProblem, RequestError, RefusedError)):
                log.exception("a request to %s failed", route.name)
            await exchange.refuse(problem_of(error))
        finally:
            watch.close(*labels_of(route, exchange.method), exchange.status)

    async def _serve(self, exchange: Exchange, route: Route, caller: Caller | None, watch: Stopwatch) -> None:
        plain = self._plain.get(route.name)
        if plain is not None:
            await exchange.respond(200, plain())
        elif caller is None:
            await self._ready(exchange)
        elif route.name == "metrics":
            await exchange.respond(200, self.service.metrics.page(), CONTENT_TYPE.encode())
        elif route.name == "models":
            await exchange.respond(200, json.dumps(self.service.models.all(caller)).encode())
        elif route.name == "model":
            found = self.service.models.one(exchange.path[len(MODEL_PREFIX) :], caller)
            await exchange.respond(200, json.dumps(found).encode())
        else:
            watch.tenant = caller.tenant
            await self._post(exchange, Kind(route.name), caller, watch)

    async def _post(self, exchange: Exchange, kind: Kind, caller: Caller, watch: Stopwatch) -> None:
        service = self.service
        with service.admit(caller, exchange.id) as visit:
            raw = await exchange.read_body()
            watch.received()
            if kind in (Kind.TOKENIZE, Kind.DETOKENIZE):
                await exchange.respond(200, json.dumps(await service.transform(kind, raw, visit)).encode())
                return
            if kind in (Kind.LOAD_ADAPTER, Kind.UNLOAD_ADAPTER):
                await exchange.respond(200, json.dumps(await service.change_adapters(kind, raw)).encode())
                return
            job = await service.prepare(kind, raw, visit, watch, _ttft_target(exchange))
            if job.ignored and exchange.asks(b"x-penstock-debug", b"fields"):
                exchange.extra.append((IGNORED_FIELDS, ",".join(job.ignored).encode()))
            await exchange.run_while_connected(self._answer(exchange, job))
            watch.finish(job.tally)

    async def _answer(self, exchange: Exchange, job: Job) -> None:
        if not job.call.output.stream:
            answer = await self.service.complete(job)
            await exchange.respond(200, answer, extra=job.watch.headers())
            return

        async def write(events: bytes) -> None:
            if not exchange.status:
                exchange.extra += job.watch.headers()
            await exchange.write(events)

        await self.service.stream(job, write)
        await exchange.end_stream()

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._fleet.unready()
        if reason:
            raise HttpProblem(503, "service_unavailable", reason, code="not_ready", retry_after_s=1.0)
        await exchange.respond(200, b'{"status":"ready"}')

    def _status(self) -> dict[str, Any]:
        workers = [worker.as_json() for worker in self._fleet.workers()]
        reason = self._fleet.unready()
        return {
            "models": list(self._settings.model_names),
            "vocab_size": self.service.text.vocab_size,
            "max_model_len": self._settings.max_model_len,
            "block_size": self._settings.block_size,
            "ready": not reason,
            "reason": reason,
            "adapters": [listed.as_json() for listed in self._settings.adapters.listed()],
            "workers": workers,
        }


def _ttft_target(exchange: Exchange) -> float | None:
    """The caller's own target; None where none is stated. Raises HttpProblem 400."""
    if not exchange.headers(TTFT_TARGET):
        return None
    stated = exchange.single(TTFT_TARGET)
    if not _SECONDS.match(stated) or not float(stated):
        message = "x-penstock-ttft-target must be a number of seconds above zero"
        raise HttpProblem(400, "invalid_request_error", message, "x-penstock-ttft-target", "invalid_value")
    return float(stated)


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
