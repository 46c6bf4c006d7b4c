"""The controller over a slow control store: it changes the fleet slowly, keeps and tells what there is meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Collection
from typing import Any

import pytest
from fakes.fake_host import FakeHost

from penstock.cluster.attendance import Attendant
from penstock.cluster.config import ClusterIdentity, load_config
from penstock.cluster.editions import edition_of
from penstock.workers.protocol import Role

CALL_S = 0.8
LEASE_S = 0.3  # of workers; renewed six times in it


class Host(FakeHost):
    """Workers that only remember when they were renewed."""

    def __init__(self, *_: Any) -> None:
        super().__init__(start_s=0.0)
        self.renewed: list[float] = []

    def find_orphans(self, members: Collection[str]) -> None:
        pass

    def waiting(self, for_s: float) -> set[str]:
        return set()

    def renew(self) -> None:
        self.renewed.append(time.monotonic())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve, as it is imported
def test_a_change_waits_for_a_slow_store_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.cluster import controller as module

    saved: list[float] = []

    def save(*_: object) -> None:
        time.sleep(CALL_S)
        saved.append(time.monotonic())

    monkeypatch.setattr(module, "ActorHost", Host)
    monkeypatch.setattr(module, "load_plan", lambda _: None)
    monkeypatch.setattr(module, "save_plan", save)
    monkeypatch.setattr(module, "delete_plan", lambda _: None)
    edition = edition_of(load_config(values={"runner.kind": "oracle"}, environment={}))

    async def scenario() -> None:
        controller = module.Controller(module.ControllerSpec(ClusterIdentity("c", "ab" * 32), "app", True, LEASE_S))
        host: Any = controller._host
        applied = asyncio.ensure_future(controller.apply(edition, dict.fromkeys(Role, 1), True))
        answers: list[float] = []
        while not applied.done():
            asked = time.monotonic()
            await controller.watch(-1, 0.0, Attendant("a", edition.key))
            answers.append(time.monotonic() - asked)
            await asyncio.sleep(0.01)
        assert (await applied).problem == ""
        assert len(host.alive()) == 3
        assert len(saved) == 1
        assert max(answers) < CALL_S / 2, "the roster waited for the store"
        gaps = [later - earlier for earlier, later in itertools.pairwise(host.renewed)]
        assert len(gaps) > 3
        assert max(gaps) < LEASE_S, "leases waited for the store"
        await controller.stop(0.0)

    asyncio.run(scenario())
