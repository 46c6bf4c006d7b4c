"""Each policy alone: what makes a candidate dearer, and that adding one touches two places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.router.placement import POLICIES
from penstock.router.policies.candidate import Candidate, Phase
from penstock.router.policies.least_loaded import LeastLoaded
from penstock.router.policies.prefix_load import PrefixLoad
from penstock.router.settings import PlacementSettings

PLAIN = Candidate(
    worker_id="w",
    phase=Phase.LOCAL,
    context_tokens=1000,
    uncached_tokens=1000,
    queued_tokens=0,
    sequences=0,
    max_sequences=32,
    free_tokens=16_000,
    total_tokens=16_000,
    recent_work=0.0,
)


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("policy", [PrefixLoad, LeastLoaded])
def test_load_makes_dearer(policy: type[PrefixLoad] | type[LeastLoaded], phase: Phase) -> None:
    cost = policy(PlacementSettings()).cost
    idle = replace(PLAIN, phase=phase)
    busy = replace(idle, queued_tokens=4000, sequences=20, recent_work=9000.0)
    assert cost(busy) > cost(idle)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_cached_prefix_makes_cheaper(phase: Phase) -> None:
    owner = replace(PLAIN, phase=phase, uncached_tokens=100)
    assert PrefixLoad(PlacementSettings()).cost(owner) < PrefixLoad(PlacementSettings()).cost(
        replace(PLAIN, phase=phase)
    )
    assert LeastLoaded(PlacementSettings()).cost(owner) == LeastLoaded(PlacementSettings()).cost(
        replace(PLAIN, phase=phase)
    )


@pytest.mark.parametrize("full", [{"free_tokens": 500}, {"sequences": 32}])
@pytest.mark.parametrize("phase", [Phase.LOCAL, Phase.DECODE])
def test_no_room_costs_more_than_any_cached_prefix_saves(phase: Phase, full: dict[str, int]) -> None:
    cost = PrefixLoad(PlacementSettings()).cost
    crowded = replace(PLAIN, phase=phase, **{"uncached_tokens": 600} | full)
    assert not crowded.has_room
    assert cost(crowded) > cost(replace(PLAIN, phase=phase))


@pytest.mark.parametrize("phase", [Phase.LOCAL, Phase.DECODE])
def test_of_full_workers_the_shorter_line_is_cheaper(phase: Phase) -> None:
    """Whatever else is cheap about the other: its line is longer by whole answers."""
    cost = PrefixLoad(PlacementSettings()).cost
    short = replace(PLAIN, phase=phase, sequences=32, recent_work=9000.0)
    long = replace(PLAIN, phase=phase, sequences=34, uncached_tokens=1)
    assert cost(short) < cost(long)


def test_a_wait_counts_less_than_the_same_tokens_computed_twice() -> None:
    cost = PrefixLoad(PlacementSettings(queue_weight=0.25)).cost
    owner = replace(PLAIN, uncached_tokens=200, queued_tokens=3000)
    assert cost(owner) < cost(PLAIN)
    assert cost(replace(owner, queued_tokens=3300)) > cost(PLAIN)


def test_every_policy_file_is_in_the_table_and_small() -> None:
    folder = Path(__file__).parents[2] / "router" / "policies"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "candidate"}
    assert files == set(POLICIES)
    assert all(len(path.read_text().splitlines()) <= 120 for path in folder.glob("*.py"))
