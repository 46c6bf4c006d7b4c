"""Prometheus metrics of one ingress process, and the workers' figures as its page shows them.

The HTTP application reports requests as they pass, the router each request's terminal report; `/metrics` renders the
page. Names follow vLLM's with the prefix `penstock_`, so that boards and alerts carry over. Labels hold values of
closed sets only (handler names, failure codes, worker ids of this cluster), never a caller's text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from penstock.cluster.status import FleetView, WorkerStatus
from penstock.router.journey import RequestReport

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LATENCY_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Metrics:
    """One registry and the instruments in it."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"penstock_{name}", text, registry=registry, buckets=buckets)

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
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Generated tokens of a request", _TOKENS
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Of them, found in a prefix cache")
        self.generation_tokens = counter("generation_tokens", "Tokens generated for callers")
        self.request_success = counter("request_success", "Choices that ended well", ["finished_reason"])
        self.http_requests = counter("http_requests", "HTTP answers", ["handler", "status"])
        self.request_terminal = counter("request_terminal", "Router requests by how they ended", ["state"])
        self.request_migrated = counter("request_migrated", "Attempts moved to another worker after a failure")
        self.recomputed_tokens = counter("recomputed_tokens", "Context tokens placed again after a migration")
        self.prefix_tokens_predicted = counter("prefix_tokens_predicted", "Cached tokens the router expected")
        self.prefix_tokens_found = counter("prefix_tokens_found", "Cached tokens the workers found")
        self.requests_open = Gauge("penstock_requests_open", "HTTP requests being served", registry=registry)

    def watch(self, fleet: FleetView) -> None:
        """Show the workers of `fleet` on the page from now on."""
        self._registry.register(_FleetCollector(fleet))

    def report(self, report: RequestReport) -> None:
        """Take in one router request's terminal report."""
        self.request_terminal.labels(report.terminal).inc()
        self.request_migrated.inc(report.migrations)
        self.recomputed_tokens.inc(report.recomputed_tokens)
        if report.predicted_cached_tokens is not None:
            self.prefix_tokens_predicted.inc(report.predicted_cached_tokens)
            self.prefix_tokens_found.inc(report.cached_tokens)

    def page(self) -> bytes:
        """The text that `/metrics` answers with."""
        return generate_latest(self._registry)


class _FleetCollector(Collector):
    """Reads the fleet when the page is asked for."""

    def __init__(self, fleet: FleetView) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        workers = list(self._fleet.workers())
        yield _gauge("num_requests_running", "Sequences in the worker's batch", workers, [w.running for w in workers])
        yield _gauge("num_requests_waiting", "Sequences in the worker's queue", workers, [w.waiting for w in workers])
        yield _gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0..1", workers, [w.kv_use for w in workers])
        yield _gauge("kv_blocks", "KV blocks of the worker", workers, [w.kv_blocks for w in workers])
        yield _gauge(
            "kv_quarantined_blocks",
            "Held until a writer is fenced",
            workers,
            [w.kv_quarantined_blocks for w in workers],
        )
        yield _gauge("kv_transfers", "Transfer sessions open", workers, [w.transfers for w in workers])
        yield _gauge("num_preemptions", "Preemptions since start", workers, [w.preemptions for w in workers])
        yield _gauge("worker_up", "1 when the worker is ready", workers, [float(w.state == "ready") for w in workers])
        yield _gauge("worker_restarts", "Times the worker was started again", workers, [w.restarts for w in workers])


def _gauge(name: str, text: str, workers: Sequence[WorkerStatus], values: Sequence[float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"penstock_{name}", text, labels=["worker", "role"])
    for worker, value in zip(workers, values, strict=True):
        family.add_metric([worker.id, worker.role.value], value)
    return family
