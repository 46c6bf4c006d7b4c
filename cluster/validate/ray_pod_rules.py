"""Rules for the pods of a Ray cluster: shared memory, resources that Ray reads, the way down. Pure.

`cluster_rules.py` calls it for the head and every worker group, after `pod_rules.check_pod`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from penstock.cluster.validate.findings import Path, Problem, warning
from penstock.cluster.validate.loose import at, entries, mapping, text, whole
from penstock.cluster.validate.quantities import quantity

DEFAULT_GRACE_S = 30
SHARED_MEMORY = "/dev/shm"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SLEEP = re.compile(r"\bsleep\s+([0-9]+)([smhd]?)\b")


def check_ray_pod(template: Any, path: Path, drain_s: float | None, tensor_parallel: int = 1) -> Iterator[Problem]:
    """`drain_s`: how long Penstock lets running requests end; None where it does not run in this cluster."""
    spec, place = mapping(template, "spec"), (*path, "spec")
    container = mapping(spec, "containers", 0)
    here = (*place, "containers", 0)
    limits = mapping(container, "resources", "limits")
    for name in ("cpu", "memory"):
        if name not in limits and name not in mapping(container, "resources", "requests"):
            reason = f"Ray reads a pod's {name} from here; without it, it takes the whole node's for its own"
            yield warning((*here, "resources", "limits", name), reason)
    yield from _shared_memory(spec, place, quantity(limits.get("memory")), tensor_parallel)
    if drain_s is not None:
        yield from _grace(spec, place, drain_s)


def _shared_memory(spec: dict[str, Any], path: Path, memory: float | None, tensor_parallel: int) -> Iterator[Problem]:
    mounts = entries(spec, "containers", 0, "volumeMounts")
    mount = next((one for _, one in mounts if text(one, "mountPath") == SHARED_MEMORY), None)
    if mount is None:
        place = (*path, "containers", 0, "volumeMounts")
        if tensor_parallel > 1:
            yield Problem(place, f"{SHARED_MEMORY} is not mounted; the ranks of one worker need it")
        else:
            yield warning(place, f"{SHARED_MEMORY} is not mounted; Ray's object store then falls back to the disk")
        return
    for number, volume in entries(spec, "volumes"):
        if text(volume, "name") != text(mount, "name"):
            continue
        place = (*path, "volumes", number)
        if "emptyDir" in volume and text(volume, "emptyDir", "medium") != "Memory":
            yield Problem((*place, "emptyDir"), f"{SHARED_MEMORY} must lie in memory: emptyDir: {{medium: Memory}}")
        size = quantity(at(volume, "emptyDir", "sizeLimit"))
        if size is not None and memory is not None and size > memory:
            reason = f"{at(volume, 'emptyDir', 'sizeLimit')} counts against the container's memory limit, which is less"
            yield Problem((*place, "emptyDir", "sizeLimit"), reason)


def check_shutdown(template: Any, path: Path, shutdown_s: float) -> Iterator[Problem]:
    """`shutdown_s`: what Serve is told to wait for its replicas; the pod must be there as long."""
    spec = mapping(template, "spec")
    grace, before = _grace_s(spec), _before_s(spec)
    if shutdown_s and grace < before + shutdown_s:
        reason = (
            f"{grace} s is less than preStop {before} s + graceful_shutdown_timeout_s {shutdown_s:g} s; the pod is "
            "killed before Serve has stopped its replicas"
        )
        yield Problem((*path, "spec", "terminationGracePeriodSeconds"), reason)


def _grace(spec: dict[str, Any], path: Path, drain_s: float) -> Iterator[Problem]:
    grace, before = _grace_s(spec), _before_s(spec)
    if grace <= before + drain_s:
        default = "" if "terminationGracePeriodSeconds" in spec else " (the default)"
        reason = (
            f"{grace} s{default} is not more than preStop {before} s + drain {drain_s:g} s (health.drain_s); running "
            "requests would be cut off"
        )
        yield Problem((*path, "terminationGracePeriodSeconds"), reason)


def _grace_s(spec: dict[str, Any]) -> int:
    stated = whole(spec, "terminationGracePeriodSeconds")
    return DEFAULT_GRACE_S if stated is None else stated


def _before_s(spec: dict[str, Any]) -> int:
    """How long the hook waits before the container is told to stop."""
    hook = mapping(spec, "containers", 0, "lifecycle", "preStop")
    words = at(hook, "exec", "command")
    found = _SLEEP.search(" ".join(str(part) for part in words if part is not None) if isinstance(words, list) else "")
    return int(found[1]) * _UNITS[found[2]] if found else whole(hook, "sleep", "seconds") or 0
