"""Sequences that are computed with an adapter: they wait for it to be loaded, then for a place, then have one.

Part of the scheduler. Places are few: each is room on the device for one adapter, and any number of rows share it. A
row holds its adapter's place until it leaves the table, so that nothing is exchanged under a step. Who waits for a
place lets nobody with an adapter go before, or adapters that are always in use would keep all others out for ever;
sequences of the model alone pass by. Knows no files and no tensors: what fills a place is the business of who gives the
adapters (`workers/lora/store.py`).

Invariants: an adapter has at most one place; a place with rows keeps its adapter; of the others the one that was used
last stays longest.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future
from typing import Protocol

import numpy as np

from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import IntegrityError
from penstock.workers.scheduler.plan import I32

_NONE: I32 = np.zeros(0, np.int32)


class LoadedAdapter(Protocol):
    """One adapter in host memory."""

    @property
    def revision(self) -> bytes:
        """Of its content."""
        ...


class Adapters(Protocol):
    """Who gives adapters."""

    @property
    def num_places(self) -> int:
        """How many a step can be computed with."""
        ...

    def begin(self, ref: AdapterRef) -> Future[LoadedAdapter]:
        """The adapter, to come. Raises nothing; the future may."""
        ...

    def put(self, place: int, adapter: LoadedAdapter) -> None:
        """Fill the place, which no step needs that is planned later. Steps under way still find what was there."""
        ...


class AdapterRows:
    """Which row of the sequence table has which place."""

    def __init__(self, max_seqs: int) -> None:
        self.places: AdapterPlaces | None = None  # None: sequences have no adapters
        self._place_of: I32 = np.full(max_seqs, -1, np.int32)
        self._used = 0  # rows with an adapter

    def has_room(self, adapter: LoadedAdapter | None) -> bool:
        """Whether a sequence with this adapter can have a row."""
        return adapter is None or (self.places is not None and self.places.has_room(adapter))

    def fill(self, row: int, adapter: LoadedAdapter | None) -> None:
        """A sequence has got this row; there is a place for its adapter. Raises IntegrityError otherwise."""
        if adapter is None:
            return
        place = None if self.places is None else self.places.take(adapter)
        if place is None:
            raise IntegrityError("a sequence was admitted without a place for its adapter")
        self._place_of[row] = place
        self._used += 1

    def empty(self, row: int) -> None:
        """The row's sequence has left it."""
        place = int(self._place_of[row])
        if place >= 0 and self.places is not None:
            self.places.leave(place)
            self._place_of[row] = -1
            self._used -= 1

    def of(self, rows: np.ndarray[tuple[int, ...], np.dtype[np.intp]]) -> I32:
        """The places of these rows, -1 for none; empty where no row has one."""
        return self._place_of[rows] if self._used else _NONE

    def check(self) -> None:
        """Raises IntegrityError unless every place is held by as many rows as have it."""
        held = np.bincount(self._place_of[self._place_of >= 0]).tolist()
        if self._used != sum(held):
            raise IntegrityError(f"{sum(held)} rows have an adapter, {self._used} were counted")
        if self.places is not None and self.places.holders != {p: n for p, n in enumerate(held) if n}:
            raise IntegrityError(f"places of adapters are held by {self.places.holders}, rows have {held}")


class AdapterPlaces:
    """The places of one worker."""

    def __init__(self, adapters: Adapters) -> None:
        self._adapters = adapters
        self._empty = list(range(adapters.num_places - 1, -1, -1))
        self._places: dict[bytes, int] = {}  # revision -> place
        self._revisions: dict[int, bytes] = {}
        self._holders: dict[int, int] = {}  # rows of each place that has any
        self._idle: OrderedDict[int, None] = OrderedDict()  # filled places without rows, the one left longest ago first

    @property
    def holders(self) -> dict[int, int]:
        """Rows of each place that has any."""
        return self._holders

    def has_room(self, adapter: LoadedAdapter) -> bool:
        """Whether `take` would find a place."""
        return bool(adapter.revision in self._places or self._empty or self._idle)

    def take(self, adapter: LoadedAdapter) -> int | None:
        """One more row is computed with this adapter: its place, filled; None where all are in use."""
        place = self._places.get(adapter.revision)
        if place is None:
            place = self._vacant()
            if place is None:
                return None
            self._adapters.put(place, adapter)
            self._places[adapter.revision], self._revisions[place] = place, adapter.revision
        self._idle.pop(place, None)
        self._holders[place] = self._holders.get(place, 0) + 1
        return place

    def leave(self, place: int) -> None:
        """One row less."""
        left = self._holders[place] - 1
        if left:
            self._holders[place] = left
        else:
            del self._holders[place]
            self._idle[place] = None

    def _vacant(self) -> int | None:
        if self._empty:
            return self._empty.pop()
        if not self._idle:
            return None
        place, _ = self._idle.popitem(last=False)
        del self._places[self._revisions.pop(place)]
        return place
