"""A process that may open too few files, start too few threads, have too little memory, or whose port is taken, names
it and ends. A small /dev/shm is no limit.

It would be a hang or a crash under load otherwise. What NCCL needs of /dev/shm: `tests/cluster/test_widths.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import pytest
from fakes.control_group import control_group
from fakes.fault_plan import Action, Fault, FaultPlan, planned_workers
from fakes.in_ci import every
from fakes.oracle_cluster import Pace, Streams, oracle_request, oracle_worker, oracle_workers
from fakes.two_node_ray import PENSTOCK

from penstock.cluster.local import LocalCluster
from penstock.cluster.subprocess_host import WORKER_COMMAND, SubprocessHost
from penstock.cluster.supervision import StartError
from penstock.workers.fault_points import Point
from penstock.workers.process_limits import LEAST_OPEN_FILES, LEAST_THREADS
from penstock.workers.protocol import Role
from penstock.workers.settings import WorkerSettings

pytestmark = pytest.mark.timeout(60)
WORKER = oracle_worker(Role.MIXED, 0, Pace())


def refusal(settings: WorkerSettings, command: Sequence[str], log: Path) -> str:
    """What a start says that does not come up, within seconds."""

    async def start() -> str:
        host = SubprocessHost(log, command)
        with pytest.raises(StartError) as refused:
            await asyncio.wait_for(host.start(settings), 20.0)
        return str(refused.value)

    words = asyncio.run(start())
    print(f"F41 {words}")
    return words


def few_files(limit: int, proof: Path) -> FaultPlan:
    return FaultPlan((Fault(Point.WORKER_START, Action.LIMIT, limit=limit),), 1, proof)


@pytest.mark.parametrize("limit", [16, 64])
def test_too_few_open_files(limit: int, tmp_path: Path) -> None:
    plan = few_files(limit, tmp_path / "proof")
    words = refusal(WORKER, planned_workers(plan), tmp_path / "log")
    plan.require_fired()
    assert f"may open {limit} files" in words
    assert "ulimit -n" in words


def test_just_enough_open_files(tmp_path: Path) -> None:
    plan = few_files(LEAST_OPEN_FILES, tmp_path / "proof")

    async def start() -> None:
        worker = await SubprocessHost(tmp_path / "log", planned_workers(plan)).start(WORKER)
        await worker.stop(1.0)

    asyncio.run(start())
    plan.require_fired()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = refusal(replace(WORKER, port=port), WORKER_COMMAND, tmp_path / "log")
    assert f"cannot listen on 127.0.0.1:{port}" in words


def test_more_kv_than_the_host_has_memory(tmp_path: Path) -> None:
    kv = replace(WORKER.kv, num_blocks=1 << 40)
    words = refusal(replace(WORKER, kv=kv), WORKER_COMMAND, tmp_path / "log")
    assert "MiB are available" in words
    assert "--kv-cache-memory-bytes" in words


def so_many_threads(count: int) -> contextlib.AbstractContextManager[Path]:
    """Processes in this group may have so many threads together."""
    return control_group("pids", "pids.max", count)


def shell(first: str, command: Sequence[str]) -> tuple[str, ...]:
    """The command, after something else in the same process."""
    return ("/bin/sh", "-c", f"{first} && exec {shlex.join(command)}")


@pytest.mark.parametrize("limit", every(3, [1, 8, 12, LEAST_THREADS]))
def test_too_few_threads(limit: int, tmp_path: Path) -> None:
    """Without the check, of one on two cores: SIGINT, a crash, a hang of 11 s in gRPC, a traceback."""
    with so_many_threads(limit) as group:
        words = refusal(WORKER, shell(f"echo $$ > {group}", WORKER_COMMAND), tmp_path / "log")
    assert f"{limit - 1} more threads can be started here and worker mixed-0 needs {LEAST_THREADS}" in words
    assert "ulimit -u" in words


def test_just_enough_threads(tmp_path: Path) -> None:
    async def start(group: Path) -> None:
        host = SubprocessHost(tmp_path / "log", shell(f"echo $$ > {group}", WORKER_COMMAND))
        worker = await host.start(WORKER)
        await worker.stop(1.0)

    with so_many_threads(LEAST_THREADS + 1) as group:
        asyncio.run(start(group))


@pytest.mark.parametrize("limit", every(2, [60, 256]))
def test_too_few_threads_for_a_private_ray(limit: int, tmp_path: Path) -> None:
    """Without the check: a traceback after a minute, or an abort."""
    command = (*PENSTOCK, "serve", "--port", "0")
    with so_many_threads(limit) as group:
        ended = subprocess.run(
            shell(f"echo $$ > {group}", command), capture_output=True, text=True, timeout=40, cwd=tmp_path, check=False
        )
    said = ended.stdout + ended.stderr
    print(f"F41 {said.splitlines()[-1]}")
    assert ended.returncode != 0
    assert "more threads can be started here and a private Ray with its workers needs" in " ".join(said.split())
    assert "Traceback" not in said


@contextlib.contextmanager
def small_shared_memory() -> Iterator[tuple[str, ...]]:
    """What runs a command where /dev/shm has 64 MB, as in most containers: a mount namespace, held by one process."""
    mount = "mount -t tmpfs -o size=64m tmpfs /dev/shm && echo mounted"
    keeper = subprocess.Popen(("unshare", "--mount", *shell(mount, ("cat",))), stdin=PIPE, stdout=PIPE, text=True)
    with keeper:
        if keeper.stdout is None or keeper.stdout.readline() != "mounted\n":
            pytest.skip("no mount namespace can be made here")
        try:
            yield ("nsenter", "--mount", "--target", str(keeper.pid))
        finally:
            keeper.kill()


def test_a_small_dev_shm_is_no_limit_to_workers(tmp_path: Path) -> None:
    """More than it holds is handed over through shared memory, which is anonymous."""
    pace, block_bytes = Pace(num_blocks=2048, transport="shared_memory"), 64 << 10
    workers = [
        replace(worker, runner=replace(worker.runner, oracle_block_bytes=block_bytes))
        for worker in oracle_workers(1, 1, pace)
    ]

    async def scenario(enter: tuple[str, ...]) -> None:
        async with LocalCluster(workers, host=SubprocessHost(tmp_path / "log", (*enter, *WORKER_COMMAND))) as cluster:
            tally = await Streams(cluster).run([oracle_request(n, 600, 8, pace) for n in range(8)])
            async with asyncio.timeout(5.0):  # until heartbeats say so
                while sum(w.totals.transfer_bytes for w in cluster.fleet.workers()) <= 64 << 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert (tally.completed, tally.wrong) == (8, [])

    with small_shared_memory() as enter:
        asyncio.run(scenario(enter))
