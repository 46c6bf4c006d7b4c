"""Which cores of one host each of its workers gets, so that they compute side by side and not in turns.

`config.py` and `editions.py` ask when they tell a worker its settings. Pure: binding itself is
`workers/cores.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.cluster.settings import ClusterConfig
from penstock.workers.protocol import Role

Shares = Mapping[str, tuple[tuple[int, ...], ...]]  # by role's value, one entry per worker of the pool


def shares_of(config: ClusterConfig) -> Shares:
    """Equal and disjoint parts of `runner.cpus`; empty where there is nothing to divide.

    That is: no cores are stated, the workers' threads are more than those cores, or the workers live on a Ray cluster
    of others, where nobody knows which of them meet on one node.
    """
    cpus, pools = config.runner.cpus, config.pools
    if not cpus or config.ray.address or pools.total * config.runner.threads > len(cpus):
        return {}
    size = len(cpus) // pools.total
    parts = iter([cpus[begin : begin + size] for begin in range(0, size * pools.total, size)])
    return {role.value: tuple(next(parts) for _ in range(pools.count(role))) for role in Role if pools.count(role)}


def share_of(shares: Shares, cpus: tuple[int, ...], role: Role, index: int) -> tuple[int, ...]:
    """The cores of one worker. Workers beyond the pool's first size double up; those without shares get all."""
    of_role = shares.get(role.value)
    return of_role[index % len(of_role)] if of_role else cpus
