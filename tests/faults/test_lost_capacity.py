"""A third of the workers dies at nine tenths of the load: real processes, open loop, before the ledger's laws.

What cannot be served is refused at once; retries add next to nothing; all is well soon after they are back. The same on
a virtual clock, with more shapes: `tests/router/test_overload.py`. `-s` prints the row of the fault table.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes.lawful import Court, lawful
from fakes.oracle_cluster import Pace, oracle_request, oracle_worker

from penstock.cluster.ledger.entries import Terminal
from penstock.cluster.supervision import Backoff
from penstock.router.settings import AdmissionSettings, RouterSettings
from penstock.workers.protocol import Role

PACE = Pace(step_s=0.1, max_num_seqs=4)
WORKERS, OUTPUT = 6, 20
ANSWER_S = (OUTPUT + 1) * PACE.step_s
RATE = 0.9 * WORKERS * PACE.max_num_seqs / ANSWER_S
BEFORE_S, AFTER_S = 6.0, 6.0
ROUTER = RouterSettings(admission=AdmissionSettings(ttft_target_s=2.0))


@dataclass(frozen=True)
class Ended:
    """One request; seconds since the load began."""

    name: str
    asked: float
    at: float


async def load(court: Court, seconds: float) -> list[Ended]:
    """Open loop."""
    loop, draw = asyncio.get_running_loop(), random.Random(1)
    begun = loop.time()
    asking: list[asyncio.Task[Ended]] = []

    async def one(number: int) -> Ended:
        request, asked = oracle_request(number, 24, OUTPUT, PACE), loop.time() - begun
        court.expect([request])
        await court.streams.run_one(number, request)
        return Ended(request.request_id, asked, loop.time() - begun)

    while loop.time() - begun < seconds:
        asking.append(asyncio.ensure_future(one(len(asking))))
        await asyncio.sleep(draw.expovariate(RATE))
    return list(await asyncio.gather(*asking))


@pytest.mark.slow  # router/test_overload.py has the quick edition
@pytest.mark.parametrize("dead_s", [6.0, 60.0])
@pytest.mark.timeout(180)
def test_a_third_of_the_workers_dead_at_nine_tenths_load(dead_s: float, tmp_path: Path) -> None:
    asyncio.run(scenario(dead_s, tmp_path / "log"))


async def scenario(dead_s: float, log: Path) -> None:
    workers = [oracle_worker(Role.MIXED, index, PACE) for index in range(WORKERS)]
    async with lawful(workers, ROUTER, log_file=log, backoff=Backoff(first_s=dead_s)) as court:
        begun = asyncio.get_running_loop().time()
        loading = asyncio.ensure_future(load(court, BEFORE_S + dead_s + AFTER_S))
        await asyncio.sleep(BEFORE_S)
        for victim in ("mixed-0", "mixed-1"):
            court.cluster.kill(victim)
        await asyncio.sleep(dead_s / 2)
        assert sum(status.state == "ready" for status in court.cluster.fleet.workers()) == WORKERS - 2
        assert await court.cluster.wait_ready(dead_s + 20.0)
        back = asyncio.get_running_loop().time() - begun
        ended = await loading
    judge(court, ended, back, dead_s)


def judge(court: Court, ended: list[Ended], back: float, dead_s: float) -> None:
    """`back`: when the dead were there again."""
    terminals = {entry.request_id: entry.terminal for entry in court.entries}
    assert set(terminals.values()) == {Terminal.COMPLETED, Terminal.SHED}, court.terminals()

    def goodput(since: float, until: float) -> float:
        done = [e for e in ended if terminals[e.name] is Terminal.COMPLETED and since <= e.at < until]
        return len(done) / (until - since)

    refused = [e for e in ended if terminals[e.name] is Terminal.SHED]
    recovery = max(0.0, max(e.at for e in refused) - back)
    before, during = goodput(ANSWER_S, BEFORE_S), goodput(BEFORE_S + 0.5, BEFORE_S + dead_s)
    attempts = sum(report.attempts for report in court.reports) / (len(ended) - len(refused))
    print(
        f"{court.row(f'F28 a third of the workers dead {dead_s:.0f} s')} | goodput {during / before:.2f} x | "
        f"attempts {attempts:.2f} x | refused in {statistics.median(e.at - e.asked for e in refused):.2f} s | "
        f"recovery {recovery:.1f} s"
    )
    assert during >= 0.6 * before
    assert attempts < 1.1
    assert recovery < 30.0
    assert not [e for e in refused if e.asked > back + 3.0], "refused after all were back"
