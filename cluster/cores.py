"""Which cores of one host each of its workers gets, so that they compute side by side and not in turns.

`config.py` and `editions.py` ask when they tell a worker its settings; a worker of several ranks has the cores of all
of them, which `group_ranks.py` divides. Pure: binding itself is `workers/cores.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping

from penstock.cluster.settings import ClusterConfig
from penstock.workers.protocol import Role

Shares = Mapping[str, tuple[tuple[int, ...], ...]]  # by role's value, one entry per worker of the pool


def shares_of(config: ClusterConfig) -> Shares:
    """Disjoint parts of `runner.cpus`, as many cores for every rank; empty where there is nothing to divide.

    That is: no cores are stated, the ranks' threads are more than those cores, or the workers live on a Ray cluster
    of others, where nobody knows which of them meet on one node.
    """
    cpus, pools = config.runner.cpus, config.pools
    if not cpus or config.ray.address or pools.ranks * config.runner.threads > len(cpus):
        return {}
    size = len(cpus) // pools.ranks
    shares, begin = {}, 0
    for role in Role:
        own = size * pools.width(role)
        starts = range(begin, begin + own * pools.count(role), own)
        shares[role.value] = tuple(cpus[start : start + own] for start in starts)
        begin = starts.stop
    return {role: parts for role, parts in shares.items() if parts}


def share_of(shares: Shares, cpus: tuple[int, ...], role: Role, index: int) -> tuple[int, ...]:
    """The cores of one worker. Workers beyond the pool's first size double up; those without shares get all."""
    of_role = shares.get(role.value)
    return of_role[index % len(of_role)] if of_role else cpus


def share_of_rank(cpus: tuple[int, ...], threads: int, rank: int, width: int) -> tuple[int, ...]:
    """The cores of one rank of a worker that has `cpus`: a part of its own where all ranks' threads fit, else all."""
    size = len(cpus) // width
    return cpus[rank * size : (rank + 1) * size] if size >= max(1, threads) else cpus
