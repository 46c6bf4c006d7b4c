"""What the rpcs do, whichever way a call reached this process: through Serve's proxy or on our own port.

`deployment.py` and `server.py` call it with a request message and the call's metadata. Underneath is the service of
the HTTP application: the same keys, limits, parsers, metrics, traces and access log. Knows no transport. Cancelling
the task that awaits an answer, or closing the iterator of a stream, ends the work in the cluster.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from penstock.cluster.grpc_front import answers
from penstock.cluster.grpc_front.penstock_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    EmbedRequest,
    EmbedResponse,
    GenerateRequest,
    GenerateResponse,
    HealthRequest,
    HealthResponse,
    ListModelsRequest,
    ListModelsResponse,
    Model,
    StreamResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from penstock.cluster.grpc_front.problems import Metadata, RpcStatus, status_of
from penstock.cluster.grpc_front.request_bodies import (
    Unreadable,
    detokenize_body,
    embed_body,
    generate_body,
    tokenize_body,
)
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.errors import HttpProblem, problem_of
from penstock.cluster.ingress.keys import Caller
from penstock.cluster.ingress.openapi_bodies import Kind
from penstock.cluster.ingress.service import Job, OpenAIService, Visit, new_id
from penstock.cluster.ingress.stopwatch import Stopwatch
from penstock.cluster.status import FleetView
from penstock.cluster.tracing import IngressTracer
from penstock.workers.errors import RefusedError, RequestError

log = logging.getLogger(__name__)

READ_AHEAD = 64  # pieces of a stream that wait for a slow reader before the work does
BESIDE_ABOVE_BYTES = 8192  # larger requests are parsed beside the event loop, as over HTTP
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_OK, _CALLER_LEFT = 200, 499
Stated = Sequence[tuple[str, str | bytes]]


class RpcFailed(Exception):  # noqa: N818 - how a call ends, for the transport to say
    """A call does not end well."""

    def __init__(self, status: RpcStatus) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass(slots=True)
class RpcCall:
    """One call on its way through this process. `trailing`: metadata of an answer that ends well."""

    rpc: str
    request_id: str
    watch: Stopwatch
    status: int = 0  # as HTTP would say it; for metrics, traces and the access log

    @property
    def trailing(self) -> Metadata:
        """Metadata at the end of the answer."""
        return (("x-request-id", self.request_id),)


class GenerationServicer:
    """The seven rpcs. Every failure is an RpcFailed."""

    def __init__(self, service: OpenAIService, fleet: FleetView, tracer: IngressTracer | None = None) -> None:
        self._service = service
        self._fleet = fleet
        self._tracer = tracer
        self._unary: dict[str, Callable[[Any, RpcCall, Stated], Awaitable[Any]]] = {
            "Generate": self._generate,
            "Embed": self._embed,
            "Tokenize": self._tokenize,
            "Detokenize": self._detokenize,
            "ListModels": self._list_models,
            "Health": self._health,
        }

    def open(self, rpc: str, metadata: Stated) -> RpcCall:
        """Begin a call; give the result to `answer` or `stream`."""
        stated = _single(metadata, "x-request-id")
        request_id = stated if _REQUEST_ID.match(stated) else new_id()
        watch = Stopwatch(self._service.metrics, self._tracer)
        watch.opened(request_id, _single(metadata, "traceparent"))
        return RpcCall(rpc, request_id, watch)

    async def answer(self, call: RpcCall, request: Any, metadata: Stated) -> Any:
        """The answer of a unary rpc. Raises RpcFailed."""
        try:
            answer = await self._unary[call.rpc](request, call, metadata)
        except asyncio.CancelledError:
            call.status = _CALLER_LEFT
            raise
        # The edge of the process: whatever went wrong with one call becomes its status and touches no other.
        except Exception as error:
            raise self._failed(call, error) from error
        else:
            call.status = _OK
            return answer
        finally:
            self._close(call)

    async def stream(
        self, call: RpcCall, request: GenerateRequest, metadata: Stated
    ) -> AsyncGenerator[StreamResponse, None]:
        """The messages of a stream. Raises RpcFailed."""
        try:
            async with aclosing(self._stream(request, call, metadata)) as messages:
                async for message in messages:
                    yield message
            call.status = _OK
        except (asyncio.CancelledError, GeneratorExit):
            call.status = _CALLER_LEFT
            raise
        except Exception as error:  # the edge, as above
            raise self._failed(call, error) from error
        finally:
            self._close(call)

    def _failed(self, call: RpcCall, error: Exception) -> RpcFailed:
        if not isinstance(error, (HttpProblem, RequestError, RefusedError)):
            log.exception("a call of %s failed", call.rpc)
        call.status = problem_of(error).status
        status = status_of(error)
        return RpcFailed(RpcStatus(status.code, status.message, (*status.metadata, *call.trailing)))

    def _close(self, call: RpcCall) -> None:
        call.watch.close(f"grpc/{call.rpc}", "POST", call.status)

    # --- the rpcs -------------------------------------------------------------------------------------------------

    async def _generate(self, request: GenerateRequest, call: RpcCall, metadata: Stated) -> GenerateResponse:
        caller = self._caller(request, call, metadata)
        with self._service.admit(caller) as visit:
            job = await self._job(request, call, visit, stream=False)
            results = await self._service.collect(job)
            call.watch.finish(job.tally)
            return answers.whole_answer(job, results, request.output.return_prompt_token_ids)

    async def _stream(
        self, request: GenerateRequest, call: RpcCall, metadata: Stated
    ) -> AsyncGenerator[StreamResponse, None]:
        caller = self._caller(request, call, metadata)
        with self._service.admit(caller) as visit:
            job = await self._job(request, call, visit, stream=True)
            begun: set[int] = set()
            async with aclosing(pieces_of(self._service, job)) as pieces:
                async for piece in pieces:
                    message = StreamResponse(id=job.id)
                    if not begun:
                        message = answers.first_message(job, request.output.return_prompt_token_ids)
                    message.choices.append(answers.piece_of_choice(job, piece, piece.index not in begun))
                    begun.add(piece.index)
                    yield message
            call.watch.finish(job.tally)
            yield StreamResponse(id=job.id, model=job.call.model, usage=answers.usage_of(job.tally))

    async def _embed(self, request: EmbedRequest, call: RpcCall, metadata: Stated) -> EmbedResponse:
        caller = self._caller(request, call, metadata)
        with self._service.admit(caller) as visit:
            job = await self._service.prepare(Kind.EMBEDDING, _beside(embed_body(request), request), visit, call.watch)
            answer = answers.vectors_of(await self._service.embed(job))
            call.watch.finish(job.tally)
            return answer

    async def _tokenize(self, request: TokenizeRequest, call: RpcCall, metadata: Stated) -> TokenizeResponse:
        caller = self._caller(request, call, metadata)
        with self._service.admit(caller) as visit:
            found = await self._service.transform(Kind.TOKENIZE, tokenize_body(request), visit)
        return TokenizeResponse(token_ids=found["tokens"], max_model_len=found["max_model_len"])

    async def _detokenize(self, request: DetokenizeRequest, call: RpcCall, metadata: Stated) -> DetokenizeResponse:
        caller = self._caller(request, call, metadata)
        with self._service.admit(caller) as visit:
            found = await self._service.transform(Kind.DETOKENIZE, detokenize_body(request), visit)
        return DetokenizeResponse(text=found["prompt"])

    async def _list_models(self, request: ListModelsRequest, call: RpcCall, metadata: Stated) -> ListModelsResponse:
        found = self._service.models.all(self._caller(request, call, metadata))["data"]
        names = ("id", "root", "max_model_len", "created")
        return ListModelsResponse(models=[Model(**{name: model[name] for name in names}) for model in found])

    async def _health(self, request: HealthRequest, call: RpcCall, metadata: Stated) -> HealthResponse:
        reason = self._fleet.unready()
        return HealthResponse(ready=not reason, reason=reason)

    def _caller(self, request: Any, call: RpcCall, metadata: Stated) -> Caller:
        """Who asks. Raises HttpProblem 401, 413 for a message larger than an HTTP body may be, and RequestError for
        bytes that are none."""
        keys = [_bytes(value) for name, value in metadata if name == "authorization"]
        caller = self._service.access.authorise(keys)
        call.watch.tenant = caller.tenant
        if isinstance(request, Unreadable):
            raise RequestError("the request is not a message of this rpc's kind", code="invalid_protobuf")
        most = self._service.settings.limits.max_body_bytes
        if request.ByteSize() > most:
            message = f"the request is larger than {most} bytes"
            raise HttpProblem(413, "request_too_large", message, code="request_too_large", may_retry=False)
        call.watch.received()
        return caller

    async def _job(self, request: GenerateRequest, call: RpcCall, visit: Visit, stream: bool) -> Job:
        body, chat = generate_body(request, stream)
        kind = Kind.CHAT if chat else Kind.COMPLETION
        return await self._service.prepare(kind, _beside(body, request), visit, call.watch)


async def pieces_of(service: OpenAIService, job: Job) -> AsyncGenerator[Piece, None]:
    """The pieces of a job that runs at most `READ_AHEAD` pieces ahead of the reader, and ends with the iterator."""
    waiting: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(READ_AHEAD)

    async def run() -> None:
        try:
            await service.run(job, waiting.put)
        except Exception as error:  # noqa: BLE001 - the edge of the task: the reader raises it
            await waiting.put(error)
        else:
            await waiting.put(None)

    task = asyncio.ensure_future(run())
    try:
        while (piece := await waiting.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _beside(body: dict[str, Any], request: Any) -> bytes | dict[str, Any]:
    """A large body as bytes, which the service parses and tokenises beside the event loop; one with a number that JSON
    has not as it is, for its parser to name the field."""
    try:
        return json.dumps(body, allow_nan=False).encode() if request.ByteSize() > BESIDE_ABOVE_BYTES else body
    except ValueError:
        return body


def _single(metadata: Stated, name: str) -> str:
    """The one value of a key; empty where there is none or several."""
    values = [value for key, value in metadata if key == name]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else ""


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
