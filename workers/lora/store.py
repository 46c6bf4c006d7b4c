"""Loads the adapters of one worker on a thread of its own, and keeps the last ones in host memory.

Made by `assembly.py`; the scheduler asks it for an adapter when a request comes and lets the request wait in the queue
until it is there, so that no step ever waits for a file. Requests that wait or run hold what they were given: it serves
them to their end, whatever becomes of the files or of what is kept here. Knows no requests and no scheduler.

Invariants: `begin` never blocks; beside what stands in a place or what requests hold, at most `host_bytes` are kept;
what is given has exactly the content that was asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, cast

from penstock.workers import fault_points
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.errors import AdapterError
from penstock.workers.fault_points import Point
from penstock.workers.lora.adapter_files import read_adapter
from penstock.workers.lora.projections import Place, Size
from penstock.workers.lora.weights import HostAdapter, host_adapter
from penstock.workers.scheduler.adapters import LoadedAdapter
from penstock.workers.settings import AdapterSettings
from penstock.workers.totals import AdapterTotals


class Bank(Protocol):
    """Where adapters stand that steps are computed with (`bank.AdapterBank`, or that of a group's ranks)."""

    @property
    def num_places(self) -> int: ...

    def put(self, place: int, adapter: HostAdapter) -> None:
        """Fill the place, in order with steps."""
        ...


class AdapterStore:
    """See `scheduler.adapters.Adapters`. `totals` may be asked on any thread."""

    def __init__(
        self,
        settings: AdapterSettings,
        places: Mapping[Place, Size],
        bank: Bank,
        wake: Callable[[], None],
        name: str = "",
    ) -> None:
        """`places`: what adapters of the model may change. `wake` is called from another thread after every answer."""
        self._settings = settings
        self._places = places
        self._bank = bank
        self._wake = wake
        self._name = name
        self._kept: OrderedDict[bytes, HostAdapter] = OrderedDict()
        self._kept_bytes = 0
        self._standing: dict[int, HostAdapter] = {}  # in each place; written on the engine's thread
        self._thread = ThreadPoolExecutor(1, "adapters")
        self._loaded = self._found = self._evicted = self._failed = self._put = 0

    @property
    def num_places(self) -> int:
        """See `Adapters`."""
        return self._bank.num_places

    def begin(self, ref: AdapterRef) -> Future[LoadedAdapter]:
        """The adapter, to come; the future raises AdapterError where it cannot be had."""
        future: Future[LoadedAdapter] = self._thread.submit(self._adapter, ref)
        future.add_done_callback(lambda _: self._wake())
        return future

    def put(self, place: int, adapter: LoadedAdapter) -> None:
        """See `Adapters`."""
        self._put += 1
        self._standing[place] = found = cast(HostAdapter, adapter)
        self._bank.put(place, found)

    def totals(self) -> AdapterTotals:
        """What was done since the start."""
        return AdapterTotals(self._loaded, self._found, self._evicted, self._failed, self._put)

    def stop(self) -> None:
        """Load nothing more. What is being loaded is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _adapter(self, ref: AdapterRef) -> HostAdapter:
        found = self._kept.get(ref.revision)
        if found is not None:
            self._kept.move_to_end(ref.revision)
        else:
            standing = tuple(self._standing.values())
            found = next((each for each in standing if each.revision == ref.revision), None)
        if found is not None:
            self._found += 1
            return found
        try:
            loaded = self._load(ref)
        except (AdapterError, OSError, MemoryError) as error:
            self._failed += 1
            raise AdapterError(f"adapter {ref.name}: {error}") from error
        self._loaded += 1
        self._kept[ref.revision] = loaded
        self._kept_bytes += loaded.num_bytes
        while self._kept_bytes > self._settings.host_bytes:
            _, gone = self._kept.popitem(last=False)
            self._kept_bytes -= gone.num_bytes
            self._evicted += 1
        return loaded

    def _load(self, ref: AdapterRef) -> HostAdapter:
        if fault_points.plan is not None:
            fault_points.plan.reach(Point.ADAPTER_READ, self._name)
        files = read_adapter(Path(self._settings.directory), ref.folder, self._places, self._settings.max_rank)
        if files.revision != ref.revision:
            raise AdapterError(f"{ref.folder}: its files are not those that the request is for; they were exchanged")
        return host_adapter(files)
