"""Prometheus metrics of one ingress process: the instruments, and the page with the workers' figures beside them.

The HTTP application reports requests as they pass, the router each request's terminal report; `/metrics` renders the
page. Names follow vLLM's with the prefix `penstock_`; `vllm_names.py` adds vLLM's own names for the same figures.
Every series but the HTTP ones carries the model's name. Labels hold values of closed sets only (paths of the route
table, failure codes, worker ids of this cluster), never a caller's text, so the number of series does not depend on
callers.

Each ingress replica has a page of its own: request figures are that replica's and add up over replicas; worker figures
(label `worker`) are the whole cluster's and the same on every page, so take one of them, not their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from penstock.cluster.fleet_metrics import fleet_metrics
from penstock.cluster.ledger.entries import Law
from penstock.cluster.status import FleetView
from penstock.cluster.vllm_names import aliases_of
from penstock.router.journey import COMPLETED, RequestReport
from penstock.router.trail import MOVED_LIVE, PHASES, AttemptTrail
from penstock.workers.protocol import FailureCode

CONTENT_TYPE = CONTENT_TYPE_LATEST
ALIASES = ("vllm", "none")
_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_SHORT_S = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CHOICES = (1, 2, 5, 10, 20, 50, 128)
_MOVE_OUTCOMES = ("moved", "stayed", "failed")
_HTTP_PREFIX = "penstock_http_"
_NOT_FAILED = frozenset({"moved", MOVED_LIVE, FailureCode.QUEUE_FULL, FailureCode.DRAINING, FailureCode.TOO_LARGE})


class GrammarVerdict(StrEnum):
    """How trying a caller's grammar out ended; a closed set, a label."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    KNOWN = "known"  # asked before
    TOO_SLOW = "too_slow"
    DIED = "died"
    SHED = "shed"  # too many were waiting, or no process could be had


class Metrics:
    """One registry and the instruments in it. `aliases`: whose names stand beside our own, one of `ALIASES`."""

    def __init__(self, model_name: str = "penstock", aliases: str = "none", policy: str = "prefix_load") -> None:
        self._model_name = model_name
        self._with_aliases = aliases == "vllm"
        self._policy = policy
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
            return Histogram(f"penstock_{name}", text, labels, registry=registry, buckets=buckets)

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"penstock_{name}", text, labels, registry=registry)

        self.time_to_first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", _LATENCY_S
        )
        self.inter_token_latency = histogram("inter_token_latency_seconds", "Gap between two reads of a choice", _GAP_S)
        self.time_per_output_token = histogram(
            "request_time_per_output_token_seconds", "(Latency - TTFT) / (tokens - 1) of a request", _GAP_S
        )
        self.e2e_latency = histogram("e2e_request_latency_seconds", "From arrival to the last token", _LATENCY_S)
        self.queue_time = histogram("request_queue_time_seconds", "Choice: arrival to start of its prefill", _LATENCY_S)
        self.prefill_time = histogram("request_prefill_time_seconds", "Choice: prefill to its first token", _LATENCY_S)
        self.decode_time = histogram("request_decode_time_seconds", "Choice: first to last token", _LATENCY_S)
        self.inference_time = histogram("request_inference_time_seconds", "Choice: prefill to last token", _LATENCY_S)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a request", _TOKENS
        )
        self.request_params_n = histogram("request_params_n", "Choices asked for per prompt", _CHOICES)
        self.request_params_max_tokens = histogram("request_params_max_tokens", "Bound on generated tokens", _TOKENS)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Of them, found in a prefix cache")
        self.generation_tokens = counter("generation_tokens", "Tokens generated for callers")
        self.request_success = counter("request_success", "Choices that ended well", ["finished_reason"])
        self.http_requests = counter("http_requests", "HTTP answers", ["handler", "method", "status"])
        self.http_duration = histogram(
            "http_request_duration_seconds", "From a request's arrival to its end", _LATENCY_S, ["handler", "method"]
        )
        self.request_terminal = counter("request_terminal", "Router requests by how they ended", ["state"])
        self.request_migrated = counter("request_migrated", "Attempts that failed, by how far they were", ["phase"])
        self.request_moved = counter("request_moved", "Attempts refused, or given up for a worker with room")
        self.live_moves = counter("live_moves", "Running sequences sent elsewhere with their KV", ["outcome"])
        self.recomputed_tokens = counter("recomputed_tokens", "Context tokens placed again after a migration")
        self.hit_tokens_predicted = counter("kv_hit_tokens_predicted", "Cached tokens the router expected")
        self.hit_tokens_actual = counter("kv_hit_tokens_actual", "Cached tokens the workers found")
        self.router_decision = histogram("router_decision_seconds", "Choosing the workers of an attempt", _SHORT_S)
        self.router_choice = counter("router_choice", "Attempts by the kind of route chosen", ["policy", "reason"])
        self.handoff = histogram(
            "pd_handoff_seconds", "First token at prefill to the decode worker's first own token", _GAP_S
        )
        self.overhead = histogram(
            "framework_overhead_seconds", "Our own time in a request, outside of computing", _SHORT_S, ["stage"]
        )
        self.slow_readers = counter("slow_readers", "Streams cut because their caller did not read")
        self.requests_open = Gauge("penstock_requests_open", "HTTP requests being served", registry=registry)
        self.grammar_checks = counter("grammar_checks", "Grammars of requests, tried out or known", ["verdict"])
        for verdict in GrammarVerdict:
            self.grammar_checks.labels(verdict)
        self.ledger_violations = counter("ledger_violations", "Laws that the ledger found broken", ["law"])
        self._announce()

    def watch(self, fleet: FleetView) -> None:
        """Show the workers of `fleet` on the page from now on."""
        self._registry.register(_FleetCollector(fleet))

    def watch_spans(self, dropped: Callable[[], int]) -> None:
        """Count the spans that this process has dropped so far."""
        self._registry.register(_SpanCollector(dropped))

    def answered(self, handler: str, method: str, status: int, seconds: float) -> None:
        """One HTTP exchange is over; `handler` and `method` are of closed sets."""
        self.http_requests.labels(handler, method, str(status)).inc()
        self.http_duration.labels(handler, method).observe(seconds)

    def violated(self, law: Law) -> None:
        """The ledger found a law broken."""
        self.ledger_violations.labels(law).inc()

    def report(self, report: RequestReport) -> None:
        """Take in one router request's terminal report."""
        self.request_terminal.labels(report.terminal).inc()
        self.request_moved.inc(report.moves)
        outcomes = (report.live_moves, report.moves_stayed, report.moves_failed)
        for outcome, count in zip(_MOVE_OUTCOMES, outcomes, strict=True):
            self.live_moves.labels(outcome).inc(count)
        self.recomputed_tokens.inc(report.recomputed_tokens)
        if report.predicted_cached_tokens is not None:
            self.hit_tokens_predicted.inc(report.predicted_cached_tokens)
            self.hit_tokens_actual.inc(report.cached_tokens)
        attempts = report.trail.attempts
        for attempt in attempts:
            self._report_attempt(attempt)
        for attempt in attempts[:-1]:
            if attempt.end not in _NOT_FAILED:
                self.request_migrated.labels(attempt.phase).inc()
        if attempts:
            self.overhead.labels("place").observe(sum(attempt.decision_s for attempt in attempts))
        times = report.trail.times
        if "first_token" not in times:
            return
        started = times.get("started", times["first_token"])
        self.queue_time.observe(started)
        self.prefill_time.observe(times["first_token"] - started)
        if report.terminal == COMPLETED:
            self.decode_time.observe(times["ended"] - times["first_token"])
            self.inference_time.observe(times["ended"] - started)

    def page(self) -> bytes:
        """The text that `/metrics` answers with."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """Every metric of the page: ours with the model's name, then the aliases."""
        ours = list(self._registry.collect())
        for metric in ours:
            plain = metric.name.startswith(_HTTP_PREFIX)
            yield _with_labels(metric) if plain else _with_labels(metric, model_name=self._model_name)
        if self._with_aliases:
            yield from aliases_of(ours, self._model_name)

    def _report_attempt(self, attempt: AttemptTrail) -> None:
        self.router_decision.observe(attempt.decision_s)
        self.router_choice.labels(self._policy, attempt.choice).inc()
        if "handed_over" in attempt.times and "first_token" in attempt.times:
            self.handoff.observe(attempt.times["handed_over"] - attempt.times["first_token"])

    def _announce(self) -> None:
        """Let the labels that are known beforehand begin at zero, so that rates see the first event."""
        for reason in ("stop", "length"):
            self.request_success.labels(reason)
        for state in (COMPLETED, *FailureCode):
            self.request_terminal.labels(state)
        for law in Law:
            self.ledger_violations.labels(law)
        for phase in PHASES:
            self.request_migrated.labels(phase)
        for outcome in _MOVE_OUTCOMES:
            self.live_moves.labels(outcome)
        for stage in ("prepare", "place", "deliver"):
            self.overhead.labels(stage)


class _FleetCollector(Collector):
    """Reads the fleet when the page is asked for."""

    def __init__(self, fleet: FleetView) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """See `fleet_metrics`."""
        return fleet_metrics(list(self._fleet.workers()))


class _SpanCollector(Collector):
    """Asks for the count when the page is asked for."""

    def __init__(self, dropped: Callable[[], int]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterable[Metric]:
        """One counter."""
        yield CounterMetricFamily("penstock_spans_dropped", "Spans the trace collector did not take", self._dropped())


def _with_labels(metric: Metric, **labels: str) -> Metric:
    """A copy whose every sample carries these labels too."""
    copy = Metric(metric.name, metric.documentation, metric.type)
    for sample in metric.samples:
        if not sample.name.endswith("_created"):  # a second series per series that no board shows
            copy.samples.append(Sample(sample.name, {**labels, **sample.labels}, sample.value))
    return copy
