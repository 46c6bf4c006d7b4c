"""How long a newcomer would wait: what stands before it in the fair order, and the measured pace of the house."""

from __future__ import annotations

import pytest
from fakes.beliefs import emission_of

from penstock.router.capacity import Capacity
from penstock.router.forecast import Forecast, House, Turnover
from penstock.router.settings import AdmissionSettings
from penstock.router.tenants import TenantCounters
from penstock.router.ticket import Ticket, Work

TEN_PLACES = Capacity(workers=1, places=10, spare=10, kv_tokens=10_000, prefill_per_s=1000.0, base_s=0.05, row_s=0.0)


def ticket(tenant: str, arrival: int, prefill: int = 100, growth: int = 50) -> Ticket:
    return Ticket(tenant, 0, emission_of(), growth, prefill, lambda: None, arrival=arrival)


def forecast(tenants: TenantCounters | None = None) -> Forecast:
    return Forecast(AdmissionSettings(), TenantCounters({}) if tenants is None else tenants)


def test_a_house_with_a_free_place_makes_nobody_wait() -> None:
    assert forecast().wait_s(TEN_PLACES, Work(10, 2000, 0), 1.0) == 0.0


def test_places_and_kv_room_are_waited_for_at_the_pace_of_the_house() -> None:
    """Half a house too many, a quarter of a house given back per second."""
    assert forecast().wait_s(TEN_PLACES, Work(15, 2000, 0), 0.25) == pytest.approx(2.0)
    assert forecast().wait_s(TEN_PLACES, Work(5, 15_000, 0), 0.25) == pytest.approx(2.0)


def test_prompts_before_it_are_computed_first() -> None:
    assert forecast().wait_s(TEN_PLACES, Work(2, 3000, 2500), 1.0) == pytest.approx(2.5)


def test_nothing_is_known_of_a_fleet_without_places() -> None:
    nobody = Capacity(0, 0.0, 0.0, 0.0, None, 0.0, 0.0)
    assert forecast().wait_s(nobody, Work(5, 5, 5), 1.0) == 0.0


def test_the_pace_is_measured_while_the_house_is_full_and_only_then() -> None:
    turnover = Turnover()
    assert turnover.per_s(4.0) == pytest.approx(0.25), "assumed at first"
    for second in range(60):
        turnover.note(True, float(second))
        turnover.released(0.5)
    assert turnover.per_s(4.0) == pytest.approx(0.5, rel=0.1)
    turnover.note(False, 60.0)
    turnover.released(100.0)
    turnover.note(False, 1000.0)
    assert turnover.per_s(4.0) == pytest.approx(0.5, rel=0.1)


def test_a_full_house_that_gives_nothing_back_is_found_out() -> None:
    turnover = Turnover()
    turnover.note(True, 0.0)
    turnover.note(True, 30.0)
    assert turnover.per_s(1.0) < 0.05


def test_who_has_received_less_stands_before_a_flood() -> None:
    tenants = TenantCounters({})
    tenants.charge("flood", 5000)
    lines = {"flood": [ticket("flood", n) for n in range(1, 9)]}
    told = forecast(tenants)
    assert told.ahead(lines, "flood", (0, 99))[0].sequences == 8
    assert told.ahead(lines, "flood", (0, 3))[0].sequences == 2
    tenants.charge("modest", 100)
    lines["modest"] = [ticket("modest", 9)]
    ahead, _ = told.ahead(lines, "modest", (0, 99))
    assert ahead == Work(1, 150, 100), "its own; the flood is far beyond it"
    assert [each.tenant for _, each in told.order(lines)] == ["modest"] + ["flood"] * 8


def test_equal_tenants_take_turns_and_weights_count() -> None:
    lines = {"a": [ticket("a", n) for n in (1, 2, 3, 4)], "b": [ticket("b", n) for n in (5, 6)]}
    assert [each.tenant for _, each in forecast().order(lines)] == ["a", "b", "a", "b", "a", "a"]
    heavy = forecast(TenantCounters({"b": 10.0}))
    assert [each.tenant for _, each in heavy.order(lines)] == ["a", "b", "b", "a", "a", "a"]


def test_tenants_whose_next_requests_come_first_go_on_to_take_what_they_hold() -> None:
    """A house of ten that gives back one place per second; the modest tenant holds four of them."""
    tenants = TenantCounters({})
    tenants.charge("flood", 5000)
    tenants.charge("modest", 100)
    told = forecast(tenants)
    lines = {"flood": [ticket("flood", n) for n in (1, 2, 3)]}
    house = House(TEN_PLACES, Work(10, 2000, 0), 0.1, {"flood": 6, "modest": 4})
    waits = [wait_s for _, wait_s in told.waits_s(lines, house)]
    assert waits == pytest.approx([1.0, 2 / 0.6, 3 / 0.6]), "the first has its turn before anybody to come"
    needs = Work(1, 150, 100)
    assert told.newcomer_wait_s(lines, house, "flood", (0, 99), needs) == pytest.approx(4 / 0.6)
    assert told.newcomer_wait_s(lines, house, "modest", (0, 99), needs) == pytest.approx(2.0), "nobody overtakes it"
    assert told.newcomer_wait_s({}, house, "modest", (0, 99), needs) == pytest.approx(1.0)


def test_a_fair_share_is_left_to_everybody() -> None:
    tenants = TenantCounters({"heavy": 3.0})
    tenants.charge("flood", 5000)
    told = forecast(tenants)
    lines = {"flood": [ticket("flood", 1), ticket("flood", 2)]}
    house = House(TEN_PLACES, Work(10, 2000, 0), 0.1, {"heavy": 10})
    assert told.waits_s(lines, house)[1][1] == pytest.approx(2 / 0.25)
