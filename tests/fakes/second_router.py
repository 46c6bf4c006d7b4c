"""Another ingress's router over workers that run already: `second_router.py KEY ADDRESS=WORKER_ID ...`.

It keeps thirty long streams open and says so in one line once all have tokens; then it waits for its death.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.oracle_cluster import Pace, oracle_request

from penstock.cluster.generation import Generator, open_generator
from penstock.cluster.roster import Roster, RosterEntry, WorkerState
from penstock.router.settings import RouterSettings
from penstock.workers.protocol import Role

STREAMS = 30


async def read_on(generator: Generator, number: int, begun: asyncio.Semaphore) -> None:
    first = True
    async for _ in generator.submit(oracle_request(number, 40, 1500, Pace(), seed=9)):
        if first:
            first = False
            begun.release()


async def main(key: str, workers: list[str]) -> None:
    entries = []
    for worker in workers:
        address, _, worker_id = worker.partition("=")
        entries.append(RosterEntry(worker_id, Role.MIXED, 1, 1, WorkerState.READY, address))
    generator = open_generator(RouterSettings(), key)
    generator.links.update(Roster(1, tuple(entries)))
    await generator.links.wait_attached(10.0)
    begun = asyncio.Semaphore(0)
    reading = [asyncio.ensure_future(read_on(generator, number, begun)) for number in range(STREAMS)]
    for _ in reading:
        await begun.acquire()
    print("all stream", flush=True)
    await asyncio.gather(*reading)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
