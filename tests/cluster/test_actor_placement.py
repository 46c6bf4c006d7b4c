"""Where the ranks of a worker go, and what they wait for, in words; on a real Ray it is `test_group_launch.py`'s."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.cluster import actor_placement
from penstock.cluster.actor_placement import choose_strategy, waiting_reason

FEW = "PACK"
NODES = [
    {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}, "Labels": {"zone": "a"}},
    {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0}, "Labels": {"zone": "b"}},
    {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}, "Labels": {"zone": "a"}},
]


@pytest.mark.parametrize(
    ("amounts", "width", "strategy", "words"),
    [
        ({"GPU": 1.0, "CPU": 2.0}, 2, "STRICT_PACK", ""),
        ({"GPU": 1.0}, 3, FEW, "its 3 ranks may be on several nodes: none has room for 3 x (1 GPU), the largest for 2"),
        ({"big": 1.0}, 2, FEW, "its 2 ranks may be on several nodes: none has room for 2 x (1 big), the largest for 0"),
        ({}, 64, "STRICT_PACK", ""),
    ],
)  # fmt: skip
def test_one_node_where_one_is_large_enough(amounts: dict[str, float], width: int, strategy: str, words: str) -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 2.0}]
    assert choose_strategy(nodes, amounts, width) == (strategy, words)


@pytest.mark.parametrize(
    ("amounts", "labels", "free", "words"),
    [
        ({"GPU": 1.0}, {}, {"GPU": 1.0}, "waiting for 2 x (1 GPU): all of it is in use"),
        ({"GPU": 2.0}, {}, {"GPU": 2.0}, "waiting for 2 x (2 GPU): all of it is in use"),
        ({"GPU": 2.0}, {"zone": "a"}, {"GPU": 2.0}, "waiting for 2 x (2 GPU): the nodes have room for 1"),
        ({"GPU": 1.0}, {"zone": "in(a,b)"}, {}, "waiting for 2 x (1 GPU): all of it is in use"),
        ({"fast": 1.0}, {}, {}, "waiting for 2 x (1 fast): the nodes have room for 0"),
        ({"CPU": 0.25}, {}, {"CPU": 4.0}, "waiting for its processes (2 x (0.25 CPU))"),
    ],
)
def test_what_a_group_waits_for(
    amounts: dict[str, float],
    labels: dict[str, str],
    free: dict[str, float],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: dict[str, Any] = {"nodes": NODES, "available_resources": free}
    for name, answer in answers.items():
        monkeypatch.setattr(actor_placement.ray, name, lambda answer=answer: answer)
    assert waiting_reason(amounts, 2, labels) == words
