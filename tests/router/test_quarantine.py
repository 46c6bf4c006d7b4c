"""Quarantine: it takes several mismatches in a short time, lasts for a while, and remembers little."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from penstock.router.quarantine import Quarantine
from penstock.router.settings import HealthSettings

SETTINGS = HealthSettings(quarantine_mismatches=3, quarantine_window_s=10.0, breaker_max_s=5.0)


def test_mismatches_far_apart_do_not_count_together() -> None:
    quarantine = Quarantine(SETTINGS)
    assert not any(quarantine.mismatched("p", 6.0 * number) for number in range(20))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 8.0)), max_size=80))
def test_it_begins_with_as_many_in_the_window_and_ends_by_itself(happened: list[tuple[str, float]]) -> None:
    quarantine, now = Quarantine(SETTINGS), 0.0
    counted: dict[str, list[float]] = {name: [] for name in "abc"}
    until = dict.fromkeys("abc", 0.0)
    for name, later in happened:
        now += later
        assert [quarantine.holds(each, now) for each in "abc"] == [now < until[each] for each in "abc"]
        if now >= until[name]:
            counted[name] = [at for at in counted[name] if now - at < 10.0] + [now]
        begins = len(counted[name]) == 3
        assert quarantine.mismatched(name, now) is begins
        if begins:
            counted[name], until[name] = [], now + 5.0
    assert all(len(times) < 3 for times in quarantine._seen.values())
