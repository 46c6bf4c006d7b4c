"""Rules for what a pod has to hold for Penstock's workers: blocks of KV in its memory, the accelerator they ask for.

Used by `service_rules.py`. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.application_rules import application_config, is_ours, stated_of
from penstock.cluster.validate.demands import Group
from penstock.cluster.validate.findings import Path, Problem
from penstock.cluster.validate.loose import entries


def check_memory(serve_config: Any, serve_place: Path, groups: list[Group]) -> Iterator[Problem]:
    """`groups`: the head and the worker groups."""
    workers = [group for group in groups if not group.is_head and group.most]
    for index, application in entries(serve_config, "applications"):
        if not is_ours(application):
            continue
        args = (*serve_place, "applications", index, "args")
        places, config = stated_of(application, args).places, application_config(application)
        place = places.get("kv.memory_bytes", args)
        each, count = config.kv.memory_bytes, config.pools.ranks  # every rank has a pool of its own
        who = "worker" if count == config.pools.total else "rank"
        known = [group for group in workers if group.memory]
        in_pod = config.runner.device == "cpu" and not config.kv.num_blocks
        if known and len(known) == len(workers) and in_pod:
            largest, together = max(one.memory for one in known), sum(one.most * one.memory for one in known)
            if each > largest:
                yield Problem(place, f"{each} bytes of KV for one {who}; the largest pod's memory is {largest:.0f}")
            elif each * count > together:
                reason = f"{count} {who}s of {each} bytes of KV each; the groups' memory is {together:.0f} in all"
                yield Problem(place, reason)
        wanted = config.ray.worker_accelerator_type
        if wanted and not any(group.each.get("GPU") for group in groups):
            here = places.get("ray.worker_accelerator_type", args)
            yield Problem(here, f"workers ask for a {wanted}; no group has a pod with an accelerator")
