"""Hosts workers as detached Ray actors: the controller's way to start, find again, renew and end them.

The controller gives it to the supervisor. A worker of width K is K actors in one placement group. Actors are detached,
so that they outlive a controller that Ray restarts, and leased, so that they do not outlive the cluster. One that Ray
cannot place yet waits for as long as it takes, and it is said for what. Knows nothing of what a worker does.

Invariant: a worker is all of its actors or none: what ends one ends the others, and gives back what they held. Only
a group that may go on without some of its ranks is whole as long as rank 0 lives; a controller that comes back then
does not adopt what is left of it, but starts it anew.

Whatever asks Ray's control store runs beside the loop: while the store is away it waits, and leases must go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from penstock.cluster.actor_placement import Placement, find_placements, place, waiting_reason
from penstock.cluster.discovery import NAMESPACE
from penstock.cluster.editions import ActorNeeds
from penstock.cluster.group_ranks import (
    failure_of,
    heard_from,
    is_ready,
    rank_settings,
    reason_of,
    start_timeout_s,
    until_done,
    weights_addresses,
)
from penstock.cluster.supervision import StartError
from penstock.workers.actor import WorkerActor
from penstock.workers.settings import WorkerSettings

log = logging.getLogger(__name__)

START_TIMEOUT_S = 600.0  # a large checkpoint from a slow disk
ANSWER_TIMEOUT_S = 5.0
PLACED_WITHIN_S = 8.0  # an actor that is not up after so long probably waits for resources
FOLLOW_S = 1.0  # after one rank is gone, for the others to end in their own way


class HostedActor:
    """One running worker: an actor, or one for each of its ranks."""

    def __init__(
        self,
        handles: Sequence[Any],
        facts: Sequence[Mapping[str, object]],
        placement: Placement | None = None,
        *,
        outlives_ranks: bool = False,
    ) -> None:
        """`handles` and `facts` by rank. `outlives_ranks`: it is rank 0's to end the others."""
        self._deciding = 1 if outlives_ranks else len(handles)
        self.handles = tuple(handles)
        self.pids = tuple(int(str(each["pid"])) for each in facts)
        self.weights_addresses = weights_addresses(facts)
        self.facts = {**facts[0], "width": len(handles), "pids": self.pids}
        self._placement = placement

    @property
    def address(self) -> str:
        """host:port of its RPC server."""
        return str(self.facts["address"])

    @property
    def incarnation(self) -> int:
        """As it was told."""
        return int(str(self.facts["incarnation"]))

    async def ended(self) -> str:
        """Returns once all its actors are gone; Ray fails the pending call at once when the process of one dies."""
        waits = [asyncio.ensure_future(_gone(handle)) for handle in self.handles]
        try:
            await until_done(waits[: self._deciding], 1)
            first = {rank: one.result() for rank, one in enumerate(waits) if one.done()}
            await until_done(waits, len(waits), FOLLOW_S)
        finally:
            for one in waits:
                one.cancel()
        await self.end()  # one may only be out of reach, and a successor is about to start
        if len(self.handles) == 1:
            return first[0]
        return "; ".join(f"rank {rank}: {reason}" for rank, reason in first.items())

    async def stop(self, drain_s: float) -> None:
        """Drain, then end the actors."""
        with contextlib.suppress(RayError, TimeoutError):
            await asyncio.wait_for(self.handles[0].stop.remote(drain_s), drain_s + ANSWER_TIMEOUT_S)
        await self.end()

    def renew(self) -> None:
        """Tell every rank that its controller lives. Answers are not waited for."""
        for handle in self.handles:
            handle.renew.remote()

    async def end(self) -> None:
        """End every actor and give back what they held. Safe to call twice."""
        await asyncio.to_thread(_end, self.handles, self._placement)


class ActorHost:
    """Starts worker actors of one cluster, or adopts those a former controller of it left running."""

    def __init__(
        self,
        cluster_id: str,
        lease_s: float,
        needs: Callable[[str], ActorNeeds],
        on_wait: Callable[[str, str], None] = lambda _worker_id, _reason: None,
        on_placed: Callable[[str, str], None] = lambda _worker_id, _words: None,
    ) -> None:
        """`needs` says what a worker asks Ray for; `on_wait` hears for what one waits, `on_placed` why it is spread."""
        self._prefix = f"worker/{cluster_id}/"
        self._lease_s = lease_s
        self._needs = needs
        self._on_wait = on_wait
        self._on_placed = on_placed
        self._live: dict[str, HostedActor] = {}
        self._waiting: dict[str, float] = {}  # worker id -> since when Ray has not placed it
        self._orphans: dict[str, dict[str, dict[int, str]]] = {}  # worker id -> name of a life -> actor names by rank
        self._placements: dict[str, Placement] = {}  # name of an orphan's life -> its placement group

    def find_orphans(self, members: Collection[str]) -> None:
        """Look for actors of this cluster that run already: `start` adopts members, the others are ended."""
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = str(actor["name"])
            if actor["namespace"] == NAMESPACE and name.startswith(self._prefix):
                life, _, rank = name.rpartition("/")
                self._orphans.setdefault(_worker_of(life), {}).setdefault(life, {})[int(rank)] = name
        self._placements = find_placements(self._prefix)
        strangers = {_worker_of(life) for life in self._placements} | self._orphans.keys()
        for worker_id in strangers - set(members):
            _end_orphans(*self._take_orphans(worker_id))

    def waiting(self, for_s: float) -> set[str]:
        """Workers that Ray has not placed for so long."""
        now = time.monotonic()
        return {worker_id for worker_id, since in self._waiting.items() if now - since >= for_s}

    async def start(self, settings: WorkerSettings) -> HostedActor:
        """Returns when the worker takes requests. Raises StartError."""
        hosted = await self._adopt(settings)
        if hosted is None:
            hosted = await self._create(settings)
        self._live[settings.worker_id] = hosted
        return hosted

    def renew(self) -> None:
        """Tell every worker that its controller lives."""
        for hosted in self._live.values():
            hosted.renew()

    # --- workers of a former controller -----------------------------------------------------------------------------

    async def _adopt(self, settings: WorkerSettings) -> HostedActor | None:
        """The newest life of the worker that serves whole, if there is one; what else is left of it is ended."""
        worker_id, adopted = settings.worker_id, None
        lives = self._orphans.get(worker_id, {})
        for life in sorted(lives, key=lambda life: int(life.rpartition("/")[2]), reverse=True):
            adopted = await self._adopt_life(life, lives[life], settings)
            if adopted is not None:
                del lives[life]
                placement = self._placements.pop(life, None)
                self._on_placed(worker_id, placement.words if placement is not None else "")
                log.info("adopted %s, %d ranks", life, len(adopted.handles))
                break
        orphans = self._take_orphans(worker_id)
        if any(orphans):
            await asyncio.to_thread(_end_orphans, *orphans)
        return adopted

    async def _adopt_life(self, life: str, names: Mapping[int, str], settings: WorkerSettings) -> HostedActor | None:
        """None where a rank is missing, or was still starting when its controller died."""
        width = settings.group.width
        if sorted(names) != list(range(width)):
            return None
        try:
            handles = await asyncio.to_thread(_find, [names[rank] for rank in range(width)])
            answers = asyncio.gather(*(_answer(handle.describe.remote()) for handle in handles))
            facts = await asyncio.wait_for(answers, ANSWER_TIMEOUT_S)
        except (ValueError, RayError, TimeoutError):
            return None
        if not all(facts):
            return None
        outlives = settings.group.may_outlive_ranks
        return HostedActor(handles, facts, self._placements.get(life), outlives_ranks=outlives)

    def _take_orphans(self, worker_id: str) -> tuple[list[str], list[Placement]]:
        """Actors and placement groups that are left of the worker's former lives; they are known no longer."""
        names = [name for life in self._orphans.pop(worker_id, {}).values() for name in life.values()]
        lives = [life for life in self._placements if _worker_of(life) == worker_id]
        return names, [self._placements.pop(life) for life in lives]

    # --- new ones ---------------------------------------------------------------------------------------------------

    async def _create(self, settings: WorkerSettings) -> HostedActor:
        needs = self._needs(settings.worker_id)
        life = f"{self._prefix}{settings.worker_id}/{settings.incarnation}"
        handles, placement = await _whole_or_none(asyncio.to_thread(self._actors, settings, needs, life))
        self._on_placed(settings.worker_id, placement.words if placement is not None else "")
        renewal = asyncio.ensure_future(_renew_often(handles, self._lease_s))
        try:
            await self._placed(handles, settings, needs)
            async with asyncio.timeout(max(START_TIMEOUT_S, start_timeout_s(settings, 0.0))):
                facts = await _started(handles, settings)
        except (RayError, TimeoutError) as error:
            await asyncio.to_thread(_end, handles, placement)
            raise StartError(f"worker {settings.worker_id} did not start: {_first_line(error)}") from error
        except (StartError, asyncio.CancelledError):
            await asyncio.shield(asyncio.to_thread(_end, handles, placement))
            raise
        finally:
            renewal.cancel()
        return HostedActor(handles, facts, placement, outlives_ranks=settings.group.may_outlive_ranks)

    def _actors(self, settings: WorkerSettings, needs: ActorNeeds, life: str) -> tuple[list[Any], Placement | None]:
        """Ask Ray for the actors of all ranks, and for a place of their own where they are several."""
        width = settings.group.width
        placement = place(needs, settings.role, width, life) if width > 1 else None
        return [self._actor(rank_settings(settings, rank), needs, life, placement) for rank in range(width)], placement

    def _actor(self, settings: WorkerSettings, needs: ActorNeeds, life: str, placement: Placement | None) -> Any:
        """Ask Ray for the actor of one rank."""
        options = needs.options(settings.role)
        if placement is not None:
            options.pop("label_selector", None)  # its bundle has it
            options |= placement.options(settings.group.rank)
        options |= {
            "name": f"{life}/{settings.group.rank}",
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": 0,
            "max_task_retries": 0,
        }
        return ray.remote(WorkerActor).options(**options).remote(settings.to_json(), self._lease_s)

    async def _placed(self, handles: Sequence[Any], settings: WorkerSettings, needs: ActorNeeds) -> None:
        """Returns once every actor's process is up; until then says what they wait for."""
        worker_id = settings.worker_id
        up = asyncio.gather(*(_answer(handle.renew.remote()) for handle in handles))
        amounts, labels = needs.amounts(settings.role), needs.label_selector
        since = time.monotonic()
        try:
            while not up.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(up), PLACED_WITHIN_S)
                    break
                self._waiting.setdefault(worker_id, since)
                reason = await asyncio.to_thread(waiting_reason, amounts, len(handles), labels)
                self._on_wait(worker_id, reason)
            await up
        finally:
            up.cancel()
            self._waiting.pop(worker_id, None)


async def _started(handles: Sequence[Any], settings: WorkerSettings) -> list[dict[str, object]]:
    """What each rank says about itself once all serve. Raises StartError in a rank's own words."""
    leader = ""
    if len(handles) > 1:
        told: dict[str, object] = await handles[0].lead.remote()
        if "group_address" not in told:
            raise _start_error(settings, {0: told})
        leader = str(told["group_address"])
    starts = [handle.start.remote(leader if rank else "") for rank, handle in enumerate(handles)]
    said = await heard_from([asyncio.ensure_future(_words(start)) for start in starts])
    if len(said) < len(handles) or not all(map(is_ready, said.values())):
        raise _start_error(settings, said)
    return [said[rank] for rank in range(len(handles))]


def _start_error(settings: WorkerSettings, said: Mapping[int, Mapping[str, object]]) -> StartError:
    failures = [failure_of(rank, words) for rank, words in said.items() if not is_ready(words)]
    return StartError(f"worker {settings.worker_id} did not start: {reason_of(failures, settings.group.width)}")


async def _words(starting: Awaitable[Any]) -> dict[str, object]:
    """What a rank says; of one whose process died, what Ray says."""
    try:
        said: dict[str, object] = await starting
    except RayError as error:
        return {"message": _first_line(error)}
    return said


async def _gone(handle: Any) -> str:
    """Returns once the actor is gone, with the reason."""
    try:
        await handle.ended.remote()
    except RayActorError as error:
        return _first_line(error)
    return "the actor ended"


def _find(names: Sequence[str]) -> list[Any]:
    """Actors by name. ValueError where one is gone."""
    return [ray.get_actor(name, namespace=NAMESPACE) for name in names]


async def _whole_or_none(
    making: Coroutine[Any, Any, tuple[list[Any], Placement | None]],
) -> tuple[list[Any], Placement | None]:
    """What is being made; it is ended, once it is there, when nobody waits for it any more."""
    made = asyncio.ensure_future(making)
    try:
        return await asyncio.shield(made)
    except asyncio.CancelledError:
        made.add_done_callback(lambda done: None if done.exception() else _end(*done.result()))
        raise


def _end(handles: Sequence[Any], placement: Placement | None) -> None:
    for handle in handles:
        ray.kill(handle)
    if placement is not None:
        placement.remove()


def _end_orphans(names: Sequence[str], placements: Sequence[Placement]) -> None:
    """Asks Ray's store: where a loop runs, call it beside it."""
    for name in names:
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))
    for placement in placements:
        placement.remove()


def _worker_of(life: str) -> str:
    """The worker id in `worker/CLUSTER/WORKER/INCARNATION`."""
    return life.split("/")[2]


async def _answer(pending: Awaitable[Any]) -> Any:
    return await pending


async def _renew_often(handles: Sequence[Any], lease_s: float) -> None:
    while True:
        await asyncio.sleep(lease_s / 5)
        for handle in handles:
            handle.renew.remote()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
