"""The router object: what links feed reaches every part, and every request is reported once."""

from __future__ import annotations

import pytest
from fakes.beliefs import load, welcome

from penstock.router.emission import Emission
from penstock.router.journey import Journey, RequestReport
from penstock.router.router import Router
from penstock.router.settings import RouterSettings
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import (
    FailureCode,
    GenerateRequest,
    KVEvents,
    KVSnapshot,
    Role,
    SamplingParams,
)


def begin(router: Router, name: str = "r", max_tokens: int = 5) -> Journey:
    request = GenerateRequest(name, (1, 2, 3), SamplingParams(max_tokens))
    return router.begin(request, Emission.for_request(request), lambda: None, lambda: 5.0)


def test_join_events_loss() -> None:
    router = Router(RouterSettings())
    router.worker_joined(welcome("a"), 0.0)
    router.kv_snapshot("a", KVSnapshot(4, b""))
    assert not router.kv_events("a", KVEvents(5, bytes(8), b""))
    assert router.kv_events("a", KVEvents(7, b"", b""))
    assert router.index.degraded() == ["a"]
    router.worker_lost("a", "killed", 1.0)
    router.worker_lost("a", "killed", 1.0)
    assert router.fleet.workers == {}
    assert router.index.degraded() == []


def test_a_change_of_the_fleet_opens_the_gate() -> None:
    router = Router(RouterSettings())
    journey = begin(router)
    router.enter(journey)
    assert not journey.ticket.admitted
    router.worker_joined(welcome("a"), 0.0)
    assert journey.ticket.admitted


def test_draining_is_a_change_and_a_plain_heartbeat_is_not() -> None:
    router = Router(RouterSettings())
    router.worker_joined(welcome("a"), 0.0)
    version = router.fleet.version
    router.load_arrived("a", load(), 0.5)
    assert router.fleet.version == version
    router.load_arrived("a", load(draining=True), 1.0)
    assert router.fleet.version == version + 1


def test_overdue_asks_the_fleet() -> None:
    router = Router(RouterSettings())
    router.worker_joined(welcome("a"), 0.0)
    found = [router.overdue(look * 0.25) for look in range(11)]
    assert [worker_id for worker_id, _ in found[-1]] == ["a"]
    assert not any(found[:-2])


@pytest.mark.parametrize(
    ("error", "terminal"),
    [
        (RefusedError(FailureCode.OVERLOADED, "full"), "overloaded"),
        (RequestError("prompt: empty", "prompt"), "bad_request"),
        (RuntimeError("a defect"), "internal"),
    ],
)
def test_a_failure_is_reported_once(error: Exception, terminal: str) -> None:
    reports: list[RequestReport] = []
    router = Router(RouterSettings(), observe=reports.append)
    journey = begin(router)
    router.fail(journey, error)
    router.finish(journey)
    assert [report.terminal for report in reports] == [terminal]


def test_what_ends_without_a_word_was_cancelled() -> None:
    reports: list[RequestReport] = []
    router = Router(RouterSettings(), observe=reports.append)
    journey = begin(router)
    router.enter(journey)
    router.finish(journey)
    assert [report.terminal for report in reports] == [FailureCode.CANCELLED]
    assert router.admission.waiting == 0


def test_who_serves_depends_on_what_is_left_to_do() -> None:
    router = Router(RouterSettings())
    router.worker_joined(welcome("p", Role.PREFILL), 0.0)
    single, longer = begin(router, max_tokens=1), begin(router, max_tokens=5)
    router.check_wait(single)
    router.check_wait(longer)
    assert single.unserved_since is None
    assert longer.unserved_since == 5.0


def test_the_check_checks() -> None:
    router = Router(RouterSettings())
    router.worker_joined(welcome("a"), 0.0)
    router.fleet.workers["a"].claimed_by = "nobody"
    with pytest.raises(ValueError, match="claimed"):
        router.check_integrity()


def test_equal_seeds_choose_equally() -> None:
    def choices(seed: int) -> list[str | None]:
        router = Router(RouterSettings(), seed=seed)
        for number in range(8):
            router.worker_joined(welcome(f"w{number}"), 0.0)
        journey = begin(router)
        routes = [router.placement.choose(journey.ask(), 0.0) for _ in range(10)]
        return [route.decode for route in routes if route is not None]

    assert choices(1) == choices(1)
    assert choices(1) != choices(2)
