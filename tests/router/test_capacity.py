"""What heartbeats say a fleet can do: the line of its steps becomes a prefill rate and a bound on batches."""

from __future__ import annotations

import pytest
from fakes.beliefs import fleet_of, load, welcome

from penstock.router.capacity import batch_limit, capacity_of, prefill_limit
from penstock.router.fleet import Fleet
from penstock.workers.protocol import Role
from penstock.workers.totals import WorkerTotals


def measured(role: Role = Role.DECODE, **figures: object) -> Fleet:
    fleet = fleet_of(welcome("w", role, max_num_seqs=64, max_num_batched_tokens=512))
    fleet.load_arrived("w", load(step_base_s=0.02, step_token_s=0.001, **figures))  # type: ignore[arg-type]
    return fleet


def test_a_prefill_worker_computes_full_steps() -> None:
    view = measured(Role.PREFILL).workers["w"]
    assert view.prefill_per_s == pytest.approx(512 / 0.532)
    assert prefill_limit(view, 4.0) == pytest.approx(4 * 512 / 0.532)
    assert prefill_limit(view, 0.1) == 2 * 512


def test_decodes_take_their_part_of_a_mixed_workers_steps() -> None:
    view = measured(Role.MIXED, running=112).workers["w"]
    assert view.prefill_per_s == pytest.approx(400 / 0.532)


def test_nothing_measured_is_said_to_be_unknown() -> None:
    capacity = capacity_of(fleet_of(welcome("w")), 0.1)
    assert (capacity.prefill_per_s, capacity.base_s, capacity.places) == (None, 0.0, 32)
    fleet = fleet_of(welcome("w"))
    view = fleet.workers["w"]
    assert prefill_limit(view, 4.0) == 8 * 512
    fleet.computed(fleet.stake("w", 1000, 0, 0.0), 10.0)  # what it has done, waiting included, bounds nobody's wait
    assert capacity_of(fleet, 0.1).prefill_per_s is None


def test_batches_are_kept_to_what_a_token_may_take() -> None:
    view = measured().workers["w"]
    assert batch_limit(view, 0.0) == 64
    assert batch_limit(view, 0.05) == 30
    assert batch_limit(view, 0.5) == 64
    assert batch_limit(view, 0.001) == 1, "one always runs"
    busy = measured(totals=WorkerTotals(prompt_tokens=500, cached_tokens=300, generated_tokens=100)).workers["w"]
    assert batch_limit(busy, 0.05) == 10, "each sequence brings two prompt tokens for every one it generates"


def test_only_workers_without_that_bound_may_be_given_more_than_they_have_places_for() -> None:
    fleet = measured()
    assert (capacity_of(fleet, 0.05).places, capacity_of(fleet, 0.05).spare) == (30, 0)
    assert (capacity_of(fleet, 0.0).places, capacity_of(fleet, 0.0).spare) == (64, 64)
