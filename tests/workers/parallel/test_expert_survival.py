"""Ranks with experts as processes: one is killed or stopped under streams, and every token is the undisturbed one."""

import os
import signal
import threading

import pytest
from fakes import expert_rank
from fakes.expert_processes import ExpertProcesses
from fakes.expert_rank import ExpertRun


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(**fields):
        started.append(ExpertProcesses(ExpertRun(rank=0, address="", **fields), tmp_path / "ranks.log"))
        return started[-1]

    yield begin
    for each in started:
        each.close()


@pytest.mark.timeout(90)
def test_a_killed_rank_costs_no_stream_and_no_token(start):
    processes = start(num_ranks=4, streams=24, steps=60)
    processes.until_step(20)
    processes.ranks[2].kill()
    result, _ = processes.result()
    assert result["history"] == expert_rank.undisturbed(processes.run)
    assert result["stall_s"] <= 3.0  # on any machine; tests/benchmarks/expert_survival.py holds it to one second
    for rank in (0, 1, 3):
        assert processes.ranks[rank].wait(10) == 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_ranks_one_after_the_other(start):
    """After the first loss copies are made good, so that the second is survived as well."""
    processes = start(num_ranks=4, streams=40, steps=300, experts=6, slots=4)
    processes.until_step(40)
    processes.ranks[1].kill()
    processes.until_step(150)
    processes.ranks[3].kill()
    result, _ = processes.result()
    assert result["history"] == expert_rank.undisturbed(processes.run)
    assert result["stall_s"] <= 3.0
    assert result["copies"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_stopped_rank_is_left_out_and_ends_when_it_comes_back(start):
    processes = start(num_ranks=4, streams=20, steps=60, timeout_s=2.0, grace_s=0.5)
    processes.until_step(20)
    stopped = processes.ranks[2]
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        result, _ = processes.result()
    finally:
        threading.Timer(0.5, os.kill, (stopped.pid, signal.SIGCONT)).start()
    assert result["history"] == expert_rank.undisturbed(processes.run)
    assert result["stall_s"] <= 5.0
    assert stopped.wait(20) != 0


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_skewed_router_is_levelled_while_serving(start):
    processes = start(
        num_ranks=4, streams=120, steps=300, experts=16, slots=5, least_copies=1, rebalance_steps=60, power=1.2
    )
    result, lines = processes.result()
    before = next(line["skew"] for line in lines if line.get("step") == 55)
    assert before >= 1.4, "there is something to level"
    assert lines[-1]["skew"] <= 1.2
    assert result["generation"] >= 1
    assert result["history"] == expert_rank.undisturbed(processes.run)
