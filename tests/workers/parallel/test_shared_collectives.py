"""Shared memory between ranks: when it is used, and how a dead or mistaken rank is noticed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from fakes.rank_threads import RankThreads

from penstock.workers.errors import GroupError
from penstock.workers.parallel import shared_collectives
from penstock.workers.parallel.collectives import GroupCollectives
from penstock.workers.parallel.process_group import GroupPlace, open_group, serve_store
from penstock.workers.parallel.shared_collectives import SharedCollectives

PARTNER = """
import sys, time, torch
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group
group = open_group(GroupPlace("pair", 1, 2, timeout_s=60.0), join_store(sys.argv[1], 60.0))
group.all_reduce(torch.ones(3))
print("ready", flush=True)
time.sleep(90)
"""


def test_float16_is_added_over_sockets():
    with RankThreads(2) as ranks:
        results = ranks.all(lambda group: group.all_reduce(torch.ones(5, dtype=torch.float16)))
    assert [result.tolist() for result in results] == [[2.0] * 5] * 2


def test_narrow_floats_are_rounded_once():
    """1 + 2^-9 + 2^-9 + 2^-9 in bfloat16: term by term the small ones would vanish."""

    def work(group):
        return group.all_reduce(torch.tensor([1.0 if group.rank == 0 else 2.0**-9], dtype=torch.bfloat16))

    with RankThreads(4) as ranks:
        assert [float(result) for result in ranks.all(work)] == [1.0078125] * 4


@pytest.mark.parametrize("why", ["hosts", "kernels", "memory"])
def test_sockets_serve_where_memory_cannot(monkeypatch, why):
    if why == "hosts":
        names = iter("ab")
        monkeypatch.setattr(shared_collectives, "host_id", lambda: next(names))
    elif why == "kernels":
        answers = iter((True, False))
        monkeypatch.setattr(shared_collectives, "available", lambda: next(answers))
    else:

        def refuse(*_):
            raise OSError("no memory")

        monkeypatch.setattr(os, "memfd_create", refuse)
    with RankThreads(2, timeout_s=5.0) as ranks:
        assert {type(group) for group in ranks.groups} == {GroupCollectives}
        assert [float(x) for x in ranks.all(lambda group: group.all_reduce(torch.ones(1)))] == [2.0, 2.0]


def test_another_call_is_an_error_that_names_the_rank():
    def work(group):
        with pytest.raises(GroupError, match="made another call") as failed:
            group.all_reduce(torch.zeros(3 + group.rank))
        return failed.value.rank

    with RankThreads(2, timeout_s=5.0) as ranks:
        assert ranks.all(work) == [1, 0]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_ends_is_noticed_at_once_by_its_rank(end):
    store, address = serve_store("127.0.0.1", 60.0)
    partner = subprocess.Popen([sys.executable, "-c", PARTNER, address], stdout=subprocess.PIPE, text=True)
    try:
        group = open_group(GroupPlace("pair", 0, 2, timeout_s=60.0), store)
        assert isinstance(group, SharedCollectives)
        assert group.all_reduce(torch.ones(3)).tolist() == [2.0] * 3
        assert partner.stdout.readline() == "ready\n"
        partner.send_signal(end)
        began = time.monotonic()
        with pytest.raises(GroupError, match="rank 1 has ended") as failed:
            group.all_reduce(torch.ones(3))
        assert failed.value.rank == 1
        assert time.monotonic() - began < 30.0
        group.close()
    finally:
        partner.kill()
        partner.wait()
        partner.stdout.close()


def test_nothing_is_left_open():
    before = set(os.listdir("/proc/self/fd"))
    with RankThreads(2) as ranks:
        ranks.all(lambda group: group.barrier())
    left = [os.readlink(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before if _is_open(fd)]
    assert [name for name in left if "memfd" in name or "pidfd" in name] == []


def _is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")
