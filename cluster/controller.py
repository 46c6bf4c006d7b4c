"""The one controller of a cluster: a detached Ray actor that owns the worker actors.

Created by `launch.py`, or by the first ingress replica of a Serve application (`ingress_replica.py`). Deployments say
what they want (`apply`), ingress processes watch it for the roster, `penstock scale` changes pool sizes; it starts,
restarts, drains and ends workers until the fleet is as wanted. It ends everything when the launcher, or the
application, is gone for good. When Ray restarts it after a crash it reads its plan again and finds its workers; none
notices. It is on no request's path: without it running streams go on, only restarts wait.

While Ray's control store is away (its process restarts, the head node is replaced) workers keep their leases, nobody
is taken for gone, and every change waits for it: whatever asks the store is awaited beside the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError

from penstock.cluster.actor_host import ActorHost, HostedActor
from penstock.cluster.attendance import Attendance, Attendant
from penstock.cluster.config import ClusterIdentity
from penstock.cluster.discovery import NAMESPACE, ClusterAddress, controller_name
from penstock.cluster.editions import ActorNeeds, Edition
from penstock.cluster.fleet_plan import FleetPlan, Member, Settled
from penstock.cluster.logs import begin_logs
from penstock.cluster.plan_store import StoreWatch, delete_plan, load_plan, save_plan
from penstock.cluster.progress_watch import until_stuck
from penstock.cluster.roster import Roster, WorkerState
from penstock.cluster.serve_state import delete_application, look_at_serve
from penstock.cluster.settings import PoolSettings
from penstock.cluster.supervision import Backoff, StartError, Supervisor
from penstock.cluster.validation import pools_problem
from penstock.workers.errors import ConfigError
from penstock.workers.priority import take_normal_priority
from penstock.workers.protocol import Role
from penstock.workers.settings import LogSettings

log = logging.getLogger(__name__)

ROUND_S = 0.5  # how often leases are looked at, and the fleet against the plan
STUCK_AFTER_S = 10.0  # waiting for resources so long makes a worker ask others for room
SERVE_ANSWER_S = 10.0
STORE_ANSWER_S = 2.0


@dataclass(frozen=True, slots=True)
class ControllerSpec:
    """What a controller is made of; Ray hands the same one to its restarts."""

    identity: ClusterIdentity = field(repr=False)
    app_name: str  # the Serve application in front of the workers
    launched: bool  # True: `penstock serve` keeps the cluster alive; False: the ingress replicas do
    worker_lease_s: float = 90.0  # workers end after so long without their controller
    lease_s: float = 20.0  # the cluster ends after so long without its launcher, or any ingress
    drain_s: float = 30.0  # what a worker runs when it is let go gets so long
    stop_drain_s: float = 5.0  # the same when the whole cluster ends by itself
    logs: LogSettings = field(default_factory=LogSettings)


class Controller:
    """See the module's docstring; all methods run on the actor's one asyncio loop."""

    def __init__(self, spec: ControllerSpec) -> None:
        begin_logs(spec.logs, "controller")
        take_normal_priority()
        self._spec = spec
        now = time.monotonic()
        self._attendance = Attendance(spec.lease_s, now)
        self._renewed = now
        self._ending = False
        self._room_made = now
        self._problems: dict[str, str] = {}  # edition -> why it cannot start
        self._served: set[str] = set()  # editions that have been complete, with the pool sizes they have now
        self._established: set[str] = set()  # editions that have been complete, with whatever sizes
        self._tasks: set[asyncio.Future[Any]] = set()
        saved = load_plan(self._cluster_id)
        self._key = saved["key"] if saved else spec.identity.key
        self._plan = FleetPlan.from_json(saved["plan"]) if saved else FleetPlan()
        self._host = ActorHost(self._cluster_id, spec.worker_lease_s, self._needs, self._waits, self._is_placed)
        # Versions and incarnations must grow over a restart of this actor: they count from the wall clock then.
        self._supervisor = Supervisor(
            self._host, (), backoff=Backoff(), first_version=int(time.time() * 1000), until_stuck=until_stuck
        )
        self._host.find_orphans(self._plan.members)
        self._store = StoreWatch(self._cluster_id, STORE_ANSWER_S)
        self._changing = asyncio.Lock()  # one change of the plan at a time
        self._returned = saved is not None
        self._served |= set(self._plan.targets)  # what runs already need not prove that it can start
        self._established |= self._served
        self._life: asyncio.Future[None] | None = None

    # --- deployments ----------------------------------------------------------------------------------------------

    async def join(self) -> str:
        """The cluster's key, for an ingress process. Raises StartError while the cluster is ending."""
        self._begin()
        if self._ending:
            raise StartError("the cluster is ending")
        return str(self._key)

    async def apply(self, edition: Edition, counts: Mapping[Role, int], patient: bool = False) -> Settled:
        """Have so many workers of an edition; returns once they serve, or cannot be started.

        Unless `patient`, at once where the edition has served before: an ingress that comes back while workers are
        missing must be there to say so, and to serve as soon as they are back.
        """
        self._begin()
        _check_counts(counts)
        if self._plan.apply(edition, counts):
            log.info("edition %s: %s", edition.key, _words(counts))
            self._served.discard(edition.key)
        await self._reconcile(also_wanted=edition.key)
        if edition.key in self._established and not patient:
            return Settled(established=True)
        return Settled(await self._settle(edition.key))

    async def scale(self, changes: Mapping[str, int]) -> dict[str, int]:
        """Other pool sizes, by role, until a deployment states others; the sizes that hold now. ConfigError."""
        self._begin()
        for target in self._plan.targets.values():
            _check_counts({**target.counts, **{Role(name): count for name, count in changes.items()}})
        self._plan.scale({Role(name): count for name, count in changes.items()})
        await self._reconcile()
        sizes = [target.counts for target in self._plan.targets.values()]
        return {role.value: count for role, count in sizes[-1].items()} if sizes else {}

    async def roll(self) -> int:
        """Replace every worker by a fresh one, one after the other; how many there are."""
        self._begin()
        count = self._plan.roll()
        plan = {"key": self._key, "plan": self._plan.to_json()}
        await asyncio.to_thread(save_plan, self._cluster_id, plan)
        await self._reconcile()
        return count

    async def ready(self) -> list[dict[str, object]]:
        """What each running worker says about itself."""
        hosted = [self._supervisor.hosted(entry.worker_id) for entry in self._supervisor.roster.entries]
        return [one.facts for one in hosted if isinstance(one, HostedActor)]

    # --- ingress processes ----------------------------------------------------------------------------------------

    async def watch(self, version: int, timeout_s: float, attendant: Attendant) -> Roster:
        """The roster of the attendant's edition once it is newer than `version`, or as it is after `timeout_s`."""
        self._begin()
        self._attendance.enter(attendant, time.monotonic())
        return (await self._supervisor.watch(version, timeout_s)).of_edition(attendant.edition)

    async def leave(self, attendant_id: str) -> None:
        """An ingress process goes away on purpose."""
        self._attendance.leave(attendant_id)
        self._do(self._look_after())

    async def address(self) -> ClusterAddress:
        """Where the cluster can be reached."""
        present = self._attendance.present
        newest = present[-1] if present else Attendant("", "")
        urls = [attendant.url for attendant in present if attendant.url]
        with contextlib.suppress(RayError, RuntimeError, TimeoutError):
            view = asyncio.to_thread(look_at_serve, self._spec.app_name)
            urls += (await asyncio.wait_for(view, SERVE_ANSWER_S)).urls
        return ClusterAddress(
            self._cluster_id, self._spec.app_name, tuple(dict.fromkeys(urls)), newest.models, newest.needs_key
        )

    # --- the launcher ---------------------------------------------------------------------------------------------

    async def renew(self) -> str:
        """The launcher lives. Returns what the workers still wait for, if they do."""
        self._begin()
        self._renewed = time.monotonic()
        waiting = self._host.waiting(0.0)
        reasons = {entry.reason for entry in self._supervisor.roster.entries if entry.worker_id in waiting}
        return "; ".join(sorted(reasons))

    async def stop(self, drain_s: float) -> None:
        """End every worker. The caller ends this actor."""
        self._ending = True
        if self._life is not None:
            self._life.cancel()
        await self._supervisor.stop(drain_s)
        await asyncio.to_thread(delete_plan, self._cluster_id)

    # --------------------------------------------------------------------------------------------------------------

    @property
    def _cluster_id(self) -> str:
        return self._spec.identity.cluster_id

    def _needs(self, worker_id: str) -> ActorNeeds:
        member = self._plan.members.get(worker_id)
        target = self._plan.targets.get(member.edition) if member is not None else None
        if target is None:
            raise StartError(f"worker {worker_id} is no longer wanted")
        return target.edition.needs

    def _waits(self, worker_id: str, reason: str) -> None:
        self._supervisor.note(worker_id, reason)

    def _is_placed(self, worker_id: str, words: str) -> None:
        self._supervisor.note_placement(worker_id, words)

    def _begin(self) -> None:
        """Start to live at the first call; every call leads here, because a restarted actor is told nothing."""
        if self._life is None:
            if self._returned:
                for member in self._plan.members.values():
                    self._start(member, incarnation=int(time.time()))
            self._life = asyncio.ensure_future(self._live())

    async def _live(self) -> None:
        """Look after the fleet; end it all when nobody wants it any more."""
        renewing = asyncio.ensure_future(self._renew_workers())
        try:
            while not self._ending:
                try:
                    await self._look_after()
                except RayError as error:
                    log.warning("Ray does not answer, looking again: %s", str(error).splitlines()[:1])
                await asyncio.sleep(ROUND_S)
        finally:
            renewing.cancel()

    async def _renew_workers(self) -> None:
        """Calls between actors need no control store; a change that waits for it must not hold them up."""
        while not self._ending:
            self._host.renew()
            await asyncio.sleep(self._spec.worker_lease_s / 6)

    async def _look_after(self) -> None:
        now = time.monotonic()
        unheard = self._attendance.overdue(now) or now - self._renewed > self._spec.lease_s
        if unheard and not await self._store.answers():
            self._attendance.excuse(now)
            self._renewed = now
        self._attendance.expire(now)
        for edition in self._attendance.abandoned():
            log.info("edition %s has no ingress any more", edition)
            self._plan.drop(edition)
            self._established.discard(edition)
            self._attendance.forget(edition)
        await self._reconcile()
        if self._spec.launched:
            if now - self._renewed > self._spec.lease_s:
                log.error("no sign of the launcher for %.0f s; the cluster ends", self._spec.lease_s)
                await self._end()
        elif not self._attendance.present and not await self._still_wanted(self._attendance.silent_s(now)):
            await self._end()

    async def _still_wanted(self, silent_s: float) -> bool:
        """No ingress is left: is the application being replaced or restarted, or is it gone?"""
        expired = silent_s > self._spec.lease_s
        if not expired and not self._served:
            return True  # it is only coming up
        try:
            view = asyncio.to_thread(look_at_serve, self._spec.app_name)
            wanted = (await asyncio.wait_for(view, SERVE_ANSWER_S)).wanted
        except (RayError, RuntimeError, TimeoutError) as error:
            log.warning("Serve does not answer: %s", str(error).splitlines()[:1])
            return not expired
        if not wanted:
            log.info("application %s is gone; the cluster ends", self._spec.app_name)
        return wanted

    async def _end(self) -> None:
        """End everything, this actor too."""
        if self._ending:
            return
        self._ending = True
        await self._supervisor.stop(self._spec.stop_drain_s)
        await asyncio.to_thread(delete_plan, self._cluster_id)
        if self._spec.launched:
            await asyncio.to_thread(delete_application, self._spec.app_name)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    # --- the fleet ------------------------------------------------------------------------------------------------

    async def _reconcile(self, also_wanted: str = "") -> None:
        """Begin whatever brings the fleet closer to the plan."""
        async with self._changing:
            if not self._ending:
                await self._take_steps(also_wanted)

    async def _take_steps(self, also_wanted: str) -> None:
        launched = set(self._plan.targets) if self._spec.launched else set()
        wanted = {also_wanted, *self._attendance.editions(), *launched}
        given_up = self._given_up()
        steps = self._plan.steps(self._supervisor.roster, wanted, self._stuck())
        if self._given_up() != given_up:
            self._room_made = time.monotonic()
        if steps.start or steps.stop:
            plan = {"key": self._key, "plan": self._plan.to_json()}
            await asyncio.to_thread(save_plan, self._cluster_id, plan)
        for member in steps.start:
            log.info("starting %s", member.worker_id)
            self._start(member, incarnation=1)
        for member in steps.stop:
            log.info("letting %s go", member.worker_id)
            self._do(self._supervisor.remove(member.worker_id, self._spec.drain_s))

    def _start(self, member: Member, incarnation: int) -> None:
        target = self._plan.targets.get(member.edition)
        if target is not None:
            identity = replace(self._spec.identity, key=self._key)
            settings = target.edition.worker(member.worker_id, member.role, identity, incarnation)
            self._supervisor.add(settings, member.edition)

    def _stuck(self) -> set[str]:
        """Workers that wait for room; nobody, shortly after some was made."""
        return self._host.waiting(STUCK_AFTER_S) if time.monotonic() - self._room_made > STUCK_AFTER_S else set()

    def _given_up(self) -> int:
        return sum(sum(target.given_up.values()) for target in self._plan.targets.values())

    async def _settle(self, edition: str) -> str:
        """Wait until the edition is complete, or cannot be: returns the reason then."""
        while not self._ending:
            roster = self._supervisor.roster
            if edition not in self._plan.targets:
                return "another deployment took its place"
            if self._plan.settled(edition, roster, self._host.waiting(STUCK_AFTER_S)):
                self._served.add(edition)
                self._established.add(edition)
                return ""
            failed = [e for e in roster.of_edition(edition).entries if e.state is WorkerState.RESTARTING]
            if failed and edition not in self._served:
                return failed[0].reason or f"worker {failed[0].worker_id} does not come up"
            await self._supervisor.watch(roster.version, ROUND_S)
        return "the cluster is ending"

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_counts(counts: Mapping[Role, int]) -> None:
    problem = pools_problem(PoolSettings(counts[Role.PREFILL], counts[Role.DECODE], counts[Role.MIXED]))
    if problem is not None:
        raise ConfigError(f"{problem[0]}: {problem[1]}", problem[0])


def _words(counts: Mapping[Role, int]) -> str:
    return ", ".join(f"{count} {role.value}" for role, count in counts.items() if count)


def create_controller(spec: ControllerSpec) -> Any:
    """The controller of a cluster, started if there is none yet."""
    options = {
        "name": controller_name(spec.identity.cluster_id),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "resources": {"node:__internal_head__": 0.001},  # where Serve's own controller lives, and nodes come and go not
        "max_restarts": -1,
        "max_concurrency": 1000,  # every ingress keeps one `watch` pending
    }
    return ray.remote(Controller).options(**options).remote(spec)
