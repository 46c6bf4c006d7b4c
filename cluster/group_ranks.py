"""The ranks of one worker as its host sees them: what each is told, and who is to blame when one is gone.

`subprocess_host.py` and `actor_host.py` use it. Starts nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.cluster.cores import share_of_rank
from penstock.workers.settings import WorkerSettings

WORDS_S = 1.0  # after one rank has failed to start, for the others' words
JOIN_MARGIN_S = 10.0  # beyond the group's own time for its start; after it, nobody waits for the group's own words
_FOLLOWED = "GroupError"  # said by a rank that ends because another one did


def rank_settings(settings: WorkerSettings, rank: int, leader: str = "") -> WorkerSettings:
    """What rank `rank` is told, of a worker of these settings; `leader` is what rank 0 said about where it listens."""
    width, runner = settings.group.width, settings.runner
    cpus = share_of_rank(runner.cpus, runner.threads, rank, width) if width > 1 else runner.cpus
    return dataclasses.replace(
        settings,
        runner=dataclasses.replace(runner, cpus=cpus),
        group=dataclasses.replace(settings.group, rank=rank, leader=leader),
    )


def start_timeout_s(settings: WorkerSettings, alone_s: float) -> float:
    """How long a start may take: `alone_s` for a worker of one rank."""
    return alone_s if settings.group.width == 1 else settings.group.start_timeout_s + JOIN_MARGIN_S


async def until_done(futures: Sequence[asyncio.Future[Any]], count: int, timeout_s: float | None = None) -> None:
    """Returns once so many of the futures are done, or after `timeout_s`; cancels none."""
    news = asyncio.Event()

    def tell(_: asyncio.Future[Any]) -> None:
        news.set()

    for one in futures:
        one.add_done_callback(tell)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while sum(one.done() for one in futures) < count:
                    news.clear()
                    await news.wait()
    finally:
        for one in futures:
            one.remove_done_callback(tell)


async def heard_from(hearing: Sequence[asyncio.Future[dict[str, object]]]) -> dict[int, dict[str, object]]:
    """What each rank says about its start, by rank, once all are ready, or soon after the first that is not.

    The other ranks only follow one that fails; who has not said anything by then is left out.
    """
    try:
        while not all(one.done() for one in hearing) and all(is_ready(one.result()) for one in hearing if one.done()):
            await until_done(hearing, sum(one.done() for one in hearing) + 1)
        await until_done(hearing, len(hearing), WORDS_S)
        return {rank: one.result() for rank, one in enumerate(hearing) if one.done()}
    finally:
        for one in hearing:
            one.cancel()


def is_ready(said: Mapping[str, object]) -> bool:
    """Rank 0 says its address then, the others that they have joined."""
    return "address" in said or "joined" in said


def weights_addresses(said: Sequence[Mapping[str, object]]) -> tuple[str, ...]:
    """Where the ranks serve their weights to workers that start; those that do not are left out."""
    return tuple(str(facts["weights_address"]) for facts in said if facts.get("weights_address"))


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why one rank did not start."""

    rank: int
    message: str
    kind: str = ""  # the error that it said; empty: it said nothing


def failure_of(rank: int, said: Mapping[str, object]) -> Failure:
    """Out of the line in which a rank says why it cannot start."""
    return Failure(rank, str(said.get("message", "no reason given")), str(said.get("error", "")))


def reason_of(failures: Sequence[Failure], width: int) -> str:
    """The words of the rank at fault: of one that named its own error, else of one that died, else of any."""
    first, *_ = sorted(failures, key=lambda each: (each.kind == _FOLLOWED, not each.kind, each.rank))
    if width == 1 or first.message.startswith("rank "):
        return first.message
    return f"rank {first.rank}: {first.message}"


def end_in_words(ends: Sequence[str], blameless: Sequence[bool]) -> str:
    """How a worker ended, out of how each rank did; `blameless` ranks only followed another one."""
    if len(ends) == 1:
        return ends[0]
    guilty = [f"rank {rank} {end}" for rank, end in enumerate(ends) if not blameless[rank]]
    followed = sum(blameless)
    if not guilty:
        return f"all {len(ends)} ranks ended: {', '.join(dict.fromkeys(ends))}"
    return "; ".join(guilty) + (f"; {followed} more followed" if followed else "")
