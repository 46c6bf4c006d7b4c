"""What is remembered of a request's way: stages once each, attempts with their ends, and not too many of them."""

from __future__ import annotations

from fakes.beliefs import welcome

from penstock.router.emission import Emission
from penstock.router.journey import RequestReport
from penstock.router.router import Router
from penstock.router.settings import RouterSettings
from penstock.router.trail import MAX_KEPT, AttemptTrail, Trail
from penstock.workers.protocol import EndReason, GenerateRequest, Role, SamplingParams
from penstock.workers.trace_context import TraceContext


def attempt(number: int, prefill: str | None = "p", decode: str | None = "d") -> AttemptTrail:
    return AttemptTrail(number, prefill, decode, "split", float(number))


def test_stages_count_once_over_all_and_once_per_attempt() -> None:
    trail = Trail()
    trail.mark("admitted", 0.5)
    trail.begin(attempt(1))
    trail.mark("placed", 1.0)
    trail.mark("placed", 1.5)
    trail.end(2.0, "worker_lost")
    trail.end(2.5, "internal")  # over already
    trail.begin(attempt(2))
    trail.mark("placed", 3.0)
    assert trail.times == {"admitted": 0.5, "placed": 1.0}
    assert [each.times for each in trail.attempts] == [{"placed": 1.0}, {"placed": 3.0}]
    assert (trail.attempts[0].ended, trail.attempts[0].end) == (2.0, "worker_lost")


def test_phases() -> None:
    split, local = attempt(1), attempt(1, None, "d")
    assert (split.phase, local.phase) == ("prefill", "prefill")
    split.times["first_token"] = local.times["first_token"] = 1.0
    assert (split.phase, local.phase) == ("transfer", "decode")
    split.times["handed_over"] = 2.0
    assert split.phase == "decode"


def test_only_so_many_attempts_are_kept() -> None:
    trail = Trail()
    for number in range(1, 100):
        trail.begin(attempt(number, f"p{number % 3}"))
    assert len(trail.attempts) == MAX_KEPT
    assert (trail.attempts[0].number, trail.attempts[-1].number) == (1, 99)
    assert trail.workers == ("p1", "d", "p2", "p0")


def begun(reports: list[RequestReport], traceparent: str = "") -> tuple[Router, Emission]:
    router = Router(RouterSettings(), observe=reports.append)
    router.worker_joined(welcome("w", Role.MIXED), 0.0)
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(4), traceparent=traceparent)
    emission = Emission.for_request(request)
    journey = router.begin(request, emission, lambda: None, lambda: 1.0)
    router.enter(journey)
    router.attempts.place(journey)
    router_journeys = list(router._journeys)
    assert router_journeys == [journey]
    return router, emission


def test_a_reader_who_leaves_with_the_end_has_not_cancelled() -> None:
    reports: list[RequestReport] = []
    router, emission = begun(reports)
    (journey,) = router._journeys
    emission.apply(1, 0, (5, 6, 7, 8), EndReason.LENGTH)
    router.finish(journey)
    assert [report.terminal for report in reports] == ["completed"]
    assert reports[0].trail.attempts[0].choice == "local"


def test_a_reader_who_leaves_early_has() -> None:
    reports: list[RequestReport] = []
    router, emission = begun(reports)
    (journey,) = router._journeys
    emission.apply(1, 0, (5,))
    router.finish(journey)
    assert [report.terminal for report in reports] == ["cancelled"]
    assert reports[0].trail.attempts[0].end == "cancelled"


def test_workers_are_told_the_attempt_as_their_parent() -> None:
    reports: list[RequestReport] = []
    parent = TraceContext(9, 10)
    router, _ = begun(reports, parent.header())
    (journey,) = router._journeys
    first = journey.resumed().traceparent
    journey.attempt = 2
    assert first != journey.resumed().traceparent
    assert {header.split("-")[1] for header in (first, journey.resumed().traceparent)} == {f"{9:032x}"}
    untraced, _ = begun(reports)
    (journey,) = untraced._journeys
    assert journey.resumed().traceparent == ""
