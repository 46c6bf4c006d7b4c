"""Buffers that stay where they are for a worker's whole life, allocated in one order that a restart can repeat.

Used by `step_inputs.py` and `graphs/`: a captured graph holds raw addresses, so what it reads and writes is allocated
once, in a fixed order, and every allocation is logged as (tag, bytes). The hash of that log is the layout id: two
processes with equal ids have the same buffers. Knows nothing of what the buffers hold.
Source: Foundry's deterministic allocation order, reduced to the log that proves it.

Invariants: an allocation that departs from the expected log raises before any memory is taken; nothing is ever freed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.workers.errors import IntegrityError


class LayoutError(IntegrityError):
    """The static buffers were not allocated as before; `tag` is the first one that differs."""

    def __init__(self, tag: str, message: str) -> None:
        super().__init__(message)
        self.tag = tag


@dataclass(frozen=True, slots=True)
class Allocation:
    """One entry of the log."""

    tag: str
    num_bytes: int


def layout_id(log: Sequence[Allocation]) -> str:
    """32 hex digits that two logs share exactly if they have the same tags and sizes in the same order."""
    digest = hashlib.sha256()
    for entry in log:
        digest.update(f"{len(entry.tag)}:{entry.tag}={entry.num_bytes};".encode())
    return digest.hexdigest()[:32]


def first_difference(expected: Sequence[Allocation], found: Sequence[Allocation]) -> str | None:
    """The first tag at which two logs part, taken from `found` where it has one there; None where they are equal."""
    for before, now in zip(expected, found, strict=False):
        if before != now:
            return now.tag
    if len(expected) == len(found):
        return None
    longer = found if len(found) > len(expected) else expected
    return longer[min(len(expected), len(found))].tag


class StaticMemory:
    """Allocates zeroed tensors on one device and writes the log; with `expected`, in that order only."""

    def __init__(self, device: torch.device, expected: Sequence[Allocation] | None = None) -> None:
        self.device = device
        self._expected = None if expected is None else tuple(expected)
        self._log: list[Allocation] = []

    @property
    def log(self) -> tuple[Allocation, ...]:
        """What was allocated so far, in order."""
        return tuple(self._log)

    @property
    def layout_id(self) -> str:
        """See the function of that name."""
        return layout_id(self._log)

    def on_device(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A zeroed tensor on the device. Raises LayoutError where the expected log has something else here."""
        self._record(tag, shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def on_host(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A zeroed host tensor, page-locked where the device is a GPU, so that copies from it can be asynchronous."""
        self._record(tag, shape, dtype)
        return torch.zeros(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def finish(self) -> str:
        """Everything is allocated; the layout id. Raises LayoutError where the expected log has more."""
        if self._expected is not None and len(self._log) < len(self._expected):
            tag = self._expected[len(self._log)].tag
            raise LayoutError(tag, f"static buffer {tag!r} was allocated before, and is missing now")
        return self.layout_id

    def _record(self, tag: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        entry = Allocation(tag, math.prod(shape) * dtype.itemsize)
        if self._expected is not None:
            place = len(self._log)
            known = self._expected[place] if place < len(self._expected) else None
            if entry != known:
                before = "nothing" if known is None else f"{known.tag!r} of {known.num_bytes} bytes"
                raise LayoutError(
                    tag, f"static buffer {place} is {tag!r} of {entry.num_bytes} bytes, and was {before} before"
                )
        self._log.append(entry)
