"""What a worker waits for, in words; the rest of the host is proved on a real Ray by test_launch and test_serve_app."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.cluster import actor_host
from penstock.cluster.actor_host import waiting_reason

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
