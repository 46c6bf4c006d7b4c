"""Beliefs about workers: own counters exact, others' from heartbeats, verdicts on the silent and the stuck."""

from __future__ import annotations

import pytest
from fakes.beliefs import fleet_of, load, welcome
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.router.capacity import prefill_limit
from penstock.router.fleet import Fleet, Stake
from penstock.router.settings import HealthSettings
from penstock.workers.protocol import Role

IDS = ["a", "b", "c"]


class StakesMachine(RuleBasedStateMachine):
    """Workers come, go and report while attempts begin and end in any order: the counters stay the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = fleet_of()
        self.stakes: list[Stake] = []
        self.now = 0.0

    @rule(name=st.sampled_from(IDS))
    def join(self, name: str) -> None:
        self.fleet.join(welcome(name), self.now)

    @rule(name=st.sampled_from(IDS))
    def lose(self, name: str) -> None:
        self.fleet.lose(name)

    @precondition(lambda self: self.fleet.workers)
    @rule(data=st.data(), tokens=st.integers(0, 500), blocks=st.integers(0, 40))
    def begin(self, data: st.DataObject, tokens: int, blocks: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.fleet.workers)))
        self.stakes.append(self.fleet.stake(name, tokens, blocks, self.now))

    @precondition(lambda self: self.stakes)
    @rule(data=st.data(), close=st.booleans())
    def end(self, data: st.DataObject, close: bool) -> None:
        stake = data.draw(st.sampled_from(self.stakes))
        self.fleet.computed(stake, self.now)
        if close:
            self.fleet.close(stake)

    @rule(name=st.sampled_from(IDS), running=st.integers(0, 50), free=st.integers(0, 1000))
    def report(self, name: str, running: int, free: int) -> None:
        self.fleet.load_arrived(name, load(running=running, free_blocks=free))

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def sums_hold(self) -> None:
        self.fleet.check_integrity(self.stakes)
        for view in self.fleet.workers.values():
            assert view.prefill_sent - view.prefill_done == view.prefill_tokens >= 0
            assert view.free_blocks >= 0

    def teardown(self) -> None:
        for stake in self.stakes:
            self.fleet.close(stake)
        assert all((v.sequences, v.prefill_tokens, v.blocks) == (0, 0, 0) for v in self.fleet.workers.values())


TestStakes = StakesMachine.TestCase
TestStakes.settings = settings(deadline=None, max_examples=40, stateful_step_count=30)


def test_what_a_heartbeat_has_beyond_our_own_belongs_to_others() -> None:
    fleet = fleet_of(welcome("a"))
    view = fleet.workers["a"]
    stake = fleet.stake("a", 100, 10, 1.0)
    fleet.load_arrived("a", load(running=3, waiting=1, queued_prefill_tokens=250, free_blocks=900))
    assert (view.all_sequences, view.queued_tokens, view.free_blocks) == (4, 250, 900)
    fleet.close(stake)
    assert (view.all_sequences, view.queued_tokens, view.free_blocks) == (3, 150, 910)
    fleet.stake("a", 40, 5, 1.6)
    assert (view.all_sequences, view.queued_tokens, view.free_blocks) == (4, 190, 905)


def test_the_check_checks() -> None:
    fleet = fleet_of(welcome("a"))
    stake = fleet.stake("a", 100, 10, 1.0)
    fleet.workers["a"].blocks += 1
    with pytest.raises(ValueError, match="a: counters"):
        fleet.check_integrity([stake])


def looks(fleet: Fleet, first_s: float, every_s: float, count: int) -> list[float]:
    """When, of so many looks, somebody was to be given up."""
    return [now for now in (first_s + look * every_s for look in range(count)) if fleet.overdue(now)]


def patient_fleet() -> Fleet:
    return fleet_of(welcome("a"), settings=HealthSettings(heartbeat_timeout_s=2.0))


def test_silence_is_a_verdict() -> None:
    fleet = patient_fleet()
    assert looks(fleet, 0.0, 0.25, 8) == []
    fleet.load_arrived("a", load())  # after 1.75 s
    assert looks(fleet, 2.0, 0.25, 8) == []
    assert looks(fleet, 4.0, 0.25, 2) == [4.25]


def test_whatever_a_worker_says_is_a_sign_of_life() -> None:
    fleet = patient_fleet()
    for turn in range(20):
        assert looks(fleet, turn * 1.5, 0.25, 6) == []
        fleet.heard("a")


def test_our_own_sleep_is_not_the_workers_silence() -> None:
    """Its heartbeats are in this process's sockets: the loop reads them before the next look."""
    fleet = patient_fleet()
    assert looks(fleet, 0.0, 0.25, 8) == []
    assert fleet.overdue(60.0) == []
    fleet.heard("a")
    assert looks(fleet, 60.25, 0.25, 8) == []
    assert looks(fleet, 62.25, 0.25, 2) == [62.5]


def test_a_starved_process_looks_more_than_twice_before_it_gives_up() -> None:
    """With a look every 0.9 s, two of them would span the 2 s of a worker whose words wait in the sockets."""
    fleet = patient_fleet()
    assert looks(fleet, 0.0, 0.9, 8) == []
    assert fleet.overdue(8 * 0.9), "but it does give up"


@pytest.mark.parametrize(
    ("predicted_s", "age_s", "stuck"),
    [(0.01, 4.9, False), (0.01, 5.1, True), (3.0, 8.9, False), (3.0, 9.1, True), (0.0, 50.0, False), (0.0, 61.0, True)],
)
def test_a_step_is_judged_by_its_prediction(predicted_s: float, age_s: float, stuck: bool) -> None:
    fleet = fleet_of(welcome("a"))
    fleet.overdue(0.0)
    fleet.load_arrived("a", load(predicted_step_s=predicted_s, step_age_s=age_s, running=1))
    assert bool(fleet.overdue(0.2)) is stuck


def test_a_drain_is_for_good() -> None:
    """The engine says it at once; a heartbeat whose figures are from before may be sent after."""
    fleet = fleet_of(welcome("a"), welcome("b"))
    fleet.load_arrived("a", load(draining=True))
    version = fleet.version
    fleet.load_arrived("a", load())
    assert fleet.workers["a"].draining
    assert fleet.version == version


def test_usable_leaves_out_the_draining_the_claimed_and_the_broken() -> None:
    fleet = fleet_of(*(welcome(name) for name in "abcd"), welcome("p", Role.PREFILL))
    fleet.load_arrived("a", load(draining=True))
    fleet.workers["b"].claimed_by = "r1"
    for _ in range(3):
        fleet.workers["c"].breaker.failed(0.0)
    assert [view.worker_id for view in fleet.usable((Role.MIXED,), 0.5)] == ["d"]
    assert [view.worker_id for view in fleet.usable((Role.PREFILL, Role.MIXED), 5.0)] == ["c", "d", "p"]
    assert [view.worker_id for view in fleet.alive((Role.MIXED,))] == ["b", "c", "d"]


def test_a_breaker_outlives_its_worker() -> None:
    fleet = fleet_of(welcome("a"))
    for _ in range(3):
        fleet.workers["a"].breaker.failed(0.0)
    fleet.lose("a")
    fleet.join(welcome("a"), 0.1)
    assert fleet.usable((Role.MIXED,), 0.2) == []


def test_breakers_of_the_gone_are_bounded() -> None:
    fleet = fleet_of()
    for number in range(1000):
        fleet.join(welcome(f"w{number}"), 0.0)
        fleet.lose(f"w{number}")
    assert len(fleet._breakers) < 100


def test_the_prefill_rate_is_measured_while_busy() -> None:
    fleet = fleet_of(welcome("a"))
    view = fleet.workers["a"]
    assert view.tokens_per_s is None
    assert prefill_limit(view, 4.0) == 8 * 512
    now = 100.0
    for _ in range(20):
        first, second = fleet.stake("a", 1000, 0, now), fleet.stake("a", 1000, 0, now)
        fleet.computed(first, now + 0.5)
        fleet.computed(second, now + 1.0)
        now += 50.0  # idle in between does not count
    assert view.tokens_per_s == pytest.approx(2000)
    assert prefill_limit(view, 4.0) == pytest.approx(8000)


def test_recent_work_halves_and_newcomers_start_level() -> None:
    fleet = fleet_of(welcome("a"))
    view = fleet.workers["a"]
    fleet.add_work(view, 1000, 0.0)
    assert fleet.recent_work(view, 60.0) == pytest.approx(500)
    fleet.join(welcome("b"), 60.0)
    assert fleet.recent_work(fleet.workers["b"], 60.0) == pytest.approx(500)


def test_tokens_ahead_shrink_as_they_are_computed() -> None:
    fleet = fleet_of(welcome("a"))
    first, second = fleet.stake("a", 300, 0, 0.0), fleet.stake("a", 200, 0, 0.0)
    assert (first.tokens_ahead, second.tokens_ahead) == (0, 300)
    fleet.computed(first, 1.0)
    assert second.tokens_ahead == 0


def test_a_worker_of_a_width_that_cannot_exchange_kv_is_refused_until_the_others_have_been_gone_for_a_while() -> None:
    fleet = fleet_of()
    assert fleet.join(welcome("p", Role.PREFILL, width=4), 0.0)
    assert fleet.join(welcome("d", Role.DECODE, width=2), 0.0)
    assert not fleet.join(welcome("odd", Role.DECODE, width=3), 1.0)
    assert not fleet.join(welcome("odd", Role.DECODE, width=3), 2.0), "its stream broke and came back"
    assert fleet.join(welcome("m", Role.MIXED, width=3), 1.0), "serves by itself"
    assert (set(fleet.workers), set(fleet.refused)) == ({"p", "d", "m"}, {"odd"})
    assert "with p" in fleet.refused["odd"].reason
    assert "widths 3 and 4: neither divides the other" in fleet.refused["odd"].reason
    assert "odd" not in [view.worker_id for view in fleet.alive(Role)]

    lost = fleet.lose("p")
    assert lost is not None
    fleet.expect_back(lost, 10.0)
    assert fleet.reconsider(20.0) == [], "p is being restarted, and must find its partners as they were"
    assert fleet.join(welcome("p", Role.PREFILL, width=4), 21.0)
    lost = fleet.lose("p")
    assert lost is not None
    fleet.expect_back(lost, 30.0)
    assert [each.worker_id for each in fleet.reconsider(100.0)] == ["odd"]
    assert (set(fleet.workers), fleet.refused) == ({"d", "m", "odd"}, {})
    assert not fleet.join(welcome("p", Role.PREFILL, width=4), 101.0)
    fleet.lose("p")
    assert fleet.refused == {}
