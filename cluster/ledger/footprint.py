"""What this process takes of its host: children, threads, descriptors, shared memory, resident memory. Linux only.

Taken before and after something that must leave nothing behind; `laws.footprint_back` compares.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Names and numbers, so that what is new can be told."""

    processes: frozenset[str]  # "pid name"
    threads: frozenset[str]
    descriptors: frozenset[str]
    shared_memory: frozenset[str]
    resident: int  # bytes

    @staticmethod
    def take() -> Footprint:
        """As it is now."""
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
        shared = frozenset(path.name for path in _SHARED_MEMORY.iterdir()) if _SHARED_MEMORY.is_dir() else frozenset()
        threads = frozenset(f"{thread.ident} {thread.name}" for thread in threading.enumerate())
        return Footprint(frozenset(_descendants()), threads, frozenset(_descriptors()), shared, resident)

    def beside(self, other: Footprint) -> Iterator[tuple[str, frozenset[str], frozenset[str]]]:
        """(what, here, there) for all that has names."""
        for name in ("processes", "threads", "descriptors", "shared_memory"):
            yield name, getattr(self, name), getattr(other, name)


def _descendants() -> Iterator[str]:
    """Children of this process and theirs; who has ended and was not waited for counts."""
    found = {os.getpid()}
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text()
                name, _, rest = stat[stat.index("(") + 1 :].rpartition(")")
                parents[int(entry.name)] = int(rest.split()[1]), name
    grown = True
    while grown:
        grown = False
        for pid, (parent, name) in parents.items():
            if parent in found and pid not in found:
                found.add(pid)
                grown = True
                yield f"{pid} {name}"


def _descriptors() -> Iterator[str]:
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}"
