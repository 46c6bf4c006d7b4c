"""Ranks that fit meet; every misfit is told why, with the numbers, and strangers do not stop the meeting."""

import dataclasses
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.workers.errors import ConfigError
from penstock.workers.parallel.meeting import Joining, Meeting, join
from penstock.workers.parallel.shared_settings import shared_settings
from penstock.workers.settings import GroupSettings, KVSettings, RunnerSettings, WorkerSettings
from penstock.workers.transfer.host import host_id

KEY = "ab" * 32


def settings(rank: int = 0, width: int = 2, leader: str = "", **changed: Any) -> WorkerSettings:
    group = GroupSettings(tensor_parallel_size=width, rank=rank, leader=leader, start_timeout_s=2.0)
    return WorkerSettings(**{"worker_id": "w", "cluster_key": KEY, "group": group, **changed})


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    opened = Meeting(settings(width=3), host_id(), 1 << 16)
    yield opened
    opened.close()
    for thread in threading.enumerate():  # who is being greeted still has a connection to hand in
        if thread.name == "group-hello":
            thread.join(5)
    for link, _ in opened._controls.values():
        link.close()
    for member in opened._members.values():
        member.steps.close()
    if opened.ring is not None:
        opened.ring.close()


def leave(joining: Joining) -> None:
    joining.control.close()
    joining.steps.close()
    if joining.ring is not None:
        joining.ring.close()


def test_ranks_meet_and_share_memory(meeting: Meeting) -> None:
    joined: dict[int, Joining] = {}

    def come(rank: int) -> None:
        joined[rank] = join(settings(rank, 3, meeting.address), host_id())

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (2, 1)]
    for thread in threads:
        thread.start()
    members = meeting.wait(5.0)
    for thread in threads:
        thread.join(5)
    assert [member.rank for member in members] == [1, 2]
    assert all(member.steps.local for member in members)
    assert meeting.ring is not None
    place = meeting.ring.write(b"for all", 1.0)
    for rank in (1, 2):
        ring = joined[rank].ring
        assert ring is not None
        assert ring.read(place, 7) == b"for all"
        assert joined[rank].leader_pid == os.getpid()
        leave(joined[rank])


def test_from_another_host_steps_go_over_tcp(meeting: Meeting) -> None:
    came: list[Joining] = []
    thread = threading.Thread(target=lambda: came.append(join(settings(1, 3, meeting.address), "far away")))
    thread.start()
    thread.join(5)
    (joining,) = came
    assert joining.ring is None
    assert not joining.steps.local
    leave(joining)


@pytest.mark.parametrize(
    ("changed", "key", "message"),
    [
        ({"rank": 3, "width": 4}, "group.rank", "rank 3 joins a group of 3 ranks"),
        ({"kv": KVSettings(block_size=8)}, "group", "kv.block_size is 8 instead of 16"),
        ({"runner": RunnerSettings(model_dir="/b")}, "group", "runner.model_dir is '/b' instead of ''"),
        ({"worker_id": "v"}, "group", "worker_id is 'v' instead of 'w'"),
        ({"width": 2}, "group", "group.tensor_parallel_size is 2 instead of 3"),
        ({"incarnation": 2}, "group.leader", "incarnation"),
        ({"cluster_key": "cd" * 32}, "group.leader", "cluster key"),
    ],
)
def test_misfits_are_told_why(meeting: Meeting, changed: dict[str, Any], key: str, message: str) -> None:
    rank, width = changed.pop("rank", 1), changed.pop("width", 3)
    told = dataclasses.replace(settings(rank, width, meeting.address), **changed)
    with pytest.raises(ConfigError, match=message) as caught:
        join(told, host_id())
    assert caught.value.key == key


def test_a_rank_is_taken_once(meeting: Meeting) -> None:
    first = join(settings(1, 3, meeting.address), host_id())
    with pytest.raises(ConfigError, match=f"rank 1 is taken by process {os.getpid()}"):
        join(settings(1, 3, meeting.address), host_id())
    leave(first)


def test_what_may_differ_may_differ(meeting: Meeting) -> None:
    told = settings(1, 3, meeting.address, host="127.0.0.2", port=7, parent_pid=1)
    told = dataclasses.replace(told, runner=RunnerSettings(cpus=(1,), device="cuda:1"))
    leave(join(told, host_id()))
    assert KEY not in shared_settings(told)


def test_missing_ranks_are_named(meeting: Meeting) -> None:
    first = join(settings(2, 3, meeting.address), host_id())
    with pytest.raises(ConfigError, match=r"of 3 ranks, 1 did not join within 0\.2 s: rank 1"):
        meeting.wait(0.2)
    leave(first)


@pytest.mark.parametrize(("changed", "fatal"), [({"drain_s": 1.0}, True), ({"worker_id": "v", "drain_s": 1.0}, False)])
def test_nobody_waits_for_a_rank_of_ours_that_cannot_join(
    meeting: Meeting, changed: dict[str, Any], fatal: bool
) -> None:
    with pytest.raises(ConfigError):
        join(settings(1, 3, meeting.address, **{"worker_id": "w", **changed}), host_id())
    with pytest.raises(ConfigError, match=r"drain_s is 1\.0 instead of 30\.0" if fatal else "did not join"):
        meeting.wait(0.1)


def test_strangers_do_not_disturb(meeting: Meeting) -> None:
    host, _, port = meeting.address.rpartition(":")
    strangers = [socket.create_connection((host, int(port))) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
    strangers[1].close()
    leave(join(settings(1, 3, meeting.address), host_id()))
    for stranger in strangers:
        stranger.close()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"nobody answers at {address}"):
        join(settings(1, 2, address), host_id())
    with pytest.raises(ConfigError, match="is not host:port"):
        join(settings(1, 2, "nonsense"), host_id())


def test_a_host_that_is_not_ours() -> None:
    group = GroupSettings(tensor_parallel_size=2, host="192.0.2.1")
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1"):
        Meeting(dataclasses.replace(settings(), group=group), host_id(), 1 << 16)
