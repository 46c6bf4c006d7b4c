"""One prefill and one decode worker do not reach each other, while both reach all others.

Nothing fails; the pair is left alone after a few attempts, both go on serving with others, and the pair comes back.
Real processes; `-s` prints the row of the fault table.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from pathlib import Path

import pytest
from fakes.hostile_network import hostile_network
from fakes.lawful import Court, lawful
from fakes.oracle_cluster import PATIENT, Pace, oracle_request, oracle_workers

from penstock.router.settings import PlacementSettings, RouterSettings
from penstock.router.trail import AttemptTrail

PACE = Pace(step_s=0.003, lease_s=0.5, chunk=64, transport="tcp", digest="full")
SPLIT = RouterSettings(PlacementSettings(local_prefill_tokens=0), PATIENT)
CUT = ("prefill-0", "decode-0")
CUT_S = 5.0
TRIALS = 3  # after 1 and 2 s, and one to spare


class Load:
    """Six requests at a time, until told otherwise."""

    def __init__(self, court: Court) -> None:
        self._court = court
        self._numbers = itertools.count()

    async def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            requests = {n: oracle_request(n, 40, 12, PACE) for n in itertools.islice(self._numbers, 6)}
            self._court.expect(list(requests.values()))
            await asyncio.gather(*(self._court.streams.run_one(n, request) for n, request in requests.items()))

    def attempts(self, since: float, until: float) -> list[AttemptTrail]:
        """Those that began between."""
        return [
            attempt
            for report in self._court.reports
            for attempt in report.trail.attempts
            if since <= report.trail.arrived + attempt.began < until
        ]


def pairs(attempts: list[AttemptTrail]) -> Counter[tuple[str | None, str | None]]:
    return Counter((attempt.prefill, attempt.decode) for attempt in attempts)


@pytest.mark.timeout(90)
def test_a_pair_that_cannot_reach_each_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with lawful(oracle_workers(2, 2, PACE), SPLIT, log_file=tmp_path / "log") as court:
            load = Load(court)
            with hostile_network() as network:
                began = time.monotonic()
                await load.run(1.0)
                assert len(pairs(load.attempts(began, time.monotonic()))) == 4, "not all pairs were in use"
                network.cut_between(*CUT)
                cut = time.monotonic()
                await asyncio.gather(*(load.run(CUT_S) for _ in range(3)))
                failed = [each for each in load.attempts(cut, cut + CUT_S) if each.end == "transfer_failed"]
                assert set(pairs(failed)) == {CUT}
                opened = cut + 3 * PACE.lease_s  # the first attempts have failed
                meanwhile = pairs(load.attempts(opened, cut + CUT_S))
                network.heal()
                healed = time.monotonic()
                async with asyncio.timeout(20.0):
                    while CUT not in pairs([e for e in load.attempts(healed, 1e18) if e.end == "completed"]):
                        await load.run(0.5)
                back_s = time.monotonic() - healed
        row = court.row("F24 one pair cut off for 5 s")
        print(f"{row} | failed attempts {len(failed)} | meanwhile {dict(meanwhile)} | back after {back_s:.1f} s")
        assert set(court.terminals()) == {"completed"}
        assert 0 < meanwhile[CUT] <= TRIALS
        assert meanwhile["prefill-0", "decode-1"] > 20
        assert meanwhile["prefill-1", "decode-0"] > 20
        assert court.streams.tally.wrong == []

    asyncio.run(scenario())
