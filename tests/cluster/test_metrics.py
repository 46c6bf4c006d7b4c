"""The metrics page: names carry over from vLLM's, labels hold closed sets only, workers show as they are."""

from __future__ import annotations

import dataclasses
import re

from fakes.fake_generator import FakeFleet

from penstock.cluster.metrics import Metrics
from penstock.cluster.status import WorkerStatus
from penstock.router.journey import RequestReport
from penstock.router.trail import LIVE, MOVED_LIVE, AttemptTrail, Trail
from penstock.workers.protocol import EndReason, Role
from penstock.workers.totals import (
    STEP_TOKENS_UP_TO,
    TRANSFER_S_UP_TO,
    TierFigures,
    TierTotals,
    TransferCause,
    WorkerTotals,
)


def report(trail: Trail | None = None, **changed: object) -> RequestReport:
    trail = trail or Trail()
    fields: dict[str, object] = {
        "request_id": "r",
        "tenant": "t",
        "terminal": "completed",
        "end": EndReason.LENGTH,
        "prompt_tokens": 5,
        "generated_tokens": 6,
        "cached_tokens": 32,
        "predicted_cached_tokens": 48,
        "attempts": 2,
        "migrations": 1,
        "moves": 0,
        "recomputed_tokens": 7,
        "prefill_worker": "prefill-0",
        "decode_worker": "decode-0",
        "times": trail.times,
        "trail": trail,
    }
    return RequestReport(**{**fields, **changed})  # type: ignore[arg-type]


def page_of(metrics: Metrics) -> dict[str, float]:
    """Series -> value, labels without the model."""
    found = re.findall(r"^([^#\s]\S*) (\S+)$", metrics.page().decode(), re.MULTILINE)
    return {name.replace('model_name="m",', "").replace('{model_name="m"}', ""): float(value) for name, value in found}


def test_reports_and_workers() -> None:
    metrics, fleet = Metrics("m"), FakeFleet()
    metrics.watch(fleet)
    lost = AttemptTrail(1, "prefill-0", "decode-0", "split", 0.1, 0.002, 1.0, "worker_lost", {"first_token": 0.5})
    refused = AttemptTrail(2, "prefill-0", "decode-1", "split_cached", 1.0, 0.002, 1.1, "queue_full")
    times = {"started": 1.3, "first_token": 1.5, "handed_over": 1.625, "ended": 2.0}
    left = AttemptTrail(3, None, "decode-1", LIVE, 1.1, 0.002, 1.2, MOVED_LIVE)
    last = AttemptTrail(4, "prefill-0", "decode-2", "split_cached", 1.2, 0.002, 2.0, "completed", times)
    trail = Trail(10.0, {"started": 0.25, "first_token": 0.5, "ended": 2.0}, [lost, refused, left, last])
    metrics.report(report(trail, live_moves=1, moves_stayed=2))
    page = page_of(metrics)
    assert page['penstock_request_terminal_total{state="completed"}'] == 1
    assert page['penstock_request_terminal_total{state="internal"}'] == 0
    assert page['penstock_request_migrated_total{phase="transfer"}'] == 1
    assert page['penstock_request_migrated_total{phase="prefill"}'] == 0  # a refusal is none
    assert page['penstock_request_migrated_total{phase="decode"}'] == 0  # nor is one that went on with its KV
    moves = [page[f'penstock_live_moves_total{{outcome="{outcome}"}}'] for outcome in ("moved", "stayed", "failed")]
    assert moves == [1, 2, 0]
    assert page["penstock_recomputed_tokens_total"] == 7
    assert page["penstock_kv_hit_tokens_predicted_total"] == 48
    assert page["penstock_kv_hit_tokens_actual_total"] == 32
    assert page['penstock_router_choice_total{policy="prefix_load",reason="split_cached"}'] == 2
    assert page["penstock_router_decision_seconds_count"] == 4
    assert page["penstock_pd_handoff_seconds_sum"] == 0.125
    assert page['penstock_framework_overhead_seconds_count{stage="place"}'] == 1
    assert page["penstock_request_queue_time_seconds_sum"] == 0.25
    assert page["penstock_request_prefill_time_seconds_sum"] == 0.25
    assert page["penstock_request_decode_time_seconds_sum"] == 1.5
    assert page["penstock_request_inference_time_seconds_sum"] == 1.75
    assert page['penstock_num_requests_running{role="prefill",worker="prefill-0"}'] == 2
    fleet.statuses = [WorkerStatus("decode-7", Role.DECODE, 1, (), "restarting", restarts=3)]
    page = page_of(metrics)
    assert page['penstock_worker_up{role="decode",worker="decode-7"}'] == 0
    assert not any("prefill-0" in name for name in page)


def test_dropped_spans() -> None:
    metrics, fleet = Metrics("m"), FakeFleet()
    metrics.watch(fleet)
    fleet.statuses = [WorkerStatus("d", Role.DECODE, 1, (), "ready", totals=WorkerTotals(spans_dropped=7))]
    dropped = [3]
    metrics.watch_spans(lambda: dropped[0])
    assert page_of(metrics)["penstock_spans_dropped_total"] == 3
    dropped[0] = 4
    page = page_of(metrics)
    assert page["penstock_spans_dropped_total"] == 4
    assert page['penstock_worker_spans_dropped_total{role="decode",worker="d"}'] == 7


def test_a_request_that_was_cancelled_early_has_no_stages() -> None:
    metrics = Metrics("m")
    metrics.report(report(Trail(0.0, {"ended": 1.0}), terminal="cancelled"))
    page = page_of(metrics)
    assert page["penstock_request_queue_time_seconds_count"] == 0
    assert page['penstock_request_terminal_total{state="cancelled"}'] == 1


def test_what_workers_counted() -> None:
    metrics, fleet = Metrics("m", "vllm"), FakeFleet()
    metrics.watch(fleet)
    steps = [0] * (len(STEP_TOKENS_UP_TO) + 1)
    steps[0], steps[-1] = 5, 2
    sent = [0] * (len(TRANSFER_S_UP_TO) + 1)
    sent[1] = 3
    failures = tuple(int(cause is TransferCause.LEASE_EXPIRED) * 4 for cause in TransferCause)
    totals = WorkerTotals(1, tuple(steps), 40000, 1.5, 60, 1000, 750, tuple(sent), 0.002, 4096, 2, failures, 1)
    totals = dataclasses.replace(
        totals,
        blocks_lost=3,
        ranks_lost=1,
        experts_gone=4,
        expert_skew=1.25,
        weights_from_peers=70,
        weights_from_disk=30,
        weights_load_s=0.5,
        weights_served=11,
    )
    fleet.statuses = [
        WorkerStatus(
            "d",
            Role.DECODE,
            2,
            (70, 71),
            "ready",
            waiting=6,
            kv_blocks=9,
            kv_block_size=16,
            ranks_lost=1,
            totals=totals,
        )
    ]
    page = page_of(metrics)
    own = 'role="decode",worker="d"'
    assert page[f'penstock_iteration_tokens_total_bucket{{le="1.0",{own}}}'] == 5
    assert page[f'penstock_iteration_tokens_total_bucket{{le="16384.0",{own}}}'] == 5
    assert page[f'penstock_iteration_tokens_total_bucket{{le="+Inf",{own}}}'] == 7
    assert page[f"penstock_iteration_tokens_total_sum{{{own}}}"] == 40000
    assert page[f"penstock_worker_ranks{{{own}}}"] == 2
    assert page[f"penstock_worker_ranks_lost{{{own}}}"] == 1
    assert page[f"penstock_experts_gone{{{own}}}"] == 4
    assert page[f"penstock_expert_rank_skew{{{own}}}"] == 1.25
    assert page[f'penstock_worker_process_info{{pid="71",rank="1",{own}}}'] == 1
    assert page[f"penstock_kv_transfer_seconds_count{{{own}}}"] == 3
    assert page[f"penstock_kv_transfer_bytes_total{{{own}}}"] == 4096
    assert page[f"penstock_prefix_cache_hits_total{{{own}}}"] == 750
    assert page[f'penstock_kv_xfer_failed_total{{cause="lease_expired",{own}}}'] == 4
    assert page[f"penstock_kv_lease_expired_total{{{own}}}"] == 4
    assert page[f"penstock_router_lease_expired_total{{{own}}}"] == 1
    assert page[f'penstock_num_requests_waiting_by_reason{{reason="deferred",{own}}}'] == 1
    assert page['penstock_weights_loaded_bytes_total{role="decode",source="peer",worker="d"}'] == 70
    assert page['penstock_weights_loaded_bytes_total{role="decode",source="disk",worker="d"}'] == 30
    assert page[f"penstock_worker_weights_load_seconds{{{own}}}"] == 0.5
    assert page[f"penstock_weights_served_bytes_total{{{own}}}"] == 11
    assert page['vllm:num_requests_waiting_by_reason{engine="d",reason="capacity"}'] == 6
    assert page['vllm:cache_config_info{block_size="16",engine="d",num_gpu_blocks="9"}'] == 1


def test_what_tiers_counted() -> None:
    metrics, fleet = Metrics("m"), FakeFleet()
    metrics.watch(fleet)
    tiers = TierTotals(TierFigures(9, 8, 7, 6, 5, 4, 3, 2), TierFigures(errors=1), slow=12)
    fleet.statuses = [WorkerStatus("d", Role.DECODE, 1, (7,), "ready", totals=WorkerTotals(tiers=tiers))]
    page = page_of(metrics)
    host = '{role="decode",tier="host",worker="d"}'
    counters = ("hits", "misses", "loaded_bytes", "stored_bytes", "evictions", "dropped", "errors")
    assert [page[f"penstock_kv_tier_{name}_total{host}"] for name in counters] == [8, 7, 6, 5, 4, 3, 2]
    assert page[f"penstock_kv_tier_blocks{host}"] == 9
    assert page['penstock_kv_tier_errors_total{role="decode",tier="disk",worker="d"}'] == 1
    assert page['penstock_kv_tier_loads_given_up_total{role="decode",worker="d"}'] == 12


def test_aliases_can_be_left_out() -> None:
    assert b"vllm:" in Metrics("m", "vllm").page()
    assert b"vllm:" not in Metrics("m", "none").page()
    assert b"\nhttp_requests" not in Metrics("m", "none").page()


def test_statuses_of_the_http_alias_are_classes() -> None:
    metrics = Metrics("m", "vllm")
    for status in (400, 404, 200):
        metrics.answered("/v1/completions", "POST", status, 0.01)
    page = page_of(metrics)
    assert page['http_requests_total{handler="/v1/completions",method="POST",status="4xx"}'] == 2
    assert page['penstock_http_requests_total{handler="/v1/completions",method="POST",status="404"}'] == 1
    assert page['http_request_duration_seconds_count{handler="/v1/completions",method="POST"}'] == 3


def test_two_registries_do_not_meet() -> None:
    first, second = Metrics("m"), Metrics("m")
    first.prompt_tokens.inc(5)
    assert page_of(second)["penstock_prompt_tokens_total"] == 0


def test_status_survives_json() -> None:
    status = FakeFleet().statuses[0]
    assert WorkerStatus.from_json({**status.as_json(), "of_a_newer_server": 1}) == status
