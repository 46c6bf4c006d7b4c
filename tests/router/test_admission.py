"""The gate: bounds, order, urgency, what it lets in, and its sums."""

from __future__ import annotations

from typing import Any

import pytest
from fakes.beliefs import emission_of, fleet_of, load, welcome
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.router.admission import Admission
from penstock.router.fleet import Fleet
from penstock.router.forecast import Turnover
from penstock.router.settings import AdmissionSettings
from penstock.router.ticket import Ticket, growth_of
from penstock.workers.errors import RefusedError
from penstock.workers.protocol import FailureCode, Role


def ticket(tenant: str = "t", prefill: int = 10, growth: int = 10, priority: int = 0) -> Ticket:
    return Ticket(tenant, priority, emission_of(), growth, prefill, lambda: None)


class Fast(Turnover):
    def per_s(self, assumed_s: float) -> float:
        return 1000.0


def gate(fleet: Fleet, **fields: Any) -> Admission:
    """Of a fleet that is known to work so fast that nobody would come too late."""
    admission = Admission(AdmissionSettings(**({"admit_ratio": 1.0} | fields)), fleet, lambda: 0.5)
    admission._forecast.turnover = Fast()
    return admission


class GateMachine(RuleBasedStateMachine):
    """Any order of arrivals, ends, migrations and fleet changes: sums hold, and nobody waits beside free room."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = fleet_of(welcome("a", max_num_seqs=3, max_num_batched_tokens=64))
        self.gate = gate(self.fleet, max_waiting=8, max_waiting_per_tenant=4)
        self.tickets: list[Ticket] = []

    @rule(tenant=st.sampled_from("xyz"), prefill=st.integers(1, 400), priority=st.integers(0, 2))
    def arrive(self, tenant: str, prefill: int, priority: int) -> None:
        new = ticket(tenant, prefill, 20, priority)
        try:
            self.gate.arrive(new, 0.0)
        except RefusedError:
            return
        self.tickets.append(new)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), what=st.sampled_from(["leave", "computed", "reenter", "emit"]))
    def progress(self, data: st.DataObject, what: str) -> None:
        chosen = data.draw(st.sampled_from(self.tickets))
        if what == "leave":
            self.gate.leave(chosen, 0.0)
            self.gate.leave(chosen, 0.0)
            self.tickets.remove(chosen)
        elif not (chosen.inside and chosen.admitted):
            return
        elif what == "computed":
            self.gate.computed(chosen)
        elif what == "reenter":
            self.gate.reenter(chosen, 30)
        else:
            chosen.emission.tokens.append(1)

    @rule(name=st.sampled_from("ab"), join=st.booleans())
    def change_fleet(self, name: str, join: bool) -> None:
        if join:
            self.fleet.join(welcome(name, max_num_seqs=3, max_num_batched_tokens=64), 0.0)
        else:
            self.fleet.lose(name)
        self.gate.wake_all()

    @invariant()
    def sums_hold(self) -> None:
        self.gate.check_integrity()
        assert self.gate.waiting <= 8 + len(self.gate._urgent)
        assert self.gate.inside + self.gate.waiting - len(self.gate._urgent) == len(self.tickets)

    @invariant()
    def nobody_waits_beside_an_empty_house(self) -> None:
        if self.fleet.workers and not self.gate.inside:
            assert self.gate.waiting == 0

    def teardown(self) -> None:
        for each in self.tickets:
            self.gate.leave(each, 0.0)
        assert (self.gate.inside, self.gate.waiting) == (0, 0)
        self.gate.check_integrity()


TestGate = GateMachine.TestCase
TestGate.settings = settings(deadline=None, max_examples=50, stateful_step_count=40)


def fill(admission: Admission, count: int, tenant: str = "filler") -> list[Ticket]:
    tickets = [ticket(tenant) for _ in range(count)]
    for each in tickets:
        admission.arrive(each, 0.0)
    return tickets


def test_as_many_as_there_are_places_come_in() -> None:
    admission = gate(fleet_of(welcome("a", max_num_seqs=4), welcome("b", max_num_seqs=4)))
    tickets = fill(admission, 10)
    assert [each.admitted for each in tickets] == [True] * 8 + [False] * 2
    admission.leave(tickets[0], 0.0)
    assert tickets[8].admitted
    assert not tickets[9].admitted


def test_places_others_hold_do_not_count() -> None:
    fleet = fleet_of(welcome("a", max_num_seqs=4))
    fleet.workers["a"].others_sequences = 3
    assert [each.admitted for each in fill(gate(fleet), 2)] == [True, False]


def test_kv_room_counts_and_a_cached_prompt_needs_little() -> None:
    fleet = fleet_of(welcome("a", num_blocks=10, block_size=10))
    admission = gate(fleet)
    large, second, cached = ticket(prefill=60), ticket(prefill=60), ticket(prefill=5)
    for each in (large, cached, second):
        admission.arrive(each, 0.0)
    assert (large.admitted, cached.admitted, second.admitted) == (True, True, False)


def test_prefill_work_is_let_in_as_it_is_done() -> None:
    admission = gate(fleet_of(welcome("p", Role.PREFILL, max_num_batched_tokens=64), welcome("d", Role.DECODE)))
    tickets = [ticket(prefill=256) for _ in range(4)]
    for each in tickets:
        admission.arrive(each, 0.0)
    assert [each.admitted for each in tickets] == [True, True, False, False]
    admission.computed(tickets[0])
    assert [each.admitted for each in tickets] == [True, True, True, False]


def test_nobody_comes_in_while_nobody_decodes() -> None:
    fleet = fleet_of(welcome("p", Role.PREFILL))
    admission = gate(fleet)
    only = ticket()
    admission.arrive(only, 0.0)
    assert not only.admitted
    fleet.join(welcome("d", Role.DECODE), 0.0)
    admission.wake_all()
    assert only.admitted


def test_bounds_are_typed_refusals() -> None:
    admission = gate(fleet_of(welcome("a", max_num_seqs=1)), max_waiting=3, max_waiting_per_tenant=2)
    fill(admission, 1)
    fill(admission, 2, "greedy")
    with pytest.raises(RefusedError) as refused:
        admission.arrive(ticket("greedy"), 0.0)
    assert refused.value.code is FailureCode.TENANT_LIMIT
    admission.arrive(ticket("modest"), 0.0)
    with pytest.raises(RefusedError) as refused:
        admission.arrive(ticket("late"), 0.0)
    assert refused.value.code is FailureCode.OVERLOADED
    assert refused.value.retry_after_s


def test_tenants_alternate_and_priority_orders_within_one() -> None:
    admission = gate(fleet_of(welcome("a", max_num_seqs=1)))
    first = fill(admission, 1)[0]
    flood = [ticket("flood") for _ in range(4)]
    urgent = ticket("flood", priority=-1)
    single = ticket("single")
    for each in (*flood, urgent, single):
        admission.arrive(each, 0.0)
    order: list[Ticket] = []
    inside = first
    while admission.inside:
        admission.leave(inside, 0.0)
        inside = next((t for t in (*flood, urgent, single) if t.inside and t not in order), inside)
        if inside in order or inside is first:
            break
        order.append(inside)
    assert order.index(urgent) < min(order.index(each) for each in flood)
    assert order.index(single) <= 1
    assert [t for t in order if t in flood] == flood


def test_the_generated_tokens_of_a_tenant_count() -> None:
    """Two tenants with equal prompts: the one whose answers are long waits longer."""
    admission = gate(fleet_of(welcome("a", max_num_seqs=2)))
    talker, quiet = ticket("talker"), ticket("quiet")
    admission.arrive(talker, 0.0)
    admission.arrive(quiet, 0.0)
    waiting = [ticket("talker"), ticket("quiet")]
    for each in waiting:
        admission.arrive(each, 0.0)
    talker.emission.tokens.extend(range(500))
    admission.leave(quiet, 0.0)
    assert [each.admitted for each in waiting] == [False, True]


def test_a_migrating_request_goes_first_and_keeps_its_place() -> None:
    admission = gate(fleet_of(welcome("a", max_num_seqs=2, max_num_batched_tokens=64)))
    mover, other = ticket(prefill=300), ticket(prefill=200)
    admission.arrive(mover, 0.0)
    admission.arrive(other, 0.0)
    waiting = ticket(prefill=10)
    admission.arrive(waiting, 0.0)
    admission.computed(mover)
    admission.reenter(mover, 320)
    assert not mover.admitted, "512 tokens may be under way, and 200 are"
    admission.leave(other, 0.0)
    assert mover.admitted
    assert waiting.admitted
    assert admission.inside == 2


def test_everyone_who_waits_is_woken_by_a_change() -> None:
    woken: list[str] = []
    admission = gate(fleet_of(welcome("a", max_num_seqs=1)))
    fill(admission, 1)
    admission.arrive(Ticket("t", 0, emission_of(), 1, 1, lambda: woken.append("t")), 0.0)
    admission.wake_all()
    assert woken == ["t"]


def test_growth_counts_the_start_of_a_long_answer() -> None:
    assert (growth_of(5), growth_of(10_000)) == (5, 256)


def test_the_check_checks() -> None:
    admission = gate(fleet_of(welcome("a")))
    fill(admission, 1)
    admission._kv_tokens += 1
    with pytest.raises(ValueError, match="KV"):
        admission.check_integrity()


def slow_house(places: int = 4, tokens_per_step: int = 512) -> tuple[Fleet, Admission]:
    """A worker whose answers of 10 tokens take a second: the house turns over once a second."""
    fleet = fleet_of(welcome("a", max_num_seqs=places, max_num_batched_tokens=tokens_per_step))
    fleet.load_arrived("a", load(step_base_s=0.1, step_token_s=0.0))
    return fleet, Admission(AdmissionSettings(ttft_target_s=2.0, admit_ratio=1.0), fleet, lambda: 0.5)


def test_what_would_begin_too_late_is_refused_on_arrival() -> None:
    """Four places and 1.4 s of patience at one house per second: five more may wait."""
    _, admission = slow_house()
    admission.check("t", 0.0)
    fill(admission, 9, "t")
    with pytest.raises(RefusedError, match="too late") as refused:
        admission.arrive(ticket("t"), 0.0)
    assert refused.value.code is FailureCode.OVERLOADED
    assert refused.value.retry_after_s == pytest.approx(1.0), "jittered around one second"
    with pytest.raises(RefusedError):
        admission.check("t", 0.0)
    assert admission.waiting == 5
    admission.check_integrity()


def test_a_caller_may_ask_for_less_patience_and_for_no_more() -> None:
    _, admission = slow_house()
    fill(admission, 5, "t")
    hasty, patient = ticket("t"), ticket("t")
    hasty.target_s, patient.target_s = 0.5, 1000.0
    with pytest.raises(RefusedError):
        admission.arrive(hasty, 0.0)
    admission.arrive(patient, 0.0)
    assert patient.target_s == 2.0


def test_a_long_prompt_may_still_wait_for_half_the_target() -> None:
    """It would be refused for ever if its own computing counted in full."""
    fleet, admission = slow_house()
    fleet.load_arrived("a", load(step_base_s=0.1, step_token_s=0.001))
    fill(admission, 4, "t")
    admission.arrive(ticket("t", prefill=10_000), 1.0)
    assert admission.waiting == 1


def test_a_flood_is_told_of_itself_and_others_are_let_wait() -> None:
    _, admission = slow_house()
    fill(admission, 9, "flood")
    with pytest.raises(RefusedError) as alone:
        admission.arrive(ticket("flood"), 0.0)
    admission.arrive(ticket("modest"), 0.0)
    with pytest.raises(RefusedError) as beside:
        admission.arrive(ticket("flood"), 0.0)
    assert (alone.value.code, beside.value.code) == (FailureCode.OVERLOADED, FailureCode.TENANT_LIMIT)


def test_who_cannot_begin_in_time_any_more_is_shed_the_last_first() -> None:
    """The worker has become three times as slow: of five who wait, the first two still have a chance."""
    fleet, admission = slow_house()
    fill(admission, 4, "t")
    waiting = fill(admission, 5, "t")
    admission.shed_late(0.0)
    assert not any(each.shed for each in waiting)
    fleet.load_arrived("a", load(step_base_s=0.3, step_token_s=0.0))
    admission.shed_late(0.1)
    assert [each.shed is None for each in waiting] == [True, True, False, False, False]
    assert admission.waiting == 2
    admission.check_integrity()


def test_whoever_waits_hears_within_a_second_and_is_then_served_unless_all_is_lost() -> None:
    """The worker becomes slower bit by bit: late is who was kept, gone is only who would wait for ever."""
    fleet, admission = slow_house()
    fill(admission, 4, "t")
    (kept,) = fill(admission, 1, "t")
    admission.shed_late(0.5)
    assert not kept.promised
    admission.shed_late(0.8)
    assert (kept.shed, kept.promised) == (None, True)
    fleet.load_arrived("a", load(step_base_s=0.4, step_token_s=0.0))
    admission.shed_late(1.0)  # it would begin after more than its target
    assert kept.shed is None
    fleet.load_arrived("a", load(step_base_s=2.0, step_token_s=0.0))
    admission.shed_late(1.2)
    assert kept.shed is not None, "after more than twice its target"


def test_the_last_look_asks_for_more_than_those_before() -> None:
    _, admission = slow_house()
    fill(admission, 4, "t")
    waiting = fill(admission, 4, "t")
    admission.shed_late(0.35)  # the last would begin after 1.8 s of 2
    assert [each.shed is None for each in waiting] == [True, True, True, True]
    admission.shed_late(0.65)  # the second after 1.5 s
    assert [each.shed is None for each in waiting] == [True, False, False, False]


def test_those_who_go_on_to_overtake_are_reckoned_with() -> None:
    """Half of the house is a tenant's who gets all it asks for: the flood's line moves half as fast."""
    _, admission = slow_house()
    fill(admission, 2, "modest")
    fill(admission, 2, "flood")
    fill(admission, 2, "flood")
    with pytest.raises(RefusedError):  # alone in the house, five could wait
        admission.arrive(ticket("flood"), 0.0)
    assert admission.waiting == 2


@pytest.mark.parametrize(("step_base_s", "ahead"), [(0.01, 4), (0.3, 0)])
def test_workers_get_work_ahead_in_whole_requests_each(step_base_s: float, ahead: int) -> None:
    """One for each of two workers would wait there for the next of few ends, while the other worker has a place."""
    fleet = fleet_of(*(welcome(name, max_num_seqs=8) for name in "ab"))
    for name in "ab":
        fleet.load_arrived(name, load(step_base_s=step_base_s, step_token_s=0.0))
    admission = Admission(AdmissionSettings(ttft_target_s=60.0), fleet, lambda: 0.5)
    fill(admission, 30, "t")
    assert admission.inside == 16 + ahead


def test_a_further_choice_of_a_running_call_is_never_late() -> None:
    _, admission = slow_house()
    fill(admission, 9, "t")
    choice = ticket("t")
    choice.target_s = None
    admission.arrive(choice, 0.0)
    admission.shed_late(60.0)
    assert choice.shed is None
    assert admission.waiting == 1


def test_an_empty_house_takes_what_it_could_never_serve_in_time() -> None:
    fleet, admission = slow_house()
    fleet.load_arrived("a", load(step_base_s=5.0, step_token_s=1.0))
    admission.arrive(ticket("t", prefill=10_000), 0.0)
    assert admission.inside == 1
