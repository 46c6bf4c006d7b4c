"""What an attempt's end means for a request: retry, next candidate, suspicion, or the caller's error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from fakes.beliefs import fleet_of, welcome

from penstock.router.emission import Emission
from penstock.router.fleet import Fleet
from penstock.router.journey import AttemptError, Journey
from penstock.router.placement import Route
from penstock.router.port import Event, Lost
from penstock.router.settings import RetrySettings
from penstock.router.ticket import Ticket
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import (
    EndReason,
    Failed,
    FailureCode,
    GenerateRequest,
    PromptLogprobs,
    Role,
    SamplingParams,
)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock | None = None, max_tokens: int = 50, **settings: float) -> Journey:
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=max_tokens, stop_token_ids=(7,)))
    emission = Emission.for_request(request)
    ticket = Ticket("t", 0, emission, 10, 3, lambda: None)
    return Journey(request, emission, ticket, RetrySettings(**settings), clock or Clock())  # type: ignore[arg-type]


def on(journey: Journey, fleet: Fleet, route: Route) -> None:
    """Begin an attempt."""
    journey.attempt += 1
    journey.route = route
    journey.attempt_base = journey.emission.count
    journey.stakes = {
        name: fleet.stake(name, route.prefill_tokens if name == route.computes else 0, 1, 0.0) for name in route.workers
    }


LOCAL = Route(None, "a", 3, 3)
SPLIT = Route("p", "a", 3, 3)


def death(worker_id: str = "a") -> AttemptError:
    return AttemptError(worker_id, FailureCode.WORKER_LOST, "gone", died=True)


def fleet() -> Fleet:
    return fleet_of(welcome("a", Role.DECODE), welcome("b", Role.DECODE), welcome("p", Role.PREFILL))


def test_events_that_end_an_attempt() -> None:
    journey = make()
    with pytest.raises(AttemptError) as lost:
        journey.raise_if_over(Event("a", 1, Lost("broken pipe")))
    assert lost.value.died
    with pytest.raises(AttemptError) as failed:
        journey.raise_if_over(Event("a", 1, Failed(1, 1, FailureCode.QUEUE_FULL, "full", 2.0)))
    assert failed.value.refusal
    assert failed.value.retry_after_s == 2.0


def test_the_resumed_request_carries_what_is_out_and_the_time_left() -> None:
    clock = Clock()
    journey = make(clock, request_timeout_s=100.0)
    clock.now += 20
    assert journey.resumed().queue_timeout_s == pytest.approx(40)
    journey.emission.apply(0, 0, [5, 6])
    assert journey.resumed().emitted == (5, 6)
    assert journey.resumed().queue_timeout_s == pytest.approx(80)
    ask = journey.ask()
    assert (ask.context_tokens, ask.growth, ask.single) == (5, 48, False)


def test_a_request_without_caching_has_no_digests() -> None:
    request = GenerateRequest("r", (1,) * 32, SamplingParams(4), prefix_digests=bytes(64), cache_prefix=False)
    emission = Emission.for_request(request)
    journey = Journey(request, emission, Ticket("t", 0, emission, 1, 1, lambda: None), RetrySettings(), Clock())
    assert len(journey.digests) == 0
    assert journey.digests.dtype == np.uint64


def test_refusals_try_others_until_all_have_refused() -> None:
    journey = make()
    journey.survive(AttemptError("a", FailureCode.QUEUE_FULL, "full", retry_after_s=3.0))
    journey.survive(AttemptError("b", FailureCode.DRAINING, "draining"))
    assert set(journey.refused) == {"a", "b"}
    assert (journey.failures, journey.moves) == (0, 2)
    error = journey.refused_by_all()
    assert isinstance(error, RefusedError)
    assert (error.code, error.retry_after_s) == (FailureCode.OVERLOADED, 3.0)


def test_a_stream_that_runs_is_not_given_up_for_full_queues() -> None:
    journey = make()
    journey.emission.apply(0, 0, [5])
    journey.survive(AttemptError("a", FailureCode.QUEUE_FULL, "full"))
    assert journey.refused_by_all() is None
    assert journey.refused == {}


def test_a_move_is_no_refusal_by_the_worker() -> None:
    journey = make()
    journey.survive(AttemptError("a", FailureCode.QUEUE_FULL, "room elsewhere", moved=True))
    journey.survive(AttemptError("b", FailureCode.QUEUE_FULL, "full"))
    assert journey.refused_by_all() is None


def test_too_large_for_all_is_final_even_mid_stream() -> None:
    journey = make()
    journey.emission.apply(0, 0, [5])
    journey.survive(AttemptError("a", FailureCode.TOO_LARGE, "too large"))
    error = journey.refused_by_all()
    assert isinstance(error, RefusedError)
    assert error.code is FailureCode.TOO_LARGE


def test_bad_requests_are_the_callers_and_final() -> None:
    with pytest.raises(RequestError, match="field x"):
        make().survive(AttemptError("a", FailureCode.BAD_REQUEST, "field x"))


def test_failures_are_retried_elsewhere_and_bounded() -> None:
    journey = make(max_attempts=3)
    for _ in range(3):
        journey.survive(AttemptError("a", FailureCode.TRANSFER_FAILED, "lost"))
    assert journey.avoid == {"a"}
    with pytest.raises(RefusedError):
        journey.survive(AttemptError("a", FailureCode.TRANSFER_FAILED, "lost"))


def test_a_defect_that_follows_the_request_is_its_own() -> None:
    journey = make(max_internal_failures=2)
    journey.survive(AttemptError("a", FailureCode.INTERNAL, "defect"))
    with pytest.raises(RefusedError) as failed:
        journey.survive(AttemptError("b", FailureCode.INTERNAL, "defect"))
    assert failed.value.code is FailureCode.INTERNAL


def test_two_deaths_in_a_row_make_a_suspect_and_a_third_alone_condemns_it() -> None:
    journey, workers = make(), fleet()
    for _ in range(2):
        assert not journey.suspicion.suspect
        on(journey, workers, LOCAL)
        journey.survive(death())
    assert journey.suspicion.suspect
    assert not journey.suspicion.condemned
    on(journey, workers, LOCAL)
    journey.alone_on = "a"
    journey.survive(death())
    assert journey.suspicion.condemned


def test_workers_that_are_back_as_they_were_had_not_died_though_not_for_ever() -> None:
    journey, workers = make(), fleet()
    for _ in range(6):
        on(journey, workers, LOCAL)
        journey.survive(death())
        journey.suspicion.forgive(lambda worker_id, incarnation: (worker_id, incarnation) == ("a", 1))
    assert journey.suspicion.suspect
    assert not journey.suspicion.condemned
    other = make()
    on(other, workers, LOCAL)
    other.survive(death())
    other.suspicion.forgive(lambda worker_id, incarnation: (worker_id, incarnation) == ("a", 2))
    assert len(other.suspicion.deaths) == 1, "its successor lives"


def test_progress_clears_the_suspicion() -> None:
    journey, workers = make(), fleet()
    for index in range(8):
        on(journey, workers, LOCAL)
        journey.emission.apply(0, 4 * index, [1, 2, 3, 4])
        journey.survive(death())
        assert len(journey.suspicion.deaths) == 1
    assert not journey.suspicion.suspect


def test_who_was_not_computed_is_not_suspected() -> None:
    journey, workers = make(), fleet()
    on(journey, workers, SPLIT)
    journey.survive(death("a"))
    assert len(journey.suspicion.deaths) == 0, "decode only waited for the KV"
    workers.stake("p", 2000, 0, 0.0)
    on(journey, workers, SPLIT)
    journey.survive(death("p"))
    assert len(journey.suspicion.deaths) == 0, "it stood far back in the prefill queue"
    on(journey, fleet(), SPLIT)
    journey.survive(death("p"))
    assert len(journey.suspicion.deaths) == 1, "at the front it may have been started"
    on(journey, workers, SPLIT)
    journey.stakes["a"].started = True
    journey.survive(death("a"))
    assert len(journey.suspicion.deaths) == 2


def test_waits_end() -> None:
    clock = Clock()
    journey = make(clock, no_worker_timeout_s=5.0, request_timeout_s=200.0)
    journey.check_wait(False, clock.now)
    clock.now += 4
    journey.check_wait(True, clock.now)
    journey.check_wait(False, clock.now)
    clock.now += 4.9
    journey.check_wait(False, clock.now)
    clock.now += 0.2
    with pytest.raises(RefusedError) as refused:
        journey.check_wait(False, clock.now)
    assert refused.value.code is FailureCode.NO_WORKER
    clock.now += 60
    with pytest.raises(RefusedError) as refused:
        journey.check_wait(True, clock.now)
    assert refused.value.code is FailureCode.DEADLINE
    journey.emission.apply(0, 0, [1])
    journey.check_wait(True, clock.now)
    clock.now += 200
    with pytest.raises(RefusedError):
        journey.check_wait(True, clock.now)


def test_back_off_doubles_within_its_bound() -> None:
    journey = make(first_backoff_s=0.01, max_backoff_s=0.05)
    assert [journey.next_backoff(0.5) for _ in range(5)] == pytest.approx([0.01, 0.02, 0.04, 0.05, 0.05])
    assert journey.next_backoff(0.0) == pytest.approx(0.025)


def test_the_report_says_what_happened() -> None:
    clock = Clock()
    journey = make(clock)
    journey.mark("admitted")
    clock.now += 1.5
    journey.mark("admitted")
    journey.mark("ended")
    journey.route = SPLIT
    journey.emission.apply(0, 0, [1, 7], EndReason.STOP)
    report = journey.report("completed")
    assert report.times == {"admitted": 0.0, "ended": 1.5}
    assert (report.end, report.generated_tokens, report.prompt_tokens) == (EndReason.STOP, 2, 3)
    assert (report.prefill_worker, report.decode_worker) == ("p", "a")


def test_what_is_known_of_the_prompt_is_not_asked_again() -> None:
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(5, prompt_logprobs=0), prefix_digests=bytes(32))
    emission = Emission.for_request(request)
    ticket = Ticket("t", 0, emission, 10, 3, lambda: None)
    journey = Journey(request, emission, ticket, RetrySettings(), Clock())  # type: ignore[arg-type]
    assert len(journey.digests) == 0  # nobody's cache shortens the work
    emission.begin_attempt(1)
    none = np.zeros(0, np.int32)
    for start in (1, 2):
        assert journey.resumed().sampling.prompt_logprobs == 0
        column = np.array([-1.0], np.float32)
        emission.apply_scores(PromptLogprobs(1, 1, start, column, np.zeros(1, np.uint8), none, column[:0]))
    emission.apply(1, 0, [9])
    resumed = journey.resumed()
    assert resumed.sampling.prompt_logprobs is None
    assert resumed.emitted == (9,)
    assert request.sampling.prompt_logprobs == 0


def test_embeddings_are_asked_for_until_they_end() -> None:
    request = GenerateRequest("r", (1, 2, 3), SamplingParams(1), embed=True)
    emission = Emission.for_request(request)
    journey = Journey(request, emission, Ticket("t", 0, emission, 10, 3, lambda: None), RetrySettings(), Clock())  # type: ignore[arg-type]
    emission.begin_attempt(1)
    emission.apply_embedding(1, np.ones(2, np.float32))
    assert journey.resumed().embed
    assert journey.ask().single
