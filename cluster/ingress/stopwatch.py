"""Times one HTTP request and tells metrics, traces and the access log: first token, gaps, whole, and where it was.

`app.py` makes one when a request arrives and calls, in this order:

    watch = Stopwatch(metrics, tracer)                      for every request, before anything else
    watch.opened(request_id, traceparent, timings)          the headers are read; `timings`: `x-penstock-timings: 1`
    watch.tenant = "name"                                   once the key is known; a name of ours, never the key
    watch.received()                                        the body is there
    generator = watch.follow(generator, call)               give the result, not the original, to `ChoiceRunner`
    watch.piece(piece)                                      each piece, before it is written
    watch.headers() -> [(b"x-penstock-...", b"...")]        of a whole answer, or with a stream's first chunk
    watch.comment() -> bytes                                write it before a stream's last event; mostly empty
    watch.finish(tally)                                     the answer is complete
    watch.close(handler, method, status)                    always, at the very end; see `gate.labels_of`

`headers` and `comment` are empty unless the caller asked for timings. Milliseconds, of the choice whose first token
came first: `queue-ms` waiting at the gate and at the worker, `route-ms` placing and reserving, `prefill-ms` computing
up to the first token, `transfer-ms` from there to the decode worker's first own token, `first-token-ms` and `total-ms`
since the request arrived; also `workers`, `cached-tokens`, `attempts`. A stage that has not been reached is absent. A
stream's headers leave with the first token, so what comes later is in the comment:

    : x-penstock-timings queue-ms=0.1 route-ms=0.3 ... total-ms=81.4 workers=prefill-0,decode-0

Gaps are between two reads of the same choice, as clients see them.
"""

from __future__ import annotations

import time
from dataclasses import replace

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import Tally
from penstock.cluster.ingress.gate import ONE_MODEL, ROUTES, labels_of
from penstock.cluster.ingress.generator import Generation, Generator
from penstock.cluster.logs import write_access
from penstock.cluster.metrics import Metrics
from penstock.cluster.tracing import IngressTracer
from penstock.router.trail import Trail
from penstock.workers.protocol import GenerateRequest
from penstock.workers.spans import Value
from penstock.workers.trace_context import TraceContext

_CALLER_LEFT = 499
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_RPCS = ("Generate", "Stream", "Embed", "Tokenize", "Detokenize", "ListModels", "Health")
_HANDLERS = {path: path for path in (*ROUTES, labels_of(ONE_MODEL, "GET")[0])} | {
    f"grpc/{rpc}": f"/penstock.v1.Generation/{rpc}"  # what gRPC sends over HTTP/2
    for rpc in _RPCS
}


class Stopwatch:
    """Monotonic times of one request."""

    def __init__(self, metrics: Metrics, tracer: IngressTracer | None = None) -> None:
        self.tenant = "default"
        self._metrics = metrics
        self._tracer = tracer
        self._arrived = time.monotonic()
        self._received: float | None = None
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._generations: list[Generation] = []
        self._request_id = ""
        self._traceparent = ""
        self._context: TraceContext | None = None
        self._timings = False
        self._tally: Tally | None = None
        self._call: Call | None = None

    def opened(self, request_id: str = "", traceparent: str = "", timings: bool = False) -> None:
        """What the headers say. `request_id` is the caller's; harmless characters only."""
        self._request_id = request_id
        self._traceparent = traceparent
        self._timings = timings
        if self._tracer is not None:
            self._context = self._tracer.begin(traceparent)

    def received(self) -> None:
        """The whole body is there."""
        self._received = time.monotonic()

    def follow(self, generator: Generator, call: Call) -> Generator:
        """The same generator; whatever is submitted through it belongs to this request."""
        self._call = call
        if self._received is not None:
            self._metrics.overhead.labels("prepare").observe(time.monotonic() - self._received)
        self._metrics.request_params_n.observe(call.n)
        return _Followed(self, generator)

    def piece(self, piece: Piece) -> None:
        """A choice has something new."""
        now = time.monotonic()
        before = self._last.get(piece.index)
        self._last[piece.index] = now
        if before is not None:
            self._metrics.inter_token_latency.observe(now - before)
        elif self._first is None:
            self._first = now
            self._metrics.time_to_first_token.observe(now - self._arrived)
            trail = self._leader()
            if trail is not None:
                self._metrics.overhead.labels("deliver").observe(now - trail.arrived - trail.times["first_token"])
        if piece.finish_reason is not None:
            self._metrics.request_success.labels(piece.finish_reason).inc()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Timing headers of the answer; none unless asked for."""
        if not self._timings:
            return []
        return [(f"x-penstock-{name}".encode(), value.encode()) for name, value in self._figures()]

    def comment(self) -> bytes:
        """A comment for the end of an event stream, which readers skip; empty unless asked for."""
        if not self._timings:
            return b""
        return f": x-penstock-timings {' '.join(map('='.join, self._figures()))}\n\n".encode()

    def finish(self, tally: Tally) -> None:
        """The whole request was answered."""
        metrics, elapsed = self._metrics, time.monotonic() - self._arrived
        self._tally = tally
        metrics.e2e_latency.observe(elapsed)
        if self._first is not None and tally.completion > len(self._last):
            decode = elapsed - (self._first - self._arrived)
            metrics.time_per_output_token.observe(decode * len(self._last) / (tally.completion - len(self._last)))
        metrics.request_prompt_tokens.observe(tally.prompt)
        metrics.request_generation_tokens.observe(tally.completion)
        metrics.prompt_tokens.inc(tally.prompt)
        metrics.prompt_tokens_cached.inc(tally.cached)
        metrics.generation_tokens.inc(tally.completion)

    def close(self, handler: str, method: str, status: int) -> None:
        """The exchange is over, however it ended. A label of no closed set becomes "other"."""
        now = time.monotonic()
        elapsed = now - self._arrived
        method = method if method in _METHODS else "other"
        handler = _HANDLERS.get(handler, "other")
        self._metrics.answered(handler, method, status, elapsed)
        write_access(
            self._request_id,
            method,
            handler,
            status,
            tenant=self.tenant,
            ms=round(1000 * elapsed, 1),
            **self._account(),
        )
        if self._tracer is not None and self._context is not None and method == "POST":  # scrapes are no news
            failed = f"status {status}" if status >= _CALLER_LEFT else ""
            attributes = self._attributes(handler, method, status)
            self._tracer.end(self._context, self._traceparent, (self._arrived, now), attributes, failed)

    def submitted(self, generation: Generation) -> None:
        """One choice of this request is on its way."""
        self._generations.append(generation)

    def traced(self, request: GenerateRequest) -> GenerateRequest:
        """The request with this HTTP request's span as its parent."""
        return request if self._context is None else replace(request, traceparent=self._context.header())

    def observe_parameters(self, request: GenerateRequest) -> None:
        """Count what was asked for."""
        self._metrics.request_params_max_tokens.observe(request.sampling.max_tokens)

    def _leader(self) -> Trail | None:
        """The trail of the choice whose first token came first."""
        begun = [g.trail for g in self._generations if "first_token" in g.trail.times]
        return min(begun, key=lambda trail: trail.arrived + trail.times["first_token"], default=None)

    def _workers(self) -> str:
        names = (worker for generation in self._generations for worker in generation.trail.workers)
        return ",".join(dict.fromkeys(names))

    def _figures(self) -> list[tuple[str, str]]:
        """Names and values, what has been reached so far."""
        seconds: dict[str, float] = {}
        trail = self._leader()
        if trail is not None:
            seconds.update(stage_times(trail))
        if self._first is not None:
            seconds["first-token-ms"] = self._first - self._arrived
        seconds["total-ms"] = time.monotonic() - self._arrived
        figures = [(name, f"{max(0.0, 1000 * value):.2f}") for name, value in seconds.items()]
        if self._generations:
            attempts = max((len(generation.trail.attempts) for generation in self._generations), default=0)
            cached = sum(generation.cached_tokens for generation in self._generations)
            figures += [("workers", self._workers()), ("cached-tokens", str(cached)), ("attempts", str(attempts))]
        return figures

    def _account(self) -> dict[str, str | int]:
        """What the access log says of a generating request."""
        if self._call is None:
            return {}
        account: dict[str, str | int] = {"workers": self._workers(), "choices": len(self._generations)}
        account["attempts"] = max((len(generation.trail.attempts) for generation in self._generations), default=0)
        if self._tally is not None:
            account["prompt_tokens"] = self._tally.prompt
            account["cached_tokens"] = self._tally.cached
            account["completion_tokens"] = self._tally.completion
        return account

    def _attributes(self, handler: str, method: str, status: int) -> dict[str, Value]:
        facts: dict[str, Value] = {
            "http.request.method": method,
            "http.route": handler,
            "http.response.status_code": status,
        }
        call = self._call
        if call is None:
            return facts
        sampling = call.sampling
        facts |= {
            "gen_ai.operation.name": "chat" if "chat" in handler else "text_completion",
            "gen_ai.provider.name": "penstock",
            "gen_ai.request.model": call.model,
            "gen_ai.response.model": call.model,
            "gen_ai.request.choice.count": call.n,
            "gen_ai.request.n": call.n,
            "gen_ai.request.max_tokens": max(call.max_tokens, default=0),
            "gen_ai.request.temperature": float(sampling.temperature),
            "gen_ai.request.top_p": float(sampling.top_p),
            "gen_ai.request.stream": call.output.stream,
        }
        if self._tally is not None:
            facts["gen_ai.usage.input_tokens"] = facts["gen_ai.usage.prompt_tokens"] = self._tally.prompt
            facts["gen_ai.usage.output_tokens"] = facts["gen_ai.usage.completion_tokens"] = self._tally.completion
            facts["gen_ai.usage.cache_read.input_tokens"] = self._tally.cached
        if self._first is not None:
            facts["gen_ai.latency.time_to_first_token"] = self._first - self._arrived
        return facts


class _Followed:
    """A generator whose generations are noted."""

    def __init__(self, watch: Stopwatch, generator: Generator) -> None:
        self._watch = watch
        self._generator = generator

    def check(self, tenant: str) -> None:
        """See `Generator.check`."""
        self._generator.check(tenant)

    def submit(self, request: GenerateRequest) -> Generation:
        """See `Generator.submit`."""
        self._watch.observe_parameters(request)
        generation = self._generator.submit(self._watch.traced(request))
        self._watch.submitted(generation)
        return generation


def stage_times(trail: Trail) -> dict[str, float]:
    """Seconds of each stage that one choice has passed, by header name."""
    times, stages = trail.times, {}
    if "admitted" in times:
        stages["queue-ms"] = times["admitted"]
    if "prefill_sent" in times:
        stages["route-ms"] = times["prefill_sent"] - times["admitted"]
    if "started" in times and "prefill_sent" in times:
        stages["queue-ms"] += times["started"] - times["prefill_sent"]
    if "first_token" in times:
        stages["prefill-ms"] = times["first_token"] - times.get("started", times.get("prefill_sent", 0.0))
    if "handed_over" in times:
        stages["transfer-ms"] = times["handed_over"] - times["first_token"]
    return stages
