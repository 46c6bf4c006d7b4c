"""The metrics page: names carry over from vLLM's, labels hold closed sets only, workers show as they are."""

from __future__ import annotations

from fakes.fake_generator import FakeFleet

from penstock.cluster.metrics import Metrics
from penstock.cluster.status import WorkerStatus
from penstock.router.journey import RequestReport
from penstock.workers.protocol import EndReason, Role


def test_reports_and_workers() -> None:
    metrics, fleet = Metrics(), FakeFleet()
    metrics.watch(fleet)
    report = RequestReport(
        request_id="r",
        tenant="t",
        terminal="completed",
        end=EndReason.LENGTH,
        prompt_tokens=5,
        generated_tokens=6,
        cached_tokens=32,
        predicted_cached_tokens=48,
        attempts=2,
        migrations=1,
        moves=0,
        recomputed_tokens=7,
        prefill_worker="prefill-0",
        decode_worker="decode-0",
        times={},
    )
    metrics.report(report)
    page = metrics.page().decode()
    assert 'penstock_request_terminal_total{state="completed"} 1.0' in page
    assert "penstock_request_migrated_total 1.0" in page
    assert "penstock_recomputed_tokens_total 7.0" in page
    assert "penstock_prefix_tokens_predicted_total 48.0" in page
    assert "penstock_prefix_tokens_found_total 32.0" in page
    assert 'penstock_num_requests_running{role="prefill",worker="prefill-0"} 2.0' in page
    fleet.statuses = [WorkerStatus("decode-7", Role.DECODE, 1, (), "restarting", restarts=3)]
    page = metrics.page().decode()
    assert 'penstock_worker_up{role="decode",worker="decode-7"} 0.0' in page
    assert "prefill-0" not in page


def test_two_registries_do_not_meet() -> None:
    first, second = Metrics(), Metrics()
    first.prompt_tokens.inc(5)
    assert b"penstock_prompt_tokens_total 0.0" in second.page()


def test_status_survives_json() -> None:
    status = FakeFleet().statuses[0]
    assert WorkerStatus.from_json({**status.as_json(), "of_a_newer_server": 1}) == status
