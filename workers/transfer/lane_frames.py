"""Frames of blocks over lanes: NCCL as a transport. What a sender and a receiver have for each peer, and who makes it.

Made by the engine where `transfer.transport` is nccl, used by `sender.py` and `receiver.py` on the transfer thread.
The connection between the two carries the same messages as ever, and every offer stands for one frame on the lane: the
blocks, packed on the sender's device, received into memory of the receiver's, and put into its pool only once session,
epoch, generation and digest have been looked at, so only the owner writes its pool, however late a frame may come.
Offers of a session that has ended still take their frame from the lane, since the peer has sent it.

Invariant: an offer is queued on the connection exactly when its frame is given to the lane, in the same order.
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._distributed_c10d import Store

from penstock.workers import fault_points
from penstock.workers.errors import WireError
from penstock.workers.fault_points import Point, Verdict
from penstock.workers.kv.sliced_pool import HeadSlice
from penstock.workers.parallel.process_group import serve_store
from penstock.workers.settings import TransferSettings
from penstock.workers.transfer.landing import BlockLanding
from penstock.workers.transfer.lane import Lane, Post
from penstock.workers.transfer.lane_digest import WEIGHTED, WeightedDigest
from penstock.workers.transfer.messages import MAX_OFFER_ENTRIES, OFFER_DTYPE, Offer
from penstock.workers.transfer.outgoing import OutgoingSession
from penstock.workers.transfer.pair_group import ACCEPTING, OPENING, open_pair, require_nccl

FRAME_BYTES = 16 << 20
MOST_IN_FLIGHT = 3  # frames of one lane: one on its way, one packed behind it, one being announced
_MOST_ANNOUNCED = 4 * MOST_IN_FLIGHT
_LEAVE_S = 1.0  # for lanes' threads at the end
_numbers = itertools.count()


class PackedPool(Protocol):
    """Blocks of a pool on a device, or of some of their heads, side by side in a frame on the same device."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def generations(self) -> NDArray[np.uint64]: ...

    def pack(self, blocks: Sequence[int]) -> Tensor:
        """Their bytes, uint8 [n, block_bytes], copied; they are there when this returns."""
        ...

    def unpack(self, frame: Tensor, places: Sequence[int], blocks: Sequence[int]) -> None:
        """Copy row `places[i]` of the frame to `blocks[i]`; on return, device work submitted later sees it."""
        ...


@runtime_checkable
class PackingStorage(Protocol):
    """A worker's pool whose blocks lanes can take."""

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        ...

    def packed_pool(self, part: HeadSlice | None) -> PackedPool:
        """The pool, or some of the heads of every block."""
        ...


class Lanes:
    """Makes a worker's lanes; its store, where accepted peers are met, is served from the first of them on."""

    def __init__(self, settings: TransferSettings, storage: PackingStorage) -> None:
        self._host = settings.host
        self._timeout_s = settings.lease_s
        self._storage = storage
        self._frame_bytes = min(FRAME_BYTES, settings.max_frame_bytes)
        self._checked = WEIGHTED if settings.digest != "off" else 0
        self._store: tuple[Store, str] | None = None
        self._made: list[Lane] = []

    def invite(self, post: Post, failed: Callable[[str], None], part: HeadSlice | None) -> tuple[str, LaneReceiver]:
        """(what the peer needs to join, this end of the lane)."""
        if self._store is None:
            self._store = serve_store(self._host, self._timeout_s)
        # Peers that live in one process of tests, too, must not meet each other's.
        invitation = f"{self._store[1]}/{os.getpid()}-{next(_numbers)}"
        return invitation, LaneReceiver(self._lane(invitation, ACCEPTING, post, failed), self._pool(part))

    def join(self, invitation: str, post: Post, failed: Callable[[str], None], part: HeadSlice | None) -> LaneSender:
        """The other end. Raises WireError for what is no invitation."""
        if invitation.count("/") != 1 or ":" not in invitation:
            raise WireError(f"transfer: no invitation to a lane: {invitation!r}")
        return LaneSender(
            self._lane(invitation, OPENING, post, failed), self._pool(part), self._frame_bytes, self._checked
        )

    def close(self) -> None:
        """Stop serving the store; the lanes have been closed by who has them, and are given a moment to leave."""
        give_up = time.monotonic() + _LEAVE_S
        for lane in self._made:
            lane.join(max(0.0, give_up - time.monotonic()))
        self._store = None

    def _pool(self, part: HeadSlice | None) -> _LanePool:
        return _LanePool(self._storage.packed_pool(part), self._storage.device)

    def _lane(self, invitation: str, rank: int, post: Post, failed: Callable[[str], None]) -> Lane:
        address, _, name = invitation.partition("/")
        device, host, timeout_s = self._storage.device, self._host, self._timeout_s
        lane = Lane(name, lambda: open_pair(address, name, rank, host, device, timeout_s), post, failed)
        self._made = [*(made for made in self._made if made.alive), lane]
        return lane


def nccl_lanes(settings: TransferSettings, storage: object) -> Lanes:
    """Lanes between GPUs. Raises ConfigError where this worker cannot have them."""
    device = storage.device if isinstance(storage, PackingStorage) else torch.device("cpu")
    require_nccl(device)
    if not isinstance(storage, PackingStorage):
        raise TypeError(f"{type(storage).__name__} packs no blocks")
    return Lanes(settings, storage)


class _LanePool:
    """A packed pool with its digests."""

    def __init__(self, pool: PackedPool, device: torch.device) -> None:
        self.pool = pool
        self.device = device
        self.digest = WeightedDigest(pool.block_bytes, device)


class LaneSender:
    """Sessions' blocks on their way to one peer."""

    def __init__(self, lane: Lane, blocks: _LanePool, frame_bytes: int, checked: int) -> None:
        self._lane = lane
        self._blocks = blocks
        self._most = max(1, min(frame_bytes // blocks.pool.block_bytes, MAX_OFFER_ENTRIES))
        self._checked = checked

    @property
    def has_room(self) -> bool:
        """Another frame can be begun."""
        return self._lane.in_flight < MOST_IN_FLIGHT

    def next_offer(self, session: OutgoingSession, worker_id: str, drained: Callable[[], None]) -> Offer | None:
        """Pack the session's next blocks and give them to the lane; None where nothing is left to send.

        The offer must go out next on the connection. `drained` is called when the frame has left.
        """
        _, batch = session.choose(self._most, worker_id)
        if not batch:
            return None
        grant = session.grant
        fragments, blocks = (list(part) for part in zip(*batch, strict=True))
        frame = self._blocks.pool.pack(blocks)
        entries: NDArray[np.void] = np.zeros(len(batch), OFFER_DTYPE)
        entries["fragment"], entries["source_block"] = fragments, blocks
        entries["source_generation"] = self._blocks.pool.generations[blocks]
        entries["target_generation"] = [grant.generations[fragment] for fragment in fragments]
        entries["checked"] = self._checked
        if self._checked:
            entries["digest"] = self._blocks.digest.of(frame, grant.session_id, fragments)
        self._lane.send(frame, drained)
        return Offer(grant.session_id, grant.epoch, inline=False, entries=entries)

    def close(self) -> None:
        """End it; frames under way are lost."""
        self._lane.close()


class LaneReceiver:
    """Frames on their way from one peer, and what must wait for them."""

    def __init__(self, lane: Lane, blocks: _LanePool) -> None:
        self._lane = lane
        self._blocks = blocks
        self._announced = 0
        self._later: deque[Callable[[], None] | None] = deque()  # None: a frame that has not come

    def take(self, offer: Offer, landed: Callable[[Tensor], None]) -> None:
        """Receive the offer's frame; `landed` gets it. Raises WireError for more than a sender may announce."""
        pool = self._blocks.pool
        most = max(1, FRAME_BYTES // pool.block_bytes)
        if self._announced == _MOST_ANNOUNCED or len(offer.entries) > most:
            raise WireError("transfer: more blocks announced at once than a lane takes")
        frame = torch.empty(len(offer.entries), pool.block_bytes, dtype=torch.uint8, device=self._blocks.device)
        self._announced += 1
        self._later.append(None)
        self._lane.receive(frame, lambda: self._arrived(frame, landed))

    def after_frames(self, action: Callable[[], None]) -> None:
        """Call it once all frames announced so far have landed; now, where they have."""
        if self._announced:
            self._later.append(action)
        else:
            action()

    def unpack(self, landing: BlockLanding, frame: Tensor, worker_id: str) -> None:
        """Put the wanted blocks whose digests are right into the pool, and note in the landing which they are."""
        offer, wanted = landing.offer, landing.wanted
        fragments = [row[0] for row in landing.rows]
        plan = fault_points.plan
        if plan is not None:
            for place, fragment in zip(wanted, fragments, strict=True):
                if plan.reach(Point.TRANSFER_LAND, worker_id, fragment) is Verdict.CORRUPT:
                    frame[place, plan.byte(frame.shape[1])] ^= 0xFF
        found = self._blocks.digest.of(frame[wanted], offer.session_id, fragments) if wanted else []
        for (_, checked, *_, stated), digest in zip(landing.rows, found, strict=True):
            landing.intact.append(checked == 0 or (checked == WEIGHTED and stated == digest))
        good = [place for place, intact in zip(wanted, landing.intact, strict=True) if intact]
        blocks = [block for place in good if (block := landing.targets[place]) is not None]
        if good:
            self._blocks.pool.unpack(frame, good, blocks)

    def close(self) -> None:
        """End it; nothing lands any more."""
        self._later.clear()
        self._lane.close()

    def _arrived(self, frame: Tensor, landed: Callable[[Tensor], None]) -> None:
        self._announced -= 1
        self._later.popleft()  # the first is a frame's: what came before it has been called
        landed(frame)
        while self._later and (action := self._later[0]) is not None:
            self._later.popleft()
            action()
