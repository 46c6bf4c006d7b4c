"""Sums: what the applications ask for against what the cluster's groups can offer. Used by `service_rules.py`. Pure.

Everything counts at its largest: groups at `maxReplicas` where the autoscaler runs, pools at their stated size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from penstock.cluster.validate.demands import Demand, Group
from penstock.cluster.validate.findings import Problem, nearest, warning

BUILT_IN = ("CPU", "GPU", "memory", "object_store_memory")
_TOLERANCE = 1e-6


def check_capacity(demands: list[Demand], groups: list[Group]) -> Iterator[Problem]:
    """Whether everything finds a place; each demand by itself, then the sums."""
    for demand in demands:
        yield from _fits(demand, groups)
    names = sorted({name for demand in demands for name in demand.each} - {"memory", "object_store_memory"})
    for name in names:
        asked = sum(demand.count * demand.each.get(name, 0.0) for demand in demands)
        there = sum(group.most * group.each.get(name, 0.0) for group in groups)
        unknown = any(name not in group.each for group in groups) and name == "CPU"
        if asked > there + _TOLERANCE and not unknown:
            parts = " + ".join(
                f"{demand.count} {demand.what} x {demand.each[name]:g}" for demand in demands if demand.each.get(name)
            )
            largest = max(demands, key=lambda one: one.count * one.each.get(name, 0.0))
            if any(_room(largest, group) for group in groups):  # otherwise told already
                yield Problem(largest.path, f"{asked:g} {name} are asked for ({parts}); the groups offer {there:g}")


def _fits(demand: Demand, groups: list[Group]) -> Iterator[Problem]:
    """One of it must fit some pod, and so many must find pods."""
    for name, amount in demand.each.items():
        offers = {key for group in groups for key in group.each}
        if amount and name not in offers and name not in BUILT_IN and not name.startswith("node:"):
            yield Problem(demand.path, f"{demand.what} need {name!r}, which no group offers", nearest(name, offers))
            return
    hosts = [group for group in groups if _room(demand, group)]
    needs = ", ".join(f"{amount:g} {name}" for name, amount in demand.each.items() if amount)
    if demand.count and not hosts:
        yield Problem(demand.path, f"one of the {demand.what} needs {needs}{_where(demand)}; no group has such a pod")
    elif demand.per_node and (places := demand.per_node * sum(group.most for group in hosts)) < demand.count:
        reason = f"{demand.count} {demand.what} at {demand.per_node} per node; there is room for {places}"
        yield Problem(demand.path, reason)
    elif demand.count and (most := sum(group.most * _times(demand, group) for group in hosts)) < demand.count:
        yield Problem(demand.path, f"{demand.count} {demand.what} of {needs} each; the groups hold {most:g} of them")
    elif demand.together > 1 and (most := max(_times(demand, group) for group in hosts)) < demand.together:
        reason = f"the largest pod holds {most:g} of the {demand.together} ranks of one worker ({needs} each)"
        yield warning(demand.path, f"{reason}; they will talk over the network in every step")


def _room(demand: Demand, group: Group) -> bool:
    # Labels under ray.io/ are set by Ray itself; a selector may also hold an expression instead of a value.
    plain = {key: want for key, want in demand.labels.items() if not key.startswith("ray.io/") and want.isalnum()}
    labelled = all(group.labels.get(key) == want for key, want in plain.items())
    return group.most > 0 and labelled and _times(demand, group) >= 1


def _where(demand: Demand) -> str:
    return "".join(f" on a node labelled {key}={value}" for key, value in demand.labels.items())


def _times(demand: Demand, group: Group) -> float:
    """How many of it one pod holds. A pod that does not say its CPUs holds any number."""
    counts = [
        math.floor(group.each.get(name, 0.0) / amount + _TOLERANCE)
        for name, amount in demand.each.items()
        if amount and name not in ("memory", "object_store_memory") and not (name == "CPU" and "CPU" not in group.each)
    ]
    return min(counts, default=math.inf)
