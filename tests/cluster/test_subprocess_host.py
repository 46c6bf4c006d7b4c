"""Starting and ending plain worker processes, with commands that misbehave."""

import asyncio
import sys
from pathlib import Path

import pytest

from penstock.cluster.subprocess_host import SubprocessHost, WorkerProcess, describe_exit
from penstock.cluster.supervision import StartError
from penstock.workers.settings import WorkerSettings

SETTINGS = WorkerSettings("w", incarnation=3)
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
