"""Makers of what the router believes, for its unit tests: welcomes, heartbeats, whole fleets."""

from __future__ import annotations

from penstock.router.emission import Emission
from penstock.router.fleet import Fleet
from penstock.router.settings import HealthSettings
from penstock.workers.protocol import Load, Role, Welcome


def welcome(worker_id: str, role: Role = Role.MIXED, **fields: int) -> Welcome:
    limits = {"block_size": 16, "num_blocks": 1000, "max_num_seqs": 32, "max_num_batched_tokens": 512} | fields
    width = limits.get("width", 1)
    return Welcome(
        1, worker_id, 1, role, 0, width, limits["block_size"], limits["num_blocks"], limits["max_num_seqs"], 100_000,
        limits["max_num_batched_tokens"], "", "", "",
    )  # fmt: skip


def load(**fields: float | bool) -> Load:
    figures: dict[str, float | bool] = {
        "step": 1, "step_age_s": 0.0, "predicted_step_s": 0.01, "running": 0, "waiting": 0, "queued_prefill_tokens": 0,
        "free_blocks": 1000, "cached_blocks": 0, "quarantined_blocks": 0, "transfers": 0, "preemptions": 0,
        "draining": False,
    }  # fmt: skip
    return Load(**(figures | fields))  # type: ignore[arg-type]


def fleet_of(*welcomes: Welcome, settings: HealthSettings | None = None) -> Fleet:
    fleet = Fleet(settings or HealthSettings(), 60.0)
    for each in welcomes:
        fleet.join(each, 0.0)
    return fleet


def emission_of(tokens: int = 0) -> Emission:
    return Emission(1 << 20, tuple(range(tokens)))
