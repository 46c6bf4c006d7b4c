"""The OpenAI-compatible service without HTTP: parse a body, run it, format its answer. One per ingress process.

The HTTP application (`app.py`) and the gRPC front call it, so that fields, limits, keys and errors are the same:

    caller = service.access.authorise(values)                  # keys.py; 401
    with service.admit(caller) as visit:                       # one open request; 429, 503
        job = await service.prepare(Kind.CHAT, body, visit, watch)         # 400, 403, 404, 429
        await service.stream(job, write)                       # or: answer = await service.complete(job)

`run` gives the pieces themselves to fronts with a format of their own, `collect` the whole choices. Every error is an
HttpProblem, a RequestError or a RefusedError; `errors.problem_of` makes an HttpProblem of each. Cancelling the task
that awaits one of these cancels all work of its job.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from penstock.cluster.ingress.adapter_calls import load_adapter, unload_adapter
from penstock.cluster.ingress.answer_format import AnswerFormat
from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.chat_request import parse_chat
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import ChoiceRunner, OnPiece, Tally, requests_of
from penstock.cluster.ingress.completion_request import parse_completion
from penstock.cluster.ingress.embeddings import EmbeddingAnswer, parse_embedding, run_embeddings, wants_base64
from penstock.cluster.ingress.errors import HttpProblem
from penstock.cluster.ingress.fields import Fields
from penstock.cluster.ingress.generator import Generator
from penstock.cluster.ingress.grammar_check import GrammarCheck, GrammarRefusedError
from penstock.cluster.ingress.grammar_fields import stated_field
from penstock.cluster.ingress.json_body import parse_json
from penstock.cluster.ingress.keys import Access, Caller
from penstock.cluster.ingress.known_fields import IgnoredFields
from penstock.cluster.ingress.model_list import ModelList
from penstock.cluster.ingress.openapi_bodies import Kind
from penstock.cluster.ingress.rate_limits import Clock, Lease
from penstock.cluster.ingress.results import ChoiceResult, best_results
from penstock.cluster.ingress.sampling_fields import read_model
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.stopwatch import Stopwatch
from penstock.cluster.ingress.tokenize_request import detokenize, tokenize
from penstock.cluster.metrics import GrammarVerdict, Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RefusedError
from penstock.workers.grammar_spec import GrammarSpec
from penstock.workers.protocol import GenerateRequest

Write = Callable[[bytes], Awaitable[None]]
Body = bytes | dict[str, Any]
BESIDE_ABOVE_BYTES = 8192  # larger bodies are parsed and tokenised beside the event loop
BESIDE_ABOVE_ENTRIES = 1024  # answers with logprobs of more tokens are formatted there
_PARSERS = {Kind.COMPLETION: parse_completion, Kind.CHAT: parse_chat, Kind.EMBEDDING: parse_embedding}
_ADAPTER_CALLS = {Kind.LOAD_ADAPTER: load_adapter, Kind.UNLOAD_ADAPTER: unload_adapter}
_ID_PREFIX = {Kind.COMPLETION: "cmpl", Kind.CHAT: "chatcmpl", Kind.EMBEDDING: "embd"}


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of one caller while it is open. `id` is ours and cannot be guessed."""

    caller: Caller
    lease: Lease
    id: str


@dataclass(frozen=True, slots=True)
class Job:
    """A parsed request that is ready to run, once."""

    kind: Kind
    id: str  # as the answer carries it
    created: int
    call: Call
    runner: ChoiceRunner
    visit: Visit
    watch: Stopwatch
    base64: bool = False
    ignored: tuple[str, ...] = ()  # fields of the body that nobody here knows

    @property
    def tally(self) -> Tally:
        """Tokens so far; final when the job has run."""
        return self.runner.tally


class OpenAIService:
    """Everything behind the routes that a key opens. Belongs to one asyncio loop."""

    def __init__(
        self,
        settings: IngressSettings,
        text: TextCodec,
        generator: Generator,
        metrics: Metrics,
        clock: Clock = time.monotonic,
    ) -> None:
        self.settings = settings
        self.text = text
        self.metrics = metrics
        self.models = ModelList(settings, text.vocab_size)
        self.access = Access(
            settings.keys,
            settings.api_key,
            clock=clock,
            share=settings.limits_share,
            most_open=settings.limits.max_open_requests,
        )
        self._generator = generator
        self._grammars = GrammarCheck(text)
        self._ignored = IgnoredFields()
        self._open = 0
        self._fingerprint = "fp_" + hashlib.sha256(settings.revision.encode()).hexdigest()[:12]

    @contextmanager
    def admit(self, caller: Caller, request_id: str = "") -> Iterator[Visit]:
        """Count one open request against this process's bound and the key's. Raises HttpProblem 429 or 503.

        `request_id`: ours (`new_id`), where the front has already told it.
        """
        if self._open >= self.settings.limits.max_open_requests:
            raise HttpProblem(
                503, "service_unavailable", "too many open requests", code="overloaded", retry_after_s=1.0
            )
        with caller.lease() as lease:
            self._open += 1
            self.metrics.requests_open.inc()
            try:
                yield Visit(caller, lease, request_id or new_id())
            finally:
                self._open -= 1
                self.metrics.requests_open.dec()

    async def prepare(
        self, kind: Kind, body: Body, visit: Visit, watch: Stopwatch, ttft_target_s: float | None = None
    ) -> Job:
        """Parse, tokenise and charge a completions, chat or embeddings request; nothing runs yet.

        Where the cluster is too busy for any request of the tenant, that is said before anything is parsed.
        `ttft_target_s`: refuse what would wait longer for its first token; it can only lower other targets.
        """
        self._generator.check(visit.caller.tenant)
        if isinstance(body, bytes) and len(body) > BESIDE_ABOVE_BYTES:
            call, requests, parsed = await asyncio.to_thread(self._parse, kind, body, visit)
        else:
            call, requests, parsed = self._parse(kind, body, visit)
        targets = [each for each in (ttft_target_s, visit.caller.ttft_target_s) if each is not None]
        if targets:
            requests = [replace(each, queue_timeout_s=min(each.queue_timeout_s, *targets)) for each in requests]
        await self._try_grammars(call, Fields(parsed), visit.caller.tenant)
        visit.lease.charge_prompt(call.prompt_tokens + len(call.resumption.emitted))
        generator = watch.follow(self._generator, call)
        runner = ChoiceRunner(call, tuple(requests), self.text, generator, Tally(call))
        base64 = call.embed and wants_base64(parsed)
        ignored = self._ignored.note(kind, parsed)
        return Job(kind, _answer_id(kind, visit), int(time.time()), call, runner, visit, watch, base64, ignored)

    async def run(self, job: Job, on_piece: OnPiece) -> None:
        """Every piece of every choice to `on_piece`, in order per choice; `Piece.index` counts runs (see `Call`)."""
        shortest = min(map(len, job.call.prompts))
        all_at_once = not self.settings.prefix_caching or shortest < self.settings.block_size

        async def watched(piece: Piece) -> None:
            job.watch.piece(piece)
            await on_piece(piece)

        try:
            await job.runner.run(watched, all_at_once)
        finally:
            job.visit.lease.charge_generated(job.tally.completion)

    async def collect(self, job: Job) -> list[ChoiceResult]:
        """Run it; the answered choices, prompt-major, the best first where more were generated than asked for."""
        results = [ChoiceResult() for _ in range(job.call.num_runs)]

        async def add(piece: Piece) -> None:
            results[piece.index].add(piece)

        await self.run(job, add)
        return best_results(job.call, results)

    async def complete(self, job: Job) -> bytes:
        """Run it; the whole answer as JSON."""
        if job.call.embed:
            vectors = await self.embed(job)
            return await asyncio.to_thread(lambda: _json(vectors.as_json()))
        results = await self.collect(job)
        answer = self._format(job)
        scored = job.call.output.logprobs or job.call.output.prompt_logprobs
        if scored and job.tally.prompt + job.tally.completion > BESIDE_ABOVE_ENTRIES:
            return await asyncio.to_thread(lambda: _json(answer.whole(results, job.tally)))
        return _json(answer.whole(results, job.tally))

    async def stream(self, job: Job, write: Write) -> None:
        """Run it; every piece as server-sent events to `write`, and the tail of a complete answer."""
        answer, tally = self._format(job), job.tally

        async def send(piece: Piece) -> None:
            await write(answer.chunk(piece, tally))

        await self.run(job, send)
        await write(answer.tail(tally, job.watch.comment()))

    async def embed(self, job: Job) -> EmbeddingAnswer:
        """Run an embeddings request."""
        vectors = await run_embeddings(job.runner.requests, job.runner.generator, job.tally)
        return EmbeddingAnswer(job.call.model, vectors, job.tally.prompt, job.base64)

    async def transform(self, kind: Kind, body: Body, visit: Visit) -> dict[str, Any]:
        """/tokenize and /detokenize: text to ids and back, beside the event loop."""
        return await asyncio.to_thread(self._transform, kind, body, visit)

    async def change_adapters(self, kind: Kind, body: bytes) -> dict[str, Any]:
        """An operator's call about the list of adapters. Raises RequestError or HttpProblem."""
        parsed = parse_json(body)
        self._ignored.note(kind, parsed)
        return await _ADAPTER_CALLS[kind](parsed, self.settings.adapters, self.settings.model_names)

    def _read(self, body: Body, visit: Visit) -> dict[str, Any]:
        """The body as an object, of a caller who may use its model."""
        parsed = parse_json(body) if isinstance(body, bytes) else body
        # What is computed is what the parser reads, by one look of its own; this one is only about the right.
        visit.caller.check_model(read_model(Fields(parsed), self.settings).right)
        return parsed

    def _parse(self, kind: Kind, body: Body, visit: Visit) -> tuple[Call, Sequence[GenerateRequest], dict[str, Any]]:
        parsed = self._read(body, visit)
        stated = any(parsed.get(name) is not None for name in ("max_tokens", "max_completion_tokens"))
        call = visit.caller.bound(_PARSERS[kind](parsed, self.settings, self.text), stated)
        return call, requests_of(call, _answer_id(kind, visit), self.settings, visit.caller.tenant), parsed

    async def _try_grammars(self, call: Call, fields: Fields, tenant: str) -> None:
        """Raises RequestError naming the field of a grammar that cannot be followed."""
        grammar, tools = call.sampling.grammar, call.tools
        if grammar is not None:
            await self._try_grammar(grammar, stated_field(fields) if tools.grammar is None else "tools", tenant)
        if tools.trial is not None:
            try:
                await self._try_grammar(tools.trial, "tools", tenant)
            except GrammarRefusedError as error:
                if not error.only_unsupported:
                    raise

    async def _try_grammar(self, grammar: GrammarSpec, field: str, tenant: str) -> None:
        verdict: GrammarVerdict | None = None  # the caller left
        try:
            verdict = await self._grammars.check(grammar, field, tenant)
        except GrammarRefusedError as error:
            verdict = error.verdict
            raise
        except RefusedError:
            verdict = GrammarVerdict.SHED
            raise
        finally:
            if verdict is not None:
                self.metrics.grammar_checks.labels(verdict).inc()

    def _transform(self, kind: Kind, body: Body, visit: Visit) -> dict[str, Any]:
        parsed = self._read(body, visit)
        self._ignored.note(kind, parsed)
        return (tokenize if kind is Kind.TOKENIZE else detokenize)(parsed, self.settings, self.text)

    def _format(self, job: Job) -> AnswerFormat:
        head = {
            "id": job.id,
            "created": job.created,
            "model": job.call.model,
            "system_fingerprint": self._fingerprint,
        }
        return AnswerFormat(job.call, self.text, job.kind is Kind.CHAT, head, job.runner.scores)


def new_id() -> str:
    """Names a request in answers and logs; cannot be guessed."""
    return secrets.token_hex(16)


def _answer_id(kind: Kind, visit: Visit) -> str:
    return f"{_ID_PREFIX[kind]}-{visit.id}"


def _json(answer: dict[str, Any]) -> bytes:
    """Legal JSON, or an error of ours: no NaN leaves this server."""
    return json.dumps(answer, allow_nan=False).encode()
