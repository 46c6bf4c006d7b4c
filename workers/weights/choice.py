"""Whether a peer beats our own disk: the same few megabytes of the checkpoint, read from both and timed.

Used by `supply.py` where the settings leave the choice to it. A page cache that has the files counts as disk, as it
should. The places are drawn anew for each rank and each start: what one has read is in the page cache of the next, and
would speak for a disk that has nothing else there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random

from penstock.workers.weights.messages import ServedFile
from penstock.workers.weights.peers import Source
from penstock.workers.weights.runs import MAX_RUN_BYTES, Run
from penstock.workers.weights.stored import Scratch, WeightStore

ADVANTAGE = 1.2  # a peer must be so many times as fast, for all that can go wrong with it
_SAMPLES = 8  # of one run each
_AHEAD = 3
_LONGEST_S = 1.0  # of either measurement, as soon as it has one sample

Sample = tuple[int, Run]


def samples(files: Sequence[ServedFile], chance: Random) -> list[Sample]:
    """Runs at random places of files, of larger ones more often."""
    chosen = chance.choices(range(len(files)), [file.size for file in files], k=_SAMPLES)
    found = []
    for file in chosen:
        length = min(MAX_RUN_BYTES, files[file].size)
        found.append((file, Run(chance.randrange(files[file].size - length + 1), length)))
    return found


def disk_rate(store: WeightStore, wanted: Sequence[Sample], clock: Callable[[], float] = time.monotonic) -> float:
    """Bytes per second of our own files. Raises PeerError where they cannot be read."""
    scratch, began, done = Scratch(), clock(), 0
    for file, run in wanted:
        store.read(file, run, scratch)
        done += run.size
        if clock() - began > _LONGEST_S:
            break
    return done / max(1e-9, clock() - began)


def peer_rate(source: Source, wanted: Sequence[Sample], clock: Callable[[], float] = time.monotonic) -> float:
    """Bytes per second of a peer, asked ahead as a load asks. Raises PeerError."""
    began, done, asked = clock(), 0, 0
    for number, (_, run) in enumerate(wanted):
        late = clock() - began > _LONGEST_S
        if late and number == asked:
            break
        while not late and asked < min(len(wanted), number + _AHEAD):
            source.ask(*wanted[asked])
            asked += 1
        source.answer(run)
        done += run.size
    return done / max(1e-9, clock() - began)
