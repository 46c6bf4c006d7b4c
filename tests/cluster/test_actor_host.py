"""What a worker waits for, in words, and when it is gone.

The rest of the host is proved on a real Ray by test_launch and test_serve_app.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.cluster import actor_host
from penstock.cluster.actor_host import HostedActor, waiting_reason

NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0, "prefill": 1.0}},
    {"Alive": True, "Resources": {"CPU": 1.0, "decode": 2.0}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("amounts", "free", "words"),
    [
        ({"CPU": 1.0, "decode": 1.0}, {"CPU": 4.0}, "waiting for 1 CPU, 1 decode: all of it is in use"),
        ({"CPU": 2.0, "decode": 1.0}, {"CPU": 4.0}, "waiting for 2 CPU, 1 decode: no node has it"),
        ({"GPU": 1.0}, {"CPU": 4.0}, "waiting for 1 GPU: no node has it"),
        ({"CPU": 0.25}, {"CPU": 4.0}, "waiting for its process (0.25 CPU)"),
        ({}, {}, "waiting for its process (a process)"),
    ],
)
def test_reasons(
    amounts: dict[str, float], free: dict[str, float], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: dict[str, Any] = {"nodes": NODES, "available_resources": free}
    for name, answer in answers.items():
        monkeypatch.setattr(actor_host.ray, name, lambda answer=answer: answer)
    assert waiting_reason(amounts) == words


class Handle:
    """Of an actor that lives until the test says otherwise."""

    def __init__(self) -> None:
        self.over = asyncio.Event()
        self.ended = SimpleNamespace(remote=self.over.wait)


@pytest.mark.parametrize(("outlives", "victim", "ends"), [(False, 1, True), (True, 1, False), (True, 0, True)])
def test_a_group_that_may_outlive_ranks_is_rank_0s_to_end(
    outlives: bool, victim: int, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actor_host, "FOLLOW_S", 0.05)
    killed: list[Handle] = []
    monkeypatch.setattr(actor_host.ray, "kill", killed.append)

    async def scenario() -> None:
        handles = [Handle() for _ in range(3)]
        facts = [{"pid": rank} for rank in range(3)]
        ending = asyncio.ensure_future(HostedActor(handles, facts, outlives_ranks=outlives).ended())
        await asyncio.sleep(0.05)
        handles[victim].over.set()
        await asyncio.wait([ending], timeout=0.5)
        assert ending.done() is ends
        assert killed == (handles if ends else [])
        ending.cancel()

    asyncio.run(scenario())
