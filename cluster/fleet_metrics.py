"""The workers' figures as Prometheus metrics, read from the fleet's view when the page is asked for.

Used by `metrics.py`. Every series carries `worker` and `role`; both come from the cluster's own configuration.
Counters are the workers' own since their start, so they begin again with a restarted worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from penstock.cluster.status import WorkerStatus
from penstock.workers.totals import STEP_TOKENS_UP_TO, TRANSFER_S_UP_TO, TierFigures, TransferCause, WorkerTotals

Workers = Sequence[WorkerStatus]
_BY_WORKER = ("worker", "role")
_NO_FAILURE = (TransferCause.ABANDONED,)

_GAUGES: tuple[tuple[str, str, Callable[[WorkerStatus], float]], ...] = (
    ("num_requests_running", "Sequences in the worker's batch", lambda w: w.running),
    ("num_requests_waiting", "Sequences in the worker's queue", lambda w: w.waiting),
    ("kv_cache_usage_perc", "Share of KV blocks in use, 0..1", lambda w: w.kv_use),
    ("kv_blocks", "KV blocks of the worker", lambda w: w.kv_blocks),
    ("kv_cached_blocks", "Blocks that the prefix cache knows", lambda w: w.kv_cached_blocks),
    ("kv_quarantined_blocks", "Held until a writer is fenced", lambda w: w.kv_quarantined_blocks),
    ("kv_transfers", "Transfer sessions open", lambda w: w.transfers),
    ("worker_ranks", "Processes that the worker consists of", lambda w: w.width),
    ("worker_ranks_lost", "Of them, those that are gone; the worker goes on without", lambda w: w.ranks_lost),
    ("experts_gone", "Experts, over all layers, that no rank holds", lambda w: w.totals.experts_gone),
    ("expert_rank_skew", "Rows of the fullest expert rank / mean, worst layer", lambda w: w.totals.expert_skew),
    ("worker_up", "1 when the worker is ready", lambda w: float(w.state == "ready")),
    ("worker_weights_load_seconds", "Time the worker's rank 0 took to load", lambda w: w.totals.weights_load_s),
    ("worker_quarantined", "1 while damaged KV keeps prompts away from it", lambda w: float(w.quarantined)),
    ("worker_restarts", "Times the worker was started again", lambda w: w.restarts),
)
_COUNTERS: tuple[tuple[str, str, Callable[[WorkerStatus], float]], ...] = (
    ("num_preemptions", "Sequences that gave their blocks back", lambda w: w.preemptions),
    ("prefix_cache_queries", "Context tokens looked up in the prefix cache", lambda w: w.totals.prompt_tokens),
    ("prefix_cache_hits", "Of them, found there", lambda w: w.totals.cached_tokens),
    ("worker_generated_tokens", "Tokens the worker sampled", lambda w: w.totals.generated_tokens),
    ("worker_step_seconds", "Time the worker spent in steps", lambda w: w.totals.step_s),
    ("kv_transfer_bytes", "KV bytes sent in sessions that ended whole", lambda w: w.totals.transfer_bytes),
    ("kv_transfers_received", "Sessions whose KV arrived whole", lambda w: w.totals.transfers_received),
    ("grammars_compiled", "Grammars that requests brought, compiled", lambda w: w.totals.grammars.compiled),
    ("grammar_cache_hits", "Grammars found compiled", lambda w: w.totals.grammars.found),
    ("grammar_cache_evictions", "Compiled grammars that gave way to others", lambda w: w.totals.grammars.evicted),
    ("adapters_loaded", "Adapters read from their files", lambda w: w.totals.adapters.loaded),
    ("adapter_cache_hits", "Adapters found in the worker's memory", lambda w: w.totals.adapters.found),
    ("adapter_cache_evictions", "Adapters that gave way to others there", lambda w: w.totals.adapters.evicted),
    ("adapter_load_failures", "Adapters missing, exchanged or wrong", lambda w: w.totals.adapters.failed),
    ("adapters_placed", "Times an adapter was brought to the device", lambda w: w.totals.adapters.placed),
    ("weights_served_bytes", "Weights given to workers that started", lambda w: w.totals.weights_served),
    ("worker_spans_dropped", "Spans the trace collector did not take", lambda w: w.totals.spans_dropped),
    ("router_lease_expired", "Routers that stopped renewing", lambda w: w.totals.router_leases_expired),
)

_TIER_COUNTERS: tuple[tuple[str, str, Callable[[TierFigures], float]], ...] = (
    ("hits", "KV blocks brought back into the pool", lambda t: t.hits),
    ("misses", "KV blocks asked for and not held", lambda t: t.misses),
    ("loaded_bytes", "KV bytes brought back into the pool", lambda t: t.loaded),
    ("stored_bytes", "KV bytes taken in", lambda t: t.stored),
    ("evictions", "KV blocks that gave way to others", lambda t: t.evictions),
    ("dropped", "KV blocks that a full queue or a quick eviction kept out", lambda t: t.dropped),
    ("errors", "Failed reads and writes, and damaged blocks", lambda t: t.errors),
)


def fleet_metrics(workers: Workers) -> Iterator[Metric]:
    """Every metric of these workers."""
    for name, text, read in _GAUGES:
        yield _family(GaugeMetricFamily(f"penstock_{name}", text, labels=_BY_WORKER), workers, read)
    for name, text, read in _COUNTERS:
        yield _family(CounterMetricFamily(f"penstock_{name}", text, labels=_BY_WORKER), workers, read)
    yield _loaded(workers)
    yield _waiting(workers)
    yield _cache_config(workers)
    yield _processes(workers)
    yield from _failures(workers)
    yield from _tiers(workers)
    yield _histogram(
        "iteration_tokens_total",
        "Tokens computed per step",
        workers,
        STEP_TOKENS_UP_TO,
        lambda totals: (totals.steps_by_tokens, totals.step_tokens),
    )
    yield _histogram(
        "kv_transfer_seconds",
        "From the first block offered to the whole KV acknowledged",
        workers,
        TRANSFER_S_UP_TO,
        lambda totals: (totals.transfers_by_s, totals.transfer_s),
    )


def _family(
    family: GaugeMetricFamily | CounterMetricFamily, workers: Workers, read: Callable[[WorkerStatus], float]
) -> Metric:
    for worker in workers:
        family.add_metric(_names(worker), read(worker))
    return family


def _names(worker: WorkerStatus) -> list[str]:
    return [worker.id, worker.role.value]


def _loaded(workers: Workers) -> Metric:
    family = CounterMetricFamily(
        "penstock_weights_loaded_bytes", "Weights that rank 0 loaded, by where from", labels=(*_BY_WORKER, "source")
    )
    for worker in workers:
        family.add_metric([*_names(worker), "peer"], worker.totals.weights_from_peers)
        family.add_metric([*_names(worker), "disk"], worker.totals.weights_from_disk)
    return family


def _waiting(workers: Workers) -> Metric:
    family = GaugeMetricFamily(
        "penstock_num_requests_waiting_by_reason",
        "capacity: in the queue; deferred: admitted, waiting for KV from a peer",
        labels=(*_BY_WORKER, "reason"),
    )
    for worker in workers:
        family.add_metric([*_names(worker), "capacity"], worker.waiting)
        family.add_metric([*_names(worker), "deferred"], worker.totals.reserved)
    return family


def _cache_config(workers: Workers) -> Metric:
    labels = (*_BY_WORKER, "block_size", "num_blocks")
    family = GaugeMetricFamily("penstock_cache_config_info", "The KV pool's shape; always 1", labels=labels)
    for worker in workers:
        family.add_metric([*_names(worker), str(worker.kv_block_size), str(worker.kv_blocks)], 1)
    return family


def _processes(workers: Workers) -> Metric:
    family = GaugeMetricFamily(
        "penstock_worker_process_info", "The process of each rank; always 1", labels=(*_BY_WORKER, "rank", "pid")
    )
    for worker in workers:
        for rank, pid in enumerate(worker.pids):
            family.add_metric([*_names(worker), str(rank), str(pid)], 1)
    return family


def _failures(workers: Workers) -> Iterator[Metric]:
    failed = CounterMetricFamily(
        "penstock_kv_xfer_failed", "Transfer sessions that failed, both ends", labels=(*_BY_WORKER, "cause")
    )
    expired = CounterMetricFamily(
        "penstock_kv_lease_expired", "Transfer sessions whose lease ran out", labels=_BY_WORKER
    )
    abandoned = CounterMetricFamily(
        "penstock_kv_xfer_abandoned", "Transfer sessions given up on purpose", labels=_BY_WORKER
    )
    for worker in workers:
        counts = dict(zip(TransferCause, worker.totals.transfer_failures, strict=False))
        for cause in TransferCause:
            if cause not in _NO_FAILURE:
                failed.add_metric([*_names(worker), cause.value], counts.get(cause, 0))
        expired.add_metric(_names(worker), counts.get(TransferCause.LEASE_EXPIRED, 0))
        abandoned.add_metric(_names(worker), counts.get(TransferCause.ABANDONED, 0))
    yield from (failed, expired, abandoned)


def _tiers(workers: Workers) -> Iterator[Metric]:
    """By tier: host memory and disk below the pool."""
    labels = (*_BY_WORKER, "tier")
    held = GaugeMetricFamily("penstock_kv_tier_blocks", "KV blocks held below the pool", labels=labels)
    counters = [
        (CounterMetricFamily(f"penstock_kv_tier_{name}", text, labels=labels), read)
        for name, text, read in _TIER_COUNTERS
    ]
    slow = CounterMetricFamily(
        "penstock_kv_tier_loads_given_up", "Loads that computing would have beaten", labels=_BY_WORKER
    )
    for worker in workers:
        tiers = worker.totals.tiers
        slow.add_metric(_names(worker), tiers.slow)
        for tier, figures in (("host", tiers.host), ("disk", tiers.disk)):
            held.add_metric([*_names(worker), tier], figures.held)
            for family, read in counters:
                family.add_metric([*_names(worker), tier], read(figures))
    yield from (held, *(family for family, _ in counters), slow)


def _histogram(
    name: str,
    text: str,
    workers: Workers,
    bounds: Sequence[float],
    read: Callable[[WorkerTotals], tuple[Sequence[int], float]],
) -> Metric:
    """Counts per bound, the last one for what is larger; a worker that has said nothing yet has none."""
    family = HistogramMetricFamily(f"penstock_{name}", text, labels=_BY_WORKER)
    edges = [*(str(float(bound)) for bound in bounds), "+Inf"]
    for worker in workers:
        counts, total = read(worker.totals)
        if len(counts) != len(edges):
            counts = [0] * len(edges)
        family.add_metric(_names(worker), list(zip(edges, accumulate(counts), strict=True)), total)
    return family
