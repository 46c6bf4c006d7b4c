"""Groups of real processes at start and at their end: what is said, what is refused, and that nobody stays behind."""

import asyncio
import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
from fakes.rank_group import Rank, in_group, rank_settings
from fakes.worker_process import oracle_settings

from penstock.workers.parallel.fence import EXIT_GROUP_LOST
from penstock.workers.settings import KVSettings, WorkerSettings

pytestmark = pytest.mark.timeout(60)


async def pair(log: Path, leader: WorkerSettings, follower: WorkerSettings) -> tuple[Rank, Rank]:
    """Both started; the follower has the leader's address."""
    first = await Rank.start(leader, log)
    address = str((await first.says())["group_address"])
    group = dataclasses.replace(follower.group, rank=1, leader=address)
    return first, await Rank.start(dataclasses.replace(follower, group=group), log)


async def refused(log: Path, **changed: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both say when the follower was told otherwise; both end with code 1."""
    settings = in_group(oracle_settings(), 2)
    settings = dataclasses.replace(settings, group=dataclasses.replace(settings.group, start_timeout_s=25.0))
    first, second = await pair(log, settings, dataclasses.replace(settings, **changed))
    said = await second.says(), await first.says()
    assert await second.ends() == 1
    assert await first.ends(20) == 1
    return said


async def test_lines_and_orderly_end(tmp_path: Path) -> None:
    settings = in_group(oracle_settings(), 2)
    first, second = await pair(tmp_path / "log", settings, settings)
    facts, joined = await first.says(), await second.says()
    assert facts["address"]
    assert joined == {"joined": True, "pid": second.pid, "rank": 1, "weights_address": ""}
    second.signal(signal.SIGTERM)  # a host tells all; rank 0 drains, and the others stay with it
    await asyncio.sleep(0.3)
    assert second.process.returncode is None
    first.signal(signal.SIGTERM)
    assert await first.ends() == 0
    assert await second.ends() == 0


async def test_other_settings_are_refused(tmp_path: Path) -> None:
    for said in await refused(tmp_path / "log", kv=KVSettings(block_size=16, num_blocks=128)):
        assert said["error"] == "ConfigError"
        assert "kv.num_blocks is 128 instead of 4096" in said["message"]


@pytest.mark.slow
async def test_another_incarnation_is_refused(tmp_path: Path) -> None:
    said, leader = await refused(tmp_path / "log", incarnation=2)
    assert "incarnation" in said["message"]
    assert "rank 1" in leader["message"]
    assert leader["key"] == "group.start_timeout_s"


async def test_a_width_that_does_not_divide(tmp_path: Path) -> None:
    """Rank 0 is told by its own check, and so are the others by it."""
    settings = in_group(oracle_settings(), 2)
    settings = dataclasses.replace(settings, runner=dataclasses.replace(settings.runner, oracle_kv_heads=3))
    first, second = await pair(tmp_path / "log", settings, settings)
    for rank in (first, second):
        said = await rank.says()
        assert "2 ranks neither divide the oracle's 3 KV heads nor are a multiple of them" in said["message"]
        assert await rank.ends() == 1


@pytest.mark.slow
async def test_a_rank_that_dies_while_others_load(tmp_path: Path) -> None:
    settings = in_group(oracle_settings(), 3)
    settings = dataclasses.replace(settings, group=dataclasses.replace(settings.group, start_timeout_s=4.0))
    log = tmp_path / "log"
    first = await Rank.start(settings, log)
    address = str((await first.says())["group_address"])
    second = await Rank.start(rank_settings(settings, 1, address), log)
    third = await Rank.start(rank_settings(settings, 2, address), log)
    second.signal(signal.SIGSTOP)  # most likely while it imports
    await asyncio.sleep(0.2)
    second.signal(signal.SIGKILL)
    await second.ends()
    if (await first.says()).get("error") is None:  # it may have been quicker than the signal
        assert await first.ends() == EXIT_GROUP_LOST
        return
    assert await first.ends(40) == 1
    assert await third.ends() in (1, EXIT_GROUP_LOST)
