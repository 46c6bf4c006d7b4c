"""How the cores of one host are shared out among its workers, and what a worker is told of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.cluster.config import ClusterIdentity, Sourced, build, load_config, worker_settings
from penstock.cluster.cores import share_of, share_of_rank, shares_of
from penstock.cluster.derived import derive
from penstock.cluster.editions import Edition, edition_of
from penstock.cluster.group_ranks import rank_settings
from penstock.cluster.settings import ClusterConfig
from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role
from penstock.workers.settings import WorkerSettings

IDENTITY = ClusterIdentity("c", "")


def config(cores: int, **values: Any) -> ClusterConfig:
    layers = {name.replace("__", "."): Sourced(value, "here") for name, value in values.items()}
    return derive(build(layers), cores=cores, gpus=0)


def told(settled: ClusterConfig, role: Role, index: int = 0) -> tuple[int, ...]:
    cpus = worker_settings(settled, role, index, IDENTITY).runner.cpus
    by_edition = Edition.from_json(json.loads(json.dumps(edition_of(settled).to_json())))
    assert by_edition.worker(f"{role.value}-{index}", role, IDENTITY).runner.cpus == cpus, "both ways to a worker"
    return cpus


def test_a_split_pair_computes_side_by_side_by_default() -> None:
    pair = config(2)
    assert (pair.runner.threads, pair.runner.cpus) == (1, (0, 1))
    assert (told(pair, Role.PREFILL), told(pair, Role.DECODE)) == ((0,), (1,))


def test_shares_are_disjoint_equal_and_as_large_as_the_host_allows() -> None:
    many = config(9, pools__prefill=1, pools__decode=2, pools__mixed=1, runner__threads=2)
    shares = [told(many, Role.PREFILL), told(many, Role.DECODE, 0), told(many, Role.DECODE, 1), told(many, Role.MIXED)]
    assert shares == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert told(config(8, runner__threads=1), Role.DECODE) == (4, 5, 6, 7), "room for threads that do not compute"


@pytest.mark.parametrize(
    "values",
    [
        {"runner__threads": 2},  # more threads than cores
        {"pools__mixed": 1},  # nobody beside it
        {"ray__address": "auto"},  # other hosts
        {"runner__kind": "oracle"},  # computes nothing
        {"runner__device": "cuda"},
    ],
)
def test_nobody_is_bound_where_that_would_not_help(values: dict[str, Any]) -> None:
    settled = config(2, **values)
    assert (settled.runner.cpus, told(settled, Role.PREFILL)) == ((), ())


def test_stated_cores_are_what_is_shared_out() -> None:
    stated = config(16, runner__cpus=["4", 6])
    assert (stated.runner.threads, told(stated, Role.PREFILL), told(stated, Role.DECODE)) == (1, (4,), (6,))
    foreign = config(16, runner__cpus=[4, 6], ray__address="auto")
    assert told(foreign, Role.PREFILL) == told(foreign, Role.DECODE) == (4, 6)
    crowded = config(16, runner__cpus=[4, 6], runner__threads=2)
    assert told(crowded, Role.DECODE) == (4, 6)


def test_workers_added_later_double_up() -> None:
    pair = config(4)
    shares = shares_of(pair)
    assert share_of(shares, pair.runner.cpus, Role.DECODE, 1) == (2, 3)
    assert share_of(shares, pair.runner.cpus, Role.MIXED, 0) == (0, 1, 2, 3)
    assert edition_of(pair).worker("decode-x", Role.DECODE, IDENTITY).runner.cpus == (2, 3)


def test_more_threads_than_stated_cores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"more than the 1 of runner\.cpus"):
        load_config(environment={}, values={"runner.kind": "oracle", "runner.cpus": [0], "runner.threads": 2})


def test_cores_survive_json() -> None:
    settings = worker_settings(config(2), Role.DECODE, 0, IDENTITY)
    assert WorkerSettings.from_json(settings.to_json()) == settings


def test_every_rank_gets_as_many_cores() -> None:
    groups = config(8, pools__tensor_parallel_size=2, pools__prefill_tensor_parallel_size=1, pools__decode=2)
    assert (groups.pools.ranks, groups.runner.threads) == (5, 1)
    assert (told(groups, Role.PREFILL), told(groups, Role.DECODE, 0), told(groups, Role.DECODE, 1)) == (
        (0,),
        (1, 2),
        (3, 4),
    )
    worker = worker_settings(groups, Role.DECODE, 1, IDENTITY)
    assert [rank_settings(worker, rank).runner.cpus for rank in range(2)] == [(3,), (4,)]
    wide = config(8, pools__tensor_parallel_size=2, runner__threads=2)
    worker = worker_settings(wide, Role.DECODE, 0, IDENTITY)
    assert [rank_settings(worker, rank).runner.cpus for rank in range(2)] == [(4, 5), (6, 7)]
    alone = config(2, pools__mixed=1, pools__tensor_parallel_size=2)
    worker = worker_settings(alone, Role.MIXED, 0, IDENTITY)
    assert [rank_settings(worker, rank).runner.cpus for rank in range(2)] == [(0,), (1,)]


def test_ranks_that_cannot_compute_side_by_side_are_not_bound() -> None:
    crowded = config(2, pools__tensor_parallel_size=2)
    assert (crowded.pools.ranks, crowded.runner.threads, crowded.runner.cpus) == (4, 1, ())
    assert share_of_rank((0, 1, 2), 2, 1, 2) == (0, 1, 2)
    assert share_of_rank((), 1, 1, 2) == ()
