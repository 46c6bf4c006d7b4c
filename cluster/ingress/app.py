"""The HTTP application: routes, limits, errors, and the way of a completions or chat request through the ingress.

`build_app` makes one ASGI application per ingress process; uvicorn runs it in tests, Ray Serve in production. It is
written on ASGI directly: one exact table of routes, and nothing between a token and the socket.

A generating request: check headers and key -> read and parse the body -> tokenise -> run the choices -> answer.
Nothing is sent before the first token is there, so refusals keep their status; after it, a failure is an `error`
event and a broken connection. A caller who leaves cancels all of its choices.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, MutableMapping
from typing import Any

from penstock.cluster.ingress.answer_format import AnswerFormat, ChoiceResult
from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.chat_request import parse_chat
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import ChoiceRunner, Tally, requests_of
from penstock.cluster.ingress.completion_request import parse_completion
from penstock.cluster.ingress.errors import HttpProblem, model_not_found, problem_of
from penstock.cluster.ingress.exchange import Disconnected, Exchange, Receive, Send, parse_json
from penstock.cluster.ingress.gate import MODEL_PREFIX, ROUTES, Gate, Route, route_of
from penstock.cluster.ingress.generator import Generator
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.stopwatch import Stopwatch
from penstock.cluster.metrics import CONTENT_TYPE, Metrics
from penstock.cluster.status import FleetView
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import GenerateRequest

log = logging.getLogger(__name__)
Parser = Callable[[dict[str, Any], IngressSettings, TextCodec], Call]
THREAD_ABOVE_BYTES = 8192  # larger bodies are parsed and tokenised beside the event loop


def build_app(
    settings: IngressSettings, text: TextCodec, generator: Generator, metrics: Metrics, fleet: FleetView
) -> Ingress:
    """The application over one generator. `fleet` tells `/status`, `/ready` and the metrics page about the workers."""
    metrics.watch(fleet)
    return Ingress(settings, text, generator, metrics, fleet)


class Ingress:
    """An ASGI application."""

    def __init__(
        self, settings: IngressSettings, text: TextCodec, generator: Generator, metrics: Metrics, fleet: FleetView
    ) -> None:
        self._settings = settings
        self._text = text
        self._generator = generator
        self._metrics = metrics
        self._fleet = fleet
        self._gate = Gate(settings.api_key)
        self._open = 0
        self._created = int(time.time())

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._exchange(Exchange(scope, receive, send, self._settings.limits))
        else:  # websockets: refused by closing before the handshake is accepted
            await send({"type": "websocket.close", "code": 1008})

    async def _exchange(self, exchange: Exchange) -> None:
        route = route_of(exchange.path)
        try:
            exchange.check_headers()
            self._gate.admit(exchange, route)
            await self._serve(exchange, route)
        except Disconnected:
            exchange.status = 499
        except asyncio.CancelledError:
            exchange.status = exchange.status or 499
            raise
        # The edge of the process: whatever went wrong with one request becomes its answer and touches no other.
        except Exception as error:
            if not isinstance(error, (HttpProblem, RequestError, RefusedError)):
                log.exception("a request to %s failed", route.name)
            await exchange.refuse(problem_of(error))
        finally:
            self._metrics.http_requests.labels(route.name, str(exchange.status)).inc()

    async def _serve(self, exchange: Exchange, route: Route) -> None:
        if route is ROUTES["/v1/completions"]:
            await self._generate(exchange, parse_completion, chat=False)
        elif route is ROUTES["/v1/chat/completions"]:
            await self._generate(exchange, parse_chat, chat=True)
        elif route.name == "health":
            await exchange.respond(200, b'{"status":"ok"}')
        elif route.name == "ready":
            await self._ready(exchange)
        elif route.name == "metrics":
            await exchange.respond(200, self._metrics.page(), CONTENT_TYPE.encode())
        elif route.name == "status":
            await exchange.respond(200, json.dumps(self._status()).encode())
        else:
            await exchange.respond(200, json.dumps(self._models(exchange.path)).encode())

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
            "vocab_size": self._text.vocab_size,
            "ready": not reason,
            "reason": reason,
            "workers": workers,
        }

    def _models(self, path: str) -> dict[str, Any]:
        entries = {
            name: {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "penstock",
                "root": self._settings.root or name,
                "parent": None,
                "max_model_len": self._settings.max_model_len,
            }
            for name in self._settings.model_names
        }
        if not path.startswith(MODEL_PREFIX):
            return {"object": "list", "data": list(entries.values())}
        name = path[len(MODEL_PREFIX) :]
        if name not in entries:
            raise model_not_found(name)
        return entries[name]

    async def _generate(self, exchange: Exchange, parse: Parser, chat: bool) -> None:
        watch = Stopwatch(self._metrics)
        if self._open >= self._settings.limits.max_open_requests:
            raise HttpProblem(
                503, "service_unavailable", "too many open requests", code="overloaded", retry_after_s=1.0
            )
        self._open += 1
        self._metrics.requests_open.inc()
        try:
            raw = await exchange.read_body()
            answer_id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(16)}"
            if len(raw) > THREAD_ABOVE_BYTES:
                call, requests = await asyncio.to_thread(self._prepare, raw, parse, answer_id)
            else:
                call, requests = self._prepare(raw, parse, answer_id)
            tally = Tally(call)
            runner = ChoiceRunner(call, tuple(requests), self._text, self._generator, tally)
            answer = AnswerFormat(call, self._text, chat, answer_id, int(time.time()))
            await exchange.run_while_connected(self._answer(exchange, runner, answer, watch))
            watch.finish(tally)
        finally:
            self._open -= 1
            self._metrics.requests_open.dec()

    def _prepare(self, raw: bytes, parse: Parser, answer_id: str) -> tuple[Call, list[GenerateRequest]]:
        call = parse(parse_json(raw), self._settings, self._text)
        return call, requests_of(call, answer_id, self._settings)

    async def _answer(self, exchange: Exchange, runner: ChoiceRunner, answer: AnswerFormat, watch: Stopwatch) -> None:
        call, tally = runner.call, runner.tally
        shortest = min(map(len, call.prompts))
        all_at_once = not self._settings.prefix_caching or shortest < self._settings.block_size
        if call.output.stream:

            async def write(piece: Piece) -> None:
                watch.piece(piece)
                await exchange.write(answer.chunk(piece, tally))

            await runner.run(write, all_at_once)
            await exchange.write(answer.tail(tally))
            await exchange.end_stream()
            return
        results = [ChoiceResult() for _ in range(call.num_choices)]

        async def collect(piece: Piece) -> None:
            watch.piece(piece)
            results[piece.index].add(piece)

        await runner.run(collect, all_at_once)
        await exchange.respond(200, answer.whole(results, tally))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
