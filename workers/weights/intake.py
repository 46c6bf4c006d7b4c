"""Brings the bytes that a load asks for, in order: from a peer while one delivers, else from our own disk.

`arriving.py` reads through it. Several runs are asked for ahead of their answers. Whatever a peer does not deliver
(it died, stalls, drains, lies, or is slower than the disk) is asked of another or read here, run by run: a peer's end
costs time and never the start. A load without a disk waits for peers within its patience.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

from penstock.workers.errors import ModelError, PeerError
from penstock.workers.weights.peers import Peers, Source
from penstock.workers.weights.runs import Run
from penstock.workers.weights.stored import Scratch, WeightStore

log = logging.getLogger(__name__)

_AHEAD = 8  # runs asked for and not yet answered
_JUDGED_S = 2.0  # of waiting for a peer, after which its rate says something
_WAIT_S = 0.05


@dataclass(slots=True)
class LoadTally:
    """Where the bytes of a load came from."""

    peer_bytes: int = 0
    disk_bytes: int = 0
    sources: dict[str, int] = field(default_factory=dict)  # bytes by peer


class Intake:
    """Of one load. `disk` is read where no peer delivers; a peer slower than `least_bytes_per_s` is left."""

    def __init__(
        self,
        peers: Peers,
        disk: WeightStore | None,
        patience_s: float,
        least_bytes_per_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.tally = LoadTally()
        self._peers = peers
        self._disk = disk
        self._patience_s = patience_s
        self.least_bytes_per_s = least_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._scratch = Scratch()
        self._moved_at = clock()  # when something came last
        self._judged: Source | None = None
        self._waited_s = self._waited_bytes = 0.0

    def stream(self, wanted: Iterable[tuple[int, Run]]) -> Generator[memoryview, None, None]:
        """The bytes of each (file, run), valid until the next is asked for. Raises ModelError."""
        wishes = iter(wanted)
        pending: deque[tuple[int, Run]] = deque()
        asked = 0  # of `pending`, of the current source
        self._moved_at = self._clock()
        try:
            while True:
                while len(pending) < _AHEAD and (wish := next(wishes, None)) is not None:
                    pending.append(wish)
                if not pending:
                    return
                source = self._peers.current()
                data: memoryview | None
                if source is None:
                    data = self._own(*pending[0])
                else:
                    try:
                        for wish in list(pending)[asked:]:
                            source.ask(*wish)
                            asked += 1
                        data = self._answer(source, pending[0][1])
                        asked -= 1
                    except PeerError as error:
                        log.info("weights: leaving peer %s: %s", source.address, error)
                        self._peers.leave(error)
                        data, asked = None, 0
                if data is not None:
                    self._moved_at = self._clock()
                    pending.popleft()
                    yield data
        finally:
            if asked:  # the reader broke off: answers are under way that nobody will take
                self._peers.close()

    def close(self) -> None:
        """The load is over."""
        self._peers.close()

    def _answer(self, source: Source, run: Run) -> memoryview:
        """The next run of `source`. Raises PeerError, also for one that is too slow."""
        if source is not self._judged:
            self._judged, self._waited_s, self._waited_bytes = source, 0.0, 0.0
        began = self._clock()
        data = source.answer(run)
        self._waited_s += self._clock() - began
        self._waited_bytes += run.size
        if self._waited_s >= _JUDGED_S:
            rate = self._waited_bytes / self._waited_s
            self._waited_s = self._waited_bytes = 0.0
            if rate < self.least_bytes_per_s:
                raise PeerError(f"it gives {rate / 1e6:.0f} MB/s, which our own disk beats")
        self.tally.peer_bytes += run.size
        self.tally.sources[source.address] = self.tally.sources.get(source.address, 0) + run.size
        return data

    def _own(self, file: int, run: Run) -> memoryview | None:
        """From our own disk; None, after a while, where there is none. Raises ModelError."""
        if self._disk is not None:
            try:
                data = self._disk.read(file, run, self._scratch)
            except PeerError as error:
                raise ModelError(f"{error}, and no peer gives it: {self._peers.reasons}") from error
            if data is not None:
                self.tally.disk_bytes += run.size
                return data
        waited_s = self._clock() - self._moved_at
        if self._peers.hopeless or waited_s > self._patience_s:
            raise ModelError(
                f"no peer gave weights for {waited_s:.0f} s, and they are not on this host: {self._peers.reasons}"
            )
        self._sleep(_WAIT_S)
        return None
