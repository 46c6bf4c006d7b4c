"""From a session's unsent blocks to the next frame: which blocks, their bytes, and the offer that announces them.

Used by `sender.py`. Reads blocks through the pool's `BlockSource`; a pool that has to stage them is asked for the next
frame's blocks before the present frame's are waited for, so that both are under way at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers import fault_points
from penstock.workers.transfer.digests import state_digests, stride_of
from penstock.workers.transfer.endpoint import Endpoint
from penstock.workers.transfer.messages import MAX_OFFER_ENTRIES, OFFER_DTYPE, Offer
from penstock.workers.transfer.outgoing import OutgoingSession, Reading
from penstock.workers.transfer.port import BlockSource

# Blocks of a frame are read and digested before it leaves, and checked when all of it is there. With full digests that
# takes a while, so frames are small and one is checked while the next is made; else larger ones spare both sides work.
DIGESTED_FRAME_BYTES = 4 << 20
FRAME_BYTES = 16 << 20


class OfferMaker:
    """Frames of one pool's blocks, or of slices of them."""

    def __init__(self, endpoint: Endpoint, pool: BlockSource) -> None:
        self._endpoint = endpoint
        self._storage = pool
        self.block_bytes = pool.block_bytes
        self._reads_ahead = self._storage.frame_bytes is not None
        self._strides = {inline: stride_of(endpoint.settings, inline=inline) for inline in (True, False)}  # by `inline`
        if pool.copies_on_device:
            self._strides[False] = 0  # who maps a device's pool copies on the device, where no digest is taken
        self.blocks_per_frame = {inline: self._room(stride) for inline, stride in self._strides.items()}

    def _room(self, stride: int) -> int:
        limits = (
            DIGESTED_FRAME_BYTES if stride == 1 else FRAME_BYTES,
            self._endpoint.settings.max_frame_bytes,
            self._storage.frame_bytes,
        )
        room = min(limit for limit in limits if limit is not None) // self._storage.block_bytes
        return max(1, min(room, MAX_OFFER_ENTRIES))

    def next_reading(self, session: OutgoingSession, *, inline: bool, most_blocks: int | None = None) -> Reading | None:
        """Take the session's next blocks (`most_blocks` at most) and begin to read them. None: no room for that now."""
        room = self.blocks_per_frame[inline]
        room = room if most_blocks is None else min(room, most_blocks)
        current = session.reading or self._begin(session, room, inline=inline)
        session.reading = None
        ahead = self._reads_ahead and fault_points.plan is None  # a plan counts what really leaves
        if current is not None and session.unsent and ahead and inline:
            session.reading = self._begin(session, room, inline=inline)
        return current

    def _begin(self, session: OutgoingSession, room: int, *, inline: bool) -> Reading | None:
        taken, batch = session.choose(room, self._endpoint.worker_id)
        if not batch or not (inline or self._strides[inline]):
            return Reading(batch, None)
        host = self._storage.read([block for _, block in batch])
        if host is None:
            session.put_back(taken)
            return None
        return Reading(batch, host)

    def offer(self, session: OutgoingSession, reading: Reading, *, inline: bool) -> Offer:
        """The frame's message, with the digests that the settings ask for."""
        grant = session.grant
        entries: NDArray[np.void] = np.zeros(len(reading.batch), OFFER_DTYPE)
        fragments, blocks = zip(*reading.batch, strict=True)
        entries["fragment"] = fragments
        entries["source_block"] = blocks
        entries["source_generation"] = self._storage.generations[list(blocks)]
        entries["target_generation"] = [grant.generations[fragment] for fragment in fragments]
        if self._strides[inline] and reading.host is not None:
            state_digests(entries, reading.host.blocks, self._strides[inline], grant.session_id)
        return Offer(grant.session_id, grant.epoch, inline, entries)
