"""KV blocks that the pool may let go, kept in host memory and on disk, and brought back when a context asks for them.

Made by the assembly where `kv.host_bytes` is set. The engine's thread calls `offer` (blocks of the prefix cache became
idle; `spill.py` copies them out), and `find`, `fetch` and `land` for a context that waits to be admitted. The work is
done by threads: `kv-host` copies between the pool and host memory, `kv-write` and `kv-read` serve the disk. Knows
digests, blocks and bytes; neither sequences nor the prefix tree.

Invariants: no failure of a tier raises, it is a miss; a block is written into the pool only by `land`, only into blocks
whose holder waits for it, and only with bytes that passed their checksum. While a disk read that was given up has not
come back, nothing is looked for on the disk: one that hangs is waited for once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from penstock.workers.kv.block_pool import Blocks
from penstock.workers.kv.disk_tier import DiskTier
from penstock.workers.kv.host_tier import HostTier
from penstock.workers.kv.spill import COPY_BYTES, Spill
from penstock.workers.kv.tier_counts import TierCounts
from penstock.workers.kv.tier_feed import TierChanges
from penstock.workers.kv.work_thread import WorkThread
from penstock.workers.protocol import DIGEST_BYTES
from penstock.workers.totals import TierTotals
from penstock.workers.transfer.port import BlockMover

MOST_LOADS = 16  # under way; more contexts are computed
_LAST_JOB_S = 2.0


class Fetch:
    """The next blocks of a chain, in order, on their way into memory."""

    def __init__(self, digests: tuple[bytes, ...]) -> None:
        self.digests = digests
        self.given_up = False
        self.from_disk: Future[dict[bytes, bytes]] = Future()  # those that host memory does not hold

    @property
    def done(self) -> bool:
        """There is nothing more to wait for; it may have failed."""
        return self.from_disk.done()


class KVTiers:
    """The tiers below one pool."""

    def __init__(
        self, pool: BlockMover, host: HostTier, disk: DiskTier | None, changes: TierChanges, wake: Callable[[], None]
    ) -> None:
        """`pool`: through buffers that no other thread uses. `wake` is called from another thread after every load."""
        self._pool = pool
        self._host = host
        self._disk = disk
        self._changes = changes
        self._wake = wake
        self._host_counts, self._disk_counts = TierCounts(), TierCounts()
        self._slow = 0
        self._copies = WorkThread("kv-host", MOST_LOADS + 2)
        self._reads = WorkThread("kv-read", MOST_LOADS)
        self._spill = Spill(pool, host, disk, self._copies, (self._host_counts, self._disk_counts), changes)
        self._overdue: Fetch | None = None  # from a disk that had not answered when it was given up

    # --- any thread -----------------------------------------------------------------------------------------------

    def holds(self, digest: bytes) -> bool:
        """Some tier below the pool does."""
        return digest in self._host or (self._disk is not None and digest in self._disk)

    def totals(self) -> TierTotals:
        """What was done since the start."""
        host, disk = self._host_counts, self._disk_counts
        if self._disk is not None:
            disk.errors, disk.evictions, disk.stored = self._disk.errors, self._disk.evictions, self._disk.written
        return TierTotals(host.figures(len(self._host)), disk.figures(len(self._disk or ())), self._slow)

    def stop(self) -> None:
        """Copy, read and write nothing more."""
        self._reads.stop(_LAST_JOB_S)
        self._copies.stop(_LAST_JOB_S)
        self._spill.stop()
        if self._disk is not None:
            self._disk.close()

    # --- the engine's thread --------------------------------------------------------------------------------------

    def offer(self, digests: bytes, blocks: Blocks) -> None:
        """These blocks of the prefix cache are idle: copy them out, if there is time before they are evicted."""
        self._spill.offer(digests, blocks)

    def find(self, digests: bytes, first: int) -> int:
        """How many blocks of the chain, from its block `first` on, are held below the pool."""
        disk = None if self._overdue is not None and not self._overdue.done else self._disk
        in_host = on_disk = 0
        for at in range(first * DIGEST_BYTES, len(digests), DIGEST_BYTES):
            digest = digests[at : at + DIGEST_BYTES]
            if digest in self._host:
                in_host += 1
            elif disk is not None and digest in disk:
                on_disk += 1
            else:
                break
        asked = len(digests) // DIGEST_BYTES - first
        self._host_counts.misses += asked - in_host
        if self._disk is not None:
            self._disk_counts.misses += asked - in_host - on_disk
        return in_host + on_disk

    def fetch(self, digests: bytes, first: int, count: int) -> Fetch | None:
        """Have blocks [first, first + count) of the chain in memory, as far as they are still held. None: too busy."""
        begin, end = first * DIGEST_BYTES, (first + count) * DIGEST_BYTES
        fetch = Fetch(tuple(digests[at : at + DIGEST_BYTES] for at in range(begin, end, DIGEST_BYTES)))
        stored = [digest for digest in fetch.digests if digest not in self._host]
        disk = self._disk
        if disk is None or not stored:
            fetch.from_disk.set_result({})
            return fetch
        reading = self._reads.submit(lambda: _read(disk, fetch, stored))
        if reading is None:
            return None
        fetch.from_disk = reading
        reading.add_done_callback(lambda _: self._wake())
        return fetch

    def give_up(self, fetch: Fetch, *, slow: bool) -> None:
        """Nobody waits for it any more; `slow`: because computing would have been quicker."""
        self._slow += slow
        fetch.given_up = True
        if not fetch.from_disk.cancel() and slow:
            self._overdue = fetch

    def land(self, fetch: Fetch, skip: int, blocks: Blocks) -> Future[int] | None:
        """Write what was fetched, from the block at `skip` on, into these of the pool; how many came. None: too busy.

        Until it is done nobody else may have the blocks.
        """
        landing = self._copies.submit(lambda: self._land(fetch, skip, blocks))
        if landing is not None:
            landing.add_done_callback(lambda _: self._wake())
        return landing

    # --- kv-host --------------------------------------------------------------------------------------------------

    def _land(self, fetch: Fetch, skip: int, blocks: Blocks) -> int:
        most = max(1, (self._pool.frame_bytes or COPY_BYTES) // self._pool.block_bytes)
        wanted = fetch.digests[skip : skip + len(blocks)]
        from_disk = fetch.from_disk.result(0) if fetch.from_disk.exception(0) is None else {}
        landed = 0
        for at in range(0, len(wanted), most):
            part = wanted[at : at + most]
            room = self._pool.land(blocks[at : at + len(part)].tolist())
            if room is None:
                break
            try:
                came = self._fill(part, from_disk, room.blocks)
                room.commit(range(came))
            finally:
                room.release()
            landed += came
            if came < len(part):
                break
        return landed

    def _fill(self, digests: tuple[bytes, ...], from_disk: dict[bytes, bytes], views: list[memoryview]) -> int:
        """Copy these blocks to where they are wanted, up to the first that is held no more."""
        for place, (digest, view) in enumerate(zip(digests, views, strict=True)):
            data: bytes | memoryview | None = from_disk.get(digest)
            counts = self._host_counts if data is None else self._disk_counts
            if data is None:
                data = self._from_host(digest)
            if data is None:
                return place
            view[:] = data
            counts.hits += 1
            counts.loaded += len(view)
        return len(digests)

    def _from_host(self, digest: bytes) -> memoryview | None:
        known = digest in self._host
        found = self._host.read(digest)
        if known and found is None:
            self._host_counts.errors += 1
            self._changes.note(digest)
        return found


def _read(disk: DiskTier, fetch: Fetch, stored: list[bytes]) -> dict[bytes, bytes]:
    """On `kv-read`: up to the first block that the disk has not, or until nobody waits any more."""
    found: dict[bytes, bytes] = {}
    for digest in stored:
        data = None if fetch.given_up else disk.read(digest)
        if data is None:
            break
        found[digest] = data
    return found
