"""What one start of a worker leaves for the next: bucket traffic, the number of KV blocks, tuned configurations.

Written and read by `runner.py` through one JSON file per model and device. It is a hint and nothing more: a record
whose key differs in any part, or that cannot be read, is ignored with one line of log. Source: Foundry's start-up
record, keyed by everything on which its content depends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock.workers.graphs.traffic import BucketFigures

logger = logging.getLogger(__name__)

_FORMAT = 1
_MAX_BYTES = 1 << 20
_MAX_BUCKETS = 4096


@dataclass(frozen=True, slots=True)
class RecordKey:
    """Everything that must be the same for a record to be of use."""

    model: str  # hash of weights, dtype and KV layout
    device: str
    driver: str
    libraries: tuple[tuple[str, str], ...]  # name, version
    layout_id: str  # of the static buffers
    utilization: float  # share of the device on which num_blocks was worked out
    limits: tuple[int, ...]  # of a step

    @property
    def file_name(self) -> str:
        """One file per model and device; the other parts are compared."""
        device = "".join(letter if letter.isalnum() else "-" for letter in self.device)
        return f"{self.model}-{device}.json"


@dataclass(frozen=True, slots=True, eq=False)
class StartRecord:
    """The content."""

    key: RecordKey
    num_blocks: int
    step_bytes: int  # what the largest step takes beside weights and KV
    traffic: Mapping[int, BucketFigures] = field(default_factory=dict)
    tuned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # kernel and key -> configuration


def write_record(folder: Path, record: StartRecord) -> bool:
    """Replace the record on disk in one step; False, said in the log, where that cannot be done."""
    text = json.dumps({"format": _FORMAT, **dataclasses.asdict(record)}, indent=1)
    path = folder / record.key.file_name
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        logger.warning("the start-up record %s cannot be written: %s", path, error)
        return False
    return True


def read_record(folder: Path, key: RecordKey) -> StartRecord | None:
    """The record under this very key, or None."""
    path = folder / key.file_name
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        raw = json.loads(path.read_text())
        stored = _key_of(raw["key"])
        if raw["format"] != _FORMAT:
            raise ValueError(f"format {raw['format']!r} is not {_FORMAT}")
        if stored != key:
            logger.info("the start-up record %s is stale: %s differs", path, first_stale_part(stored, key))
            return None
        blocks, step_bytes = _count(raw["num_blocks"]), _count(raw["step_bytes"])
        return StartRecord(key, blocks, step_bytes, _traffic(raw["traffic"]), _tuned(raw["tuned"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("the start-up record %s is ignored: %s", path, error)
        return None


def first_stale_part(stored: RecordKey, key: RecordKey) -> str | None:
    """The name of the first part in which two keys differ."""
    parts = (part.name for part in dataclasses.fields(RecordKey))
    return next((name for name in parts if getattr(stored, name) != getattr(key, name)), None)


def _key_of(raw: Mapping[str, Any]) -> RecordKey:
    parts = {part.name: raw[part.name] for part in dataclasses.fields(RecordKey)}
    parts["libraries"] = tuple((str(name), str(version)) for name, version in parts["libraries"])
    parts["limits"] = tuple(parts["limits"])
    return RecordKey(**parts)


def _traffic(raw: Mapping[str, Any]) -> dict[int, BucketFigures]:
    if len(raw) > _MAX_BUCKETS:
        raise ValueError(f"{len(raw)} buckets")
    return {_count(int(bucket)): _figures(each) for bucket, each in raw.items()}


def _figures(raw: Mapping[str, Any]) -> BucketFigures:
    return BucketFigures(_amount(raw["steps"]) or 0.0, _amount(raw["eager_s"]), _amount(raw["replay_s"]))


def _tuned(raw: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    return {str(name): {str(key): int(value) for key, value in each.items()} for name, each in raw.items()}


def _count(raw: object) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 0:
        raise ValueError(f"{raw!r} is no count")
    return raw


def _amount(raw: object) -> float | None:
    if raw is None:
        return None
    if not isinstance(raw, (int, float)) or isinstance(raw, bool) or not math.isfinite(raw) or raw < 0:
        raise ValueError(f"{raw!r} is no amount")
    return float(raw)
