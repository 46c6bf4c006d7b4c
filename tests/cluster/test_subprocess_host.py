"""Starting and ending plain worker processes, with commands that misbehave."""

import asyncio
import dataclasses
import signal
import sys
import time
from pathlib import Path

import pytest

from penstock.cluster.subprocess_host import SubprocessHost, WorkerProcess, describe_exit
from penstock.cluster.supervision import StartError
from penstock.workers.settings import GroupSettings, WorkerSettings

SETTINGS = WorkerSettings("w", incarnation=3)
GROUP = dataclasses.replace(SETTINGS, group=GroupSettings(tensor_parallel_size=3, start_timeout_s=30.0))
# Ranks that say what ranks say, and do nothing.
RANKS = """
import json, os, sys, time
group = json.loads(sys.stdin.readline())["group"]
rank = group["rank"]
def say(**words): print(json.dumps(words), flush=True)
if rank == 0:
    say(group_address="h:7")
else:
    assert group["leader"] == "h:7", group
"""
READY_RANKS = RANKS + "say(**({'joined': True} if rank else {'address': 'h:1'})); time.sleep(60)"
READY = "import sys, json; sys.stdin.readline(); print(json.dumps({'address': 'h:1'}), flush=True); "


def start(script: str, log: Path) -> WorkerProcess:
    async def scenario() -> WorkerProcess:
        return await SubprocessHost(log, command=(sys.executable, "-c", script)).start(SETTINGS)

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("raise SystemExit('no such thing')", "exited with status 1: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("""print('{"error": "ModelError", "message": "config.json: bad"}')""", "config.json: bad"),
    ],
)
def test_why_it_did_not_start(script: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an older line\n")
    with pytest.raises(StartError, match=f"worker w did not start: {reason}"):
        start(script, tmp_path / "log")


@pytest.mark.parametrize("drain_s", [0.0, 2.0])
def test_a_polite_one_and_a_deaf_one_are_both_ended(
    drain_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.subprocess_host.KILL_AFTER_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "

    async def scenario() -> None:
        for script, polite in ((f"{READY}import time; time.sleep(60)", True), (deaf + READY + "time.sleep(60)", False)):
            host = SubprocessHost(tmp_path / "log", command=(sys.executable, "-c", script))
            worker = await host.start(SETTINGS)
            assert (worker.address, worker.incarnation, len(worker.pids)) == ("h:1", 3, 1)
            began = asyncio.get_running_loop().time()
            await worker.stop(0.1 if drain_s and not polite else drain_s)
            assert asyncio.get_running_loop().time() - began < 1.5
            assert await worker.ended() == ("ended by SIGTERM" if polite and drain_s else "ended by SIGKILL")
            await worker.stop(1.0)

    asyncio.run(scenario())


def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    marker = tmp_path / "pid"

    async def scenario() -> int:
        script = f"import os, time; open({str(marker)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
        host = SubprocessHost(tmp_path / "log", command=(sys.executable, "-c", script))
        starting = asyncio.ensure_future(host.start(SETTINGS))
        while not (marker.exists() and marker.read_text()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        return int(marker.read_text())

    pid = asyncio.run(scenario())
    assert not Path(f"/proc/{pid}").exists()


def test_exit_codes_in_words() -> None:
    assert describe_exit(0) == "exited with status 0"
    assert describe_exit(-9) == "ended by SIGKILL"
    assert describe_exit(-100) == "ended by signal 100"


def group_of(script: str, log: Path) -> SubprocessHost:
    return SubprocessHost(log, command=(sys.executable, "-c", script))


def gone(pids: tuple[int, ...]) -> list[bool]:
    return [not Path(f"/proc/{pid}").exists() for pid in pids]


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("say(error='ModelError', message='no weights') if rank == 2 else time.sleep(60)", "rank 2: no weights"),
        ("say(error='ConfigError', message='port taken') if not rank else time.sleep(60)", "rank 0: port taken"),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)", "rank 1: ended by SIGKILL"),
        ("sys.exit('a bad day') if rank == 1 else time.sleep(60)", "rank 1: exited with status 1: a bad day"),
        (
            "say(error='GroupError', message='it ends') if not rank else time.sleep(0.1); "
            "say(error='ModelError', message='no weights') if rank == 1 else time.sleep(60)",
            "rank 1: no weights",
        ),
    ],
)
def test_a_group_that_does_not_start_says_whose_fault_it_is_and_leaves_nothing(
    ending: str, reason: str, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    script = f"{RANKS}\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n{ending}"

    async def scenario() -> None:
        with pytest.raises(StartError, match=f"worker w did not start: {reason}"):
            await group_of(script, tmp_path / "log").start(GROUP)

    began = time.monotonic()
    asyncio.run(scenario())
    assert time.monotonic() - began < 10.0, "nobody waits for the ranks that would never say anything"
    assert all(gone(tuple(map(int, pids.read_text().split()))))


def test_a_leader_that_cannot_listen_says_so(tmp_path: Path) -> None:
    script = """print('{"error": "ConfigError", "message": "cannot listen"}', flush=True)"""

    async def scenario() -> None:
        with pytest.raises(StartError, match="did not start: rank 0: cannot listen"):
            await group_of(script, tmp_path / "log").start(GROUP)

    asyncio.run(scenario())


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.cluster.group_ranks.JOIN_MARGIN_S", 0.0)
    hasty = dataclasses.replace(GROUP, group=dataclasses.replace(GROUP.group, start_timeout_s=0.5))

    async def scenario() -> None:
        with pytest.raises(StartError, match="did not start in time"):
            await group_of(RANKS + "time.sleep(60)", tmp_path / "log").start(hasty)

    asyncio.run(scenario())


@pytest.mark.parametrize("victim", [0, 1])
def test_a_group_is_gone_when_all_its_processes_are(
    victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.cluster.subprocess_host.LEAD_S", 0.3)

    async def scenario() -> None:
        worker = await group_of(READY_RANKS, tmp_path / "log").start(GROUP)
        assert (worker.address, len(worker.pids)) == ("h:1", 3)
        ending = asyncio.ensure_future(worker.ended())
        await asyncio.sleep(0.1)
        assert not ending.done()
        began = time.monotonic()
        worker.signal(signal.SIGKILL, victim)
        reason = await ending
        assert time.monotonic() - began < 8.0
        assert f"rank {victim} ended by SIGKILL" in reason
        assert all(gone(worker.pids)), "the others do not end by themselves here"

    asyncio.run(scenario())


def test_a_group_is_told_to_end_at_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.cluster.subprocess_host.KILL_AFTER_S", 0.2)

    async def scenario() -> None:
        for drain_s in (0.0, 0.2):
            worker = await group_of(READY_RANKS, tmp_path / "log").start(GROUP)
            began = time.monotonic()
            await worker.stop(drain_s)
            assert time.monotonic() - began < 8.0
            assert all(gone(worker.pids))
            ended = await worker.ended()
            assert ("rank 0 ended by SIGTERM" if drain_s else "rank 0 ended by SIGKILL") in ended

    asyncio.run(scenario())


def test_a_group_that_may_outlive_ranks_is_rank_0s_to_end(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, group=GroupSettings(expert_parallel_size=3, start_timeout_s=30.0))
    assert settings.group.may_outlive_ranks

    async def scenario() -> None:
        worker = await group_of(READY_RANKS, tmp_path / "log").start(settings)
        ending = asyncio.ensure_future(worker.ended())
        worker.signal(signal.SIGKILL, 1)
        await asyncio.sleep(0.5)
        assert not ending.done()
        assert gone(worker.pids) == [False, True, False]
        worker.signal(signal.SIGKILL, 0)
        assert "rank 0 ended by SIGKILL" in await ending
        assert all(gone(worker.pids))

    asyncio.run(scenario())
