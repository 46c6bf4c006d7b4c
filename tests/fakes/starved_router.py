"""A router that others keep from running: `starved_router.py KEY ADDRESS=WORKER_ID ...`.

Keeps thirty streams open until it is told to end by a line on its standard input; then it lets the last ones finish and
says in one line of JSON what became of them all.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.oracle_cluster import PATIENT, Pace, Streams, oracle_request

from penstock.cluster.generation import open_generator
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.router.router import RequestReport
from penstock.router.settings import RouterSettings
from penstock.workers.protocol import Role

STREAMS = 30
TOKENS = 200


async def main(key: str, workers: list[str]) -> None:
    migrations: list[int] = []

    def observe(report: RequestReport) -> None:
        migrations.append(report.migrations)

    entries = []
    for worker in workers:
        address, _, worker_id = worker.partition("=")
        entries.append(RosterEntry(worker_id, Role.MIXED, 1, 1, WorkerState.READY, address))
    generator = open_generator(RouterSettings(admission=PATIENT), key, observe=observe)
    generator.links.update(Roster(1, tuple(entries)))
    await generator.links.wait_attached(10.0)
    streams = Streams(SimpleNamespace(generator=generator))  # type: ignore[arg-type]  # all that it asks for
    told = asyncio.ensure_future(asyncio.to_thread(sys.stdin.readline))
    numbers = iter(range(1_000_000))

    async def stream_on() -> None:
        while not told.done():
            number = next(numbers)
            await streams.run_one(number, oracle_request(number, 30, TOKENS, Pace()))

    running = [asyncio.ensure_future(stream_on()) for _ in range(STREAMS)]
    await streams.until_tokens(STREAMS)
    print("all stream", flush=True)
    await asyncio.gather(*running)
    tally = streams.tally
    found = {"completed": tally.completed, "wrong": tally.wrong, "failed": tally.failed, "given_up": sum(migrations)}
    print(json.dumps(found))
    await generator.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
