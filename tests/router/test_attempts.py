"""The bookkeeping of attempts: stakes, blame, claims, moves and prompts in transit."""

from __future__ import annotations

import pytest
from fakes.beliefs import load, welcome

from penstock.router.emission import Emission
from penstock.router.journey import AttemptError, Journey
from penstock.router.placement import Route
from penstock.router.router import Router
from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.router.suspicion import Death
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import EndReason, FailureCode, GenerateRequest, KVSnapshot, Role, SamplingParams

ROLES = {"p0": Role.PREFILL, "p1": Role.PREFILL, "d0": Role.DECODE, "d1": Role.DECODE}


class Bench:
    def __init__(self, roles: dict[str, Role] = ROLES) -> None:
        self.now = 10.0
        self.woken: list[str] = []
        self.router = Router(RouterSettings(placement=PlacementSettings(local_prefill_tokens=0)))
        for name, role in roles.items():
            self.router.worker_joined(welcome(name, role), self.now)
            self.router.kv_snapshot(name, KVSnapshot(0, b""))
        self.attempts = self.router.attempts

    def begin(self, name: str, prompt_tokens: int = 320, max_tokens: int = 50, emitted: int = 0) -> Journey:
        digests = b"".join(bytes([i % 256, i // 256]) * 16 for i in range(1, prompt_tokens // 16 + 1))
        sampling = SamplingParams(max_tokens, stop_token_ids=(7,))
        request = GenerateRequest(name, (1,) * prompt_tokens, sampling, prefix_digests=digests)
        emission = Emission.for_request(request)
        journey = self.router.begin(request, emission, lambda: self.woken.append(name), lambda: self.now)
        self.router.enter(journey)
        emission.tokens.extend([3] * emitted)
        return journey

    def place(self, journey: Journey) -> Route:
        route = self.attempts.place(journey)
        assert route is not None
        return route

    def held(self) -> int:
        self.router.check_integrity()
        return sum(view.sequences for view in self.router.fleet.workers.values())


def lost(worker_id: str) -> AttemptError:
    return AttemptError(worker_id, FailureCode.WORKER_LOST, "gone", died=True)


def test_an_attempt_holds_what_it_was_given_and_gives_it_back() -> None:
    bench = Bench()
    journey = bench.begin("r")
    route = bench.place(journey)
    assert route.split
    assert bench.held() == 2
    assert journey.attempt == journey.emission.attempt == 1
    assert journey.stakes[route.computes].prefill_tokens == 320
    assert route.decode is not None
    assert journey.stakes[route.decode].blocks == -(-(320 + 50) // 16)
    journey.emission.apply(1, 0, [5])
    assert bench.router.fleet.workers[route.computes].prefill_tokens == 0
    bench.router.finish(journey)
    assert bench.held() == 0


def test_the_first_token_makes_decode_the_owner_and_siblings_wait_for_it() -> None:
    bench = Bench()
    first, sibling, stranger = bench.begin("first"), bench.begin("sibling"), bench.begin("stranger", 160)
    route = bench.place(first)
    assert bench.attempts.sibling_wait(sibling) == 0
    first.emission.apply(1, 0, [5])
    held = bench.router.index.match(first.digests, bench.now)
    assert held[route.decode or ""] == 20
    assert bench.attempts.sibling_wait(sibling) == pytest.approx(0.25)
    assert bench.attempts.sibling_wait(stranger) == 0
    first.emission.apply(1, 1, [6])
    assert bench.woken[-1] == "sibling"
    assert bench.attempts.sibling_wait(sibling) == 0


def test_a_first_token_that_ends_it_hands_nothing_over() -> None:
    bench = Bench()
    first, sibling = bench.begin("first"), bench.begin("sibling")
    route = bench.place(first)
    first.emission.apply(1, 0, [7], EndReason.STOP)
    assert (route.decode or "") not in bench.router.index.match(first.digests, bench.now)
    assert bench.attempts.sibling_wait(sibling) == 0


def test_only_the_first_start_counts_as_cache_use() -> None:
    bench = Bench()
    journey = bench.begin("r")
    route = bench.place(journey)
    bench.attempts.started(journey, route.computes, 64)
    bench.attempts.started(journey, route.computes, 320)
    assert journey.emission.cached_tokens == 64
    assert journey.stakes[route.computes].started


def test_a_failed_attempt_is_blamed_on_its_worker_unless_its_partner_is_gone() -> None:
    bench = Bench()
    journey = bench.begin("r")
    for _ in range(3):
        route = bench.place(journey)
        bench.router.worker_lost(route.prefill or "", "killed", bench.now)
        bench.attempts.interrupted(journey, AttemptError(route.decode or "", FailureCode.TRANSFER_FAILED, "lost"))
        bench.router.worker_joined(welcome(route.prefill or "", Role.PREFILL), bench.now)
    assert all(bench.router.fleet.workers[name].breaker.closed(bench.now) for name in ("d0", "d1"))
    for _ in range(4):
        fail(bench, Route("p0", "d0", 10, 10), AttemptError("d0", FailureCode.INTERNAL, "a defect"))
    assert not bench.router.fleet.workers["d0"].breaker.closed(bench.now)


def fail(bench: Bench, route: Route, cause: AttemptError) -> None:
    journey = bench.begin("s")
    bench.attempts._begin(journey, route, bench.now)
    bench.attempts.interrupted(journey, cause)
    bench.router.finish(journey)


def fail_to_hand_over(bench: Bench, prefill: str, decode: str, times: int) -> None:
    for _ in range(times):
        fail(bench, Route(prefill, decode, 10, 10), AttemptError(decode, FailureCode.TRANSFER_FAILED, "lost"))


def open_breakers(bench: Bench) -> list[str]:
    return [name for name, view in bench.router.fleet.workers.items() if not view.breaker.closed(bench.now)]


def test_a_failed_hand_over_is_blamed_on_the_pair_and_on_who_fails_with_others_too() -> None:
    bench, pairs = Bench(), lambda: bench.router.fleet.pairs
    fail_to_hand_over(bench, "p0", "d0", 10)
    assert open_breakers(bench) == []
    assert not pairs().closed("p0", "d0", bench.now)
    ask, choose = bench.begin("r").ask(), bench.router.placement.choose
    routes = {avoided: choose(ask, bench.now, {avoided}) for avoided in ROLES}
    chosen = {avoided: (route.prefill, route.decode) for avoided, route in routes.items() if route is not None}
    assert chosen["p0"] in (("p1", "d0"), ("p1", "d1"))
    assert chosen["p1"] == ("p0", "d1")
    assert chosen["d1"] == ("p1", "d0"), "though p0 would be as good, and comes first half of the time"
    fail_to_hand_over(bench, "p0", "d1", 3)
    assert open_breakers(bench) == ["p0"], "it fails with both"
    assert len(pairs()) == 2
    bench.router.worker_lost("p0", "killed", bench.now)
    assert len(pairs()) == 0


def fail_by_damage(bench: Bench, prefill: str, decode: str) -> None:
    fail(bench, Route(prefill, decode, 10, 10), AttemptError(decode, FailureCode.KV_DAMAGED, "wrong digests"))


def test_who_sends_damaged_kv_gets_no_prompts_for_a_while() -> None:
    bench = Bench()
    for decode in ("d0", "d1", "d0"):
        assert not bench.router.fleet.quarantine.holds("p0", bench.now)
        fail_by_damage(bench, "p0", decode)
    assert bench.router.fleet.quarantine.holds("p0", bench.now)
    bench.now += 29.0
    bench.router.worker_lost("p0", "its stream broke", bench.now)
    bench.router.worker_joined(welcome("p0", Role.PREFILL), bench.now)
    assert {bench.place(bench.begin(f"r{number}")).prefill for number in range(10)} == {"p1"}
    ask, choose = bench.begin("s").ask(), bench.router.placement.choose
    assert choose(ask, bench.now, {"p1"}) in (Route(None, "d0", 320, 320), Route(None, "d1", 320, 320))
    bench.now += 1.0
    route = choose(ask, bench.now, {"p1"})
    assert route is not None
    assert route.prefill == "p0"


def test_a_receiver_that_damages_what_all_send_puts_nobody_into_quarantine() -> None:
    bench = Bench()
    for _ in range(10):
        for prefill in ("p0", "p1"):
            fail_by_damage(bench, prefill, "d0")
    assert not any(bench.router.fleet.quarantine.holds(name, bench.now) for name in ("p0", "p1"))
    assert open_breakers(bench) == ["d0"]


def test_a_pair_comes_back_with_its_trial() -> None:
    bench = Bench({"p0": Role.PREFILL, "d0": Role.DECODE})
    fail_to_hand_over(bench, "p0", "d0", 3)
    assert bench.place(bench.begin("r")) == Route(None, "d0", 320, 320), "decode prefills meanwhile"
    bench.now += 1.0
    trial, other = bench.begin("trial"), bench.begin("other")
    route = bench.place(trial)
    assert route.split
    assert not bench.place(other).split, "the trial is under way"
    trial.emission.apply(1, 0, [5])
    assert len(bench.router.fleet.pairs) == 1
    trial.emission.apply(1, 1, [6])
    assert len(bench.router.fleet.pairs) == 0
    assert bench.place(bench.begin("s")).split


def test_a_last_token_without_its_end_concludes() -> None:
    bench = Bench()
    for tokens, wanted in (([1, 2], EndReason.LENGTH), ([1, 7], EndReason.STOP)):
        journey = bench.begin("r", max_tokens=2)
        route = bench.place(journey)
        journey.emission.apply(1, 0, tokens)
        assert bench.attempts.interrupted(journey, lost(route.decode or "")) == 0
        assert journey.emission.end is wanted
        bench.router.finish(journey)


def test_refused_by_all_and_none_left() -> None:
    bench = Bench()
    journey = bench.begin("r")
    for _ in range(2):
        route = bench.place(journey)
        pause = bench.attempts.interrupted(journey, AttemptError(route.decode or "", FailureCode.QUEUE_FULL, "full"))
        assert pause == 0
    with pytest.raises(RefusedError) as refused:
        bench.attempts.place(journey)
    assert refused.value.code is FailureCode.OVERLOADED
    bench.router.finish(journey)
    assert bench.attempts.homeless == 0


def test_the_homeless_are_woken_by_a_newcomer() -> None:
    bench = Bench({"d0": Role.DECODE})
    journey = bench.begin("r")
    bench.router.worker_lost("d0", "killed", bench.now)
    assert bench.attempts.place(journey) is None
    assert bench.attempts.homeless == 1
    before = len(bench.woken)
    bench.router.worker_joined(welcome("d1", Role.DECODE), bench.now)
    assert len(bench.woken) > before
    assert bench.place(journey).decode == "d1"
    assert bench.attempts.homeless == 0


def test_a_suspect_waits_for_an_empty_worker_and_gets_it_alone() -> None:
    bench = Bench()
    neighbour, suspect = bench.begin("neighbour", 64), bench.begin("suspect")
    suspect.suspicion.deaths = [Death("d0", 0, 0.0)] * 2
    other = bench.place(neighbour).decode
    claimed = "d1" if other == "d0" else "d0"
    route = bench.place(suspect)
    assert route == Route(None, claimed, 320, 320)
    assert bench.place(bench.begin("next")).decode == other
    for index in range(4):
        suspect.emission.apply(1, index, [1])
        bench.attempts.watch(suspect)
    assert suspect.suspicion.deaths == []
    assert bench.router.fleet.workers[claimed].claimed_by is None
    bench.router.check_integrity()


def test_a_suspect_does_not_wait_for_ever() -> None:
    bench = Bench({"d0": Role.DECODE})
    neighbour, suspect = bench.begin("neighbour"), bench.begin("suspect")
    suspect.suspicion.deaths = [Death("d0", 0, 0.0)] * 2
    bench.place(neighbour)
    assert bench.attempts.place(suspect) is None
    assert bench.attempts.place(bench.begin("next")) is None, "the worker runs empty for the suspect"
    bench.now += 2.5
    assert bench.place(suspect).decode == "d0"
    bench.router.finish(suspect)
    assert bench.router.fleet.workers["d0"].claimed_by is None


def test_a_move_needs_room_elsewhere() -> None:
    bench = Bench()
    journey = bench.begin("r")
    route = bench.place(journey)
    other = "d1" if route.decode == "d0" else "d0"
    bench.router.load_arrived(other, load(free_blocks=0), bench.now)
    bench.router.load_arrived(route.decode, load(free_blocks=0), bench.now)
    bench.attempts.check_move(journey)
    bench.router.load_arrived(other, load(free_blocks=1000), bench.now)
    with pytest.raises(AttemptError) as moved:
        bench.attempts.check_move(journey)
    assert moved.value.moved
