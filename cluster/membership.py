"""One ingress process's tie to its cluster's controller: join, say what is wanted, follow the roster, leave.

`ingress_replica.py` holds one. Every call outlives the controller's restarts; where no launcher owns the cluster, a
controller that does not exist is created. The only Ray calls of an ingress process are here, none on a request's path.
The controller is looked up once and again only when Ray says that it is dead: its name cannot be looked up while Ray's
control store is away, it itself can be reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import ActorDiedError, RayError

from penstock.cluster.attendance import Attendant
from penstock.cluster.controller import ControllerSpec, create_controller
from penstock.cluster.discovery import find_controller
from penstock.cluster.editions import Edition
from penstock.cluster.fleet_plan import Settled
from penstock.cluster.roster import Roster
from penstock.cluster.supervision import StartError
from penstock.workers.protocol import Role

log = logging.getLogger(__name__)

WATCH_S = 5.0  # also how often an idle ingress gives a sign of life; well below the controller's lease
RETRY_S = 0.5
JOIN_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 20.0


class Membership:
    """Must be used on one asyncio loop."""

    def __init__(self, spec: ControllerSpec, attendant: Attendant) -> None:
        """A spec that is not `launched` makes this process create the controller where there is none."""
        self._spec = spec
        self._attendant = attendant
        self._handle: Any = None  # the controller's, once it is known

    async def join(self) -> str:
        """The cluster's key; also waits for a former cluster of the name to end. Raises StartError."""
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                while True:
                    try:
                        key: str = await _answer((await self._controller()).join.remote())
                    except (ValueError, RayError, TimeoutError) as error:
                        self._note(error)
                        await asyncio.sleep(RETRY_S)
                    else:
                        # A controller that has to be created anew must go on with the key that the workers know.
                        self._spec = replace(self._spec, identity=replace(self._spec.identity, key=key))
                        return key
        except TimeoutError as error:
            raise StartError(f"the controller of cluster {self._spec.identity.cluster_id} does not answer") from error

    async def apply(self, edition: Edition, counts: Mapping[Role, int], patient: bool = False) -> Settled:
        """See `Controller.apply`."""
        while True:
            try:
                settled: Settled = await (await self._controller()).apply.remote(edition, counts, patient)
            except (ValueError, RayError) as error:
                self._note(error)
                await asyncio.sleep(RETRY_S)
            else:
                return settled

    async def follow(self, update: Callable[[Roster], None]) -> None:
        """Hand every new roster to `update`, for ever."""
        version = -1
        while True:
            try:
                controller = await self._controller()
                while True:
                    roster: Roster = await _answer(controller.watch.remote(version, WATCH_S, self._attendant))
                    version = roster.version
                    update(roster)
            except (ValueError, RayError, TimeoutError) as error:  # gone, restarting, or not there yet
                self._note(error)
                await asyncio.sleep(RETRY_S)

    async def leave(self) -> None:
        """Say goodbye; nothing is lost if nobody hears it."""
        with contextlib.suppress(ValueError, RayError, TimeoutError):
            controller = self._handle or await asyncio.to_thread(find_controller, self._spec.identity.cluster_id)
            await _answer(controller.leave.remote(self._attendant.attendant_id))

    async def _controller(self) -> Any:
        if self._handle is None:
            try:
                self._handle = await asyncio.to_thread(find_controller, self._spec.identity.cluster_id)
            except ValueError:
                if self._spec.launched:
                    raise
                self._handle = await asyncio.to_thread(create_controller, self._spec)
        return self._handle

    def _note(self, error: Exception) -> None:
        if isinstance(error, ActorDiedError):  # one that only restarts keeps its handle
            self._handle = None
        log.warning("cannot ask the controller, trying again: %s", str(error).splitlines()[:1])


async def _answer(pending: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(pending, ANSWER_TIMEOUT_S)
