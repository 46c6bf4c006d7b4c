"""What all ranks of a group must have been told alike, and where two ranks were not.

Both sides of the meeting (`meeting.py`) use it. Pure; knows no connections.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from penstock.workers.settings import WorkerSettings

_PER_RANK = {
    "": ("host", "port", "parent_pid", "cluster_key", "logs", "tracing"),
    "group": ("rank", "leader", "host"),
    "runner": ("cpus", "device", "record_dir"),
    "transfer": ("host",),
}


def shared_settings(settings: WorkerSettings) -> str:
    """What all ranks of a group must have been told alike, as JSON with sorted keys."""
    told: dict[str, Any] = dataclasses.asdict(settings)
    for section, names in _PER_RANK.items():
        for name in names:
            del (told[section] if section else told)[name]
    return json.dumps(told, sort_keys=True)


def differences(ours: str, theirs: str) -> list[str]:
    """Dotted keys with both values, at most a few."""
    return _differing(json.loads(ours), _parsed(theirs))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _differing(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """The same of parsed ones below `path`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = sorted(ours.keys() | theirs.keys())
        found = [line for key in keys for line in _differing(ours.get(key), theirs.get(key), f"{path}.{key}")]
        return found[:4]
    return [] if ours == theirs else [f"{path.lstrip('.') or 'settings'} is {theirs!r} instead of {ours!r}"]
