"""Which configuration a kernel is launched with: the table of this GPU, or the heuristic default of the caller.

Called by the kernels' launchers with the shape at hand. A table `kernels/tune/<gpu>.json` is written by the offline
tuner; nothing is ever tuned while serving, because that would change speed from run to run and cannot happen inside a
captured graph. Knows no kernel by name. The lookup is total: an unknown GPU, kernel or shape gets the default, and
the log says so once (after Zheng et al. 2020, "Ansor", section 3, reduced to a table of winners).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

TABLES = Path(__file__).parent.parent / "tune"
PLAIN_DEFAULT = {"num_warps": 4, "num_stages": 3}
# A tuned shape further away than this in any one number says nothing about the shape at hand.
FURTHEST_OCTAVES = 3.0
# Shared memory there holds a quarter of what an H100's does, and one stage is kept in registers.
MOST_STAGES_ON_AMD = 2

Key = tuple[tuple[str, int], ...]
_TRIED: ContextVar[Trial | None] = ContextVar("tried", default=None)


@dataclass(frozen=True, slots=True)
class Entry:
    """The winner at one shape. `fraction` is of the speed-of-light bound, None for a default that nobody measured."""

    key: Mapping[str, int]
    config: Mapping[str, int]
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class KernelTable:
    """The entries of one kernel; numbers named in `match` must be equal, the others near."""

    entries: tuple[Entry, ...]
    match: frozenset[str] = frozenset()


def config_for(kernel: str, key: Mapping[str, int], default: Mapping[str, int] | None = None) -> dict[str, int]:
    """The configuration of `kernel` at the shape `key` on the current GPU; total.

    Numbers that the table does not set are those of `default`, the caller's heuristic for this shape. On AMD
    `num_stages` is at most MOST_STAGES_ON_AMD.
    """
    base = tuple(sorted((PLAIN_DEFAULT if default is None else default).items()))
    tried = _TRIED.get()
    if tried is not None and tried.kernel == kernel:
        tried.asked.append((dict(key), dict(base)))
        return {**dict(base), **tried.config}
    config = dict(_config(current_gpu(), kernel, tuple(sorted(key.items())), base))
    if torch.version.hip is not None and "num_stages" in config:
        config["num_stages"] = min(config["num_stages"], MOST_STAGES_ON_AMD)
    return config


@dataclass(frozen=True, slots=True)
class Trial:
    """A configuration under trial, and the (key, default) pairs that launches asked for meanwhile."""

    kernel: str
    config: Mapping[str, int]
    asked: list[tuple[dict[str, int], dict[str, int]]]


@contextlib.contextmanager
def trying(kernel: str, config: Mapping[str, int]) -> Iterator[Trial]:
    """Lay `config` over the defaults of `kernel` meanwhile, in this thread: how the tuner measures candidates."""
    trial = Trial(kernel, config, [])
    token = _TRIED.set(trial)
    try:
        yield trial
    finally:
        _TRIED.reset(token)


def current_gpu() -> str | None:
    """The lower-case name of the current CUDA or ROCm device; None without one, as under the interpreter."""
    if not torch.cuda.is_available():
        return None
    return _device_name(torch.cuda.current_device())


@functools.lru_cache(maxsize=64)
def _device_name(device: int) -> str:
    return torch.cuda.get_device_name(device).lower()


@functools.lru_cache(maxsize=4096)
def _config(gpu: str | None, kernel: str, key: Key, base: Key) -> Key:
    if gpu is None:
        return base
    table = load_table(gpu)
    entry = nearest(table[kernel], dict(key)) if kernel in table else None
    _say_once(gpu, kernel, tuple((name, bucket(value)) for name, value in key), _told(entry))
    return tuple(sorted({**dict(base), **(entry.config if entry else {})}.items()))


def _told(entry: Entry | None) -> str | None:
    if entry is None:
        return None
    measured = "an untuned default" if entry.fraction is None else f"{entry.fraction:.2f} of the bound"
    return f"{dict(entry.key)} ({measured})"


@functools.lru_cache(maxsize=4096)
def _say_once(gpu: str, kernel: str, buckets: Key, entry: str | None) -> None:
    """Log the choice, the first time that a bucket asks."""
    if entry is not None:
        logger.info("%s on %s: configuration of %s", kernel, gpu, entry)
    else:
        shape = {name: _middle(number) for name, number in buckets}
        logger.warning("%s on %s: no tuned configuration near %s; using the default", kernel, gpu, shape)


def bucket(value: int) -> int:
    """Half octaves: shapes within a quarter octave of one another may share a bucket; monotone in `value`."""
    return math.floor(2 * math.log2(value) + 0.5) if value > 0 else -1


def _middle(number: int) -> int:
    return round(2 ** (number / 2)) if number >= 0 else 0


def nearest(table: KernelTable, key: Mapping[str, int]) -> Entry | None:
    """The entry of the same bucket, else the nearest in log space, else None; the first of equals.

    Entries that name other numbers than `key`, that differ in a number of `match`, or that lie more than
    FURTHEST_OCTAVES away in one number do not count; those that were never measured count in their own bucket only.
    """
    best, least = None, math.inf
    for entry in table.entries:
        if entry.key.keys() != key.keys() or any(entry.key[name] != key[name] for name in table.match if name in key):
            continue
        octaves = [abs(_log(entry.key[name]) - _log(value)) for name, value in key.items()]
        same = all(bucket(entry.key[name]) == bucket(value) for name, value in key.items())
        if entry.fraction is None and not same:
            continue  # a default is no evidence about other shapes
        # Any entry of the same bucket is nearer than all of other buckets.
        distance = sum(octaves) - (1e6 if same else 0.0)
        if max(octaves, default=0.0) <= FURTHEST_OCTAVES and distance < least:
            best, least = entry, distance
    return best


def _log(value: int) -> float:
    return math.log2(value) if value > 0 else -1.0


@functools.lru_cache(maxsize=16)
def load_table(gpu: str) -> Mapping[str, KernelTable]:
    """Kernel name -> table, of the file whose name is one of the words of `gpu`; empty where there is none.

    A file that cannot be read counts as none, with a warning: serving goes on with the defaults.
    """
    path = table_path(gpu)
    if path is None:
        logger.warning("no table of tuned kernels for %s; using defaults", gpu)
        return {}
    try:
        return parse_table(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        logger.warning("%s is not a table of tuned kernels (%s); using defaults", path, problem)
        return {}


def table_path(gpu: str) -> Path | None:
    """The table that serves a device of this name: "nvidia h100 80gb hbm3" is served by h100.json."""
    words = re.split(r"[^a-z0-9]+", gpu.lower())
    return next((path for path in sorted(TABLES.glob("*.json")) if path.stem in words), None)


def parse_table(document: Mapping[str, object]) -> Mapping[str, KernelTable]:
    """Raises ValueError, TypeError, KeyError or AttributeError where the document is not a table."""
    kernels = document["kernels"]
    if not isinstance(kernels, dict):
        raise TypeError("kernels is not an object")
    return {name: _parse_kernel(section) for name, section in kernels.items()}


def _parse_kernel(section: Mapping[str, object]) -> KernelTable:
    entries, match = section["entries"], section.get("match", [])
    if not isinstance(entries, list) or not isinstance(match, list):
        raise TypeError("entries and match must be lists")
    return KernelTable(
        tuple(Entry(_numbers(entry["key"]), _numbers(entry["config"]), entry.get("fraction")) for entry in entries),
        frozenset(str(name) for name in match),
    )


def _numbers(section: Mapping[str, object]) -> dict[str, int]:
    if not all(isinstance(value, int) for value in section.values()):
        raise TypeError(f"not whole numbers: {section}")
    return {name: int(str(value)) for name, value in section.items()}
