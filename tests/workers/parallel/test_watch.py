"""Who is at fault, from what ranks say: silence, a stuck step, one slow rank; and nobody where nobody is."""

import random
import time

import pytest

from penstock.workers.parallel.group_messages import Beat
from penstock.workers.parallel.rank_progress import RankProgress
from penstock.workers.parallel.watch import FLOOR_S, GroupWatch, StepPace
from penstock.workers.settings import GroupSettings


def group(width: int, now: float = 0.0) -> GroupWatch:
    watch = GroupWatch(GroupSettings(tensor_parallel_size=width), now)
    watch.arm(now)
    return watch


def learned(seconds: float = 0.01, tokens: int = 8) -> StepPace:
    pace = StepPace(3.0)
    for _ in range(20):
        pace.observe(tokens, seconds, 0.0)
    return pace


def test_a_silent_rank_is_named_in_time() -> None:
    watch = group(3)
    for tenth in range(40):
        now = tenth / 10
        for rank in (0, 2):
            watch.heard(rank, Beat(1, 1), now)
        verdict = watch.silent(now)
        if verdict is not None:
            assert verdict.rank == 1
            assert 1.7 <= now <= 1.9
            return
    pytest.fail("nobody noticed")


def test_a_rank_that_is_left_out_is_not_judged() -> None:
    watch = group(4)
    for rank, calls in ((0, 7), (1, 7), (2, 3), (3, 6)):
        watch.heard(rank, Beat(5, 4, calls, calls == 7), 1.0)
    stuck = watch.stuck(1.5, 1.0, 1.2)
    assert stuck is not None
    assert stuck.rank == 2
    watch.leave_out(2)
    stuck = watch.stuck(1.5, 1.0, 1.2)
    assert stuck is not None
    assert stuck.rank == 3
    for rank in (0, 1, 3):
        watch.heard(rank, Beat(6, 6), 9.0)
    assert watch.silent(9.1) is None


def test_calls_count_anew_once_ranks_have_met_again() -> None:
    progress = RankProgress()
    progress.begin(3)
    with progress.waiting():
        pass
    assert progress.beat().calls == 1
    progress.level()
    assert progress.beat().calls == 0


def test_silence_before_all_are_ready_is_no_fault() -> None:
    watch = GroupWatch(GroupSettings(tensor_parallel_size=2), 0.0)
    assert watch.silent(100.0) is None
    assert watch.stuck(100.0, 1.0, 100.0) is None


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(10))
def test_the_rank_that_did_not_enter_is_behind(width: int, seed: int) -> None:
    """All others wait inside call n; the culprit has left call n - 1, or not even begun the step."""
    rng = random.Random(f"{width}/{seed}")
    culprit, calls, step = rng.randrange(width), rng.randrange(5, 100), rng.randrange(2, 50)
    watch = group(width)
    late = Beat(step, step - 1, calls - 1, False) if rng.random() < 0.5 else Beat(step - 1, step - 1, calls - 4, False)
    for rank in range(width):
        watch.heard(rank, late if rank == culprit else Beat(step, step - 1, calls, True), 1.0)
    verdict = watch.stuck(1.5, 1.0, 1.2)
    assert verdict is not None
    assert verdict.rank == culprit


def test_a_silent_rank_is_behind_whatever_it_said_last() -> None:
    watch = group(3)
    watch.heard(2, Beat(9, 9, 100, True), 0.0)
    for rank in (0, 1):
        watch.heard(rank, Beat(9, 8, 90, True), 1.1)
    assert watch.behind(1.2) == 2


def test_when_all_wait_in_the_same_call_nobody_stands_out() -> None:
    watch = group(3)
    for rank in range(3):
        watch.heard(rank, Beat(5, 4, 7, True), 1.0)
    verdict = watch.stuck(3.0, 1.0, 1.1)
    assert verdict is not None
    assert verdict.rank is None


def test_limits_grow_with_the_work_and_have_a_floor() -> None:
    pace = StepPace(3.0)
    assert pace.limit_s(1) >= 30.0  # nothing is known yet
    pace = learned(0.01)
    assert pace.limit_s(8) == FLOOR_S
    pace = learned(2.0)
    assert pace.limit_s(8) == pytest.approx(6.0)


def test_the_first_large_step_is_not_measured_by_small_ones() -> None:
    pace = learned(0.02, tokens=1)  # decoding only
    assert pace.limit_s(512) == pytest.approx(3 * 0.02 * 512)
    pace.observe(512, 0.5, 1.0)
    assert pace.limit_s(512) < 3 * 0.02 * 512 / 2


INTERVAL_S = 0.25


def drive(watch: GroupWatch, busy_s: dict[int, list[float]], step_s: list[float], beats: int = 16) -> int | None:
    """Beats every 0.25 s; `step_s[i]` and `busy_s[rank][i]` hold in interval i. The rank blamed, if any."""
    pace = learned()
    counts = [0] * len(busy_s)
    busy = [0.0] * len(busy_s)
    for interval in range(beats):
        now = INTERVAL_S * (interval + 1)
        steps = max(1, int(INTERVAL_S / step_s[interval]))
        for _ in range(steps):
            pace.observe(8, step_s[interval], now)
        for rank in busy_s:
            counts[rank] += steps
            busy[rank] += steps * busy_s[rank][interval]
            watch.heard(rank, Beat(counts[rank], counts[rank], 0, False, counts[rank], busy[rank]), now)
        verdict = watch.slow(pace, now)
        if verdict is not None:
            return verdict.rank
    return None


def test_one_slow_rank_is_named_after_a_second() -> None:
    step_s = [0.01] * 3 + [0.03] * 13
    busy = {0: [0.009] * 16, 1: [0.009] * 3 + [0.029] * 13, 2: [0.008] * 16}
    assert drive(group(3), busy, step_s) == 1
    assert drive(group(3), busy, step_s, beats=6) is None
    assert drive(group(3), busy, step_s, beats=8) == 1


def test_when_all_are_slow_nobody_is_named() -> None:
    """The machine is busy, or prompts grew long."""
    assert drive(group(2), {0: [0.04] * 16, 1: [0.045] * 16}, [0.05] * 16) is None


def test_uneven_ranks_are_no_fault_while_steps_keep_their_time() -> None:
    assert drive(group(2), {0: [0.009] * 16, 1: [0.001] * 16}, [0.01] * 16) is None


def test_half_a_second_is_forgiven() -> None:
    step_s = ([0.01] * 2 + [0.05] * 2) * 4
    busy = {0: [0.009] * 16, 1: [each * 0.95 for each in step_s]}
    assert drive(group(2), busy, step_s) is None


def test_slow_steps_do_not_become_the_measure_of_steps() -> None:
    pace = learned(0.01)
    for index in range(500):
        pace.observe(8, 0.05, 1.0 + index * 0.01)  # five seconds of a fault
    assert pace.slow
    for index in range(2000):
        pace.observe(8, 0.05, 20.0 + index * 0.05)  # nobody to blame: so it is the work
    pace.next_interval()
    pace.observe(8, 0.05, 200.0)
    assert not pace.slow


def test_progress_keeps_waiting_apart() -> None:
    progress = RankProgress()
    progress.begin(1)
    with progress.waiting():
        inside = progress.beat()
        assert inside.waiting
        assert inside.calls == 1
        time.sleep(0.05)
    took = progress.end(step=True)
    beat = progress.beat()
    assert took >= 0.05
    assert beat.busy_s < 0.04
    assert (beat.begun, beat.done, beat.steps, beat.waiting) == (1, 1, 1, False)
