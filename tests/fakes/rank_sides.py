"""The ranks of two groups of different widths as transfer engines, and sessions between them, over any transport.

A test file says in a subclass of `RankSide` what a rank is and where its blocks lie; everything else is the same for
all transports.
"""

from __future__ import annotations

import os

import numpy as np
from fakes.transfer_pair import EPOCH, Worker
from numpy.typing import NDArray

from penstock.workers.protocol import Grant
from penstock.workers.transfer.head_slices import HeadShare
from penstock.workers.transfer.port import Arrived, Incoming, OutgoingDone, Tail

PIECES, HEAD_BYTES, BLOCKS = 4, 640, 12
SOURCES, TARGETS = (3, 5, 4, 10), (9, 2, 7, 0)

Blocks = NDArray[np.uint8]


class RankSide:
    """The ranks of one side."""

    def __init__(self, name: str, total: int, width: int, **options: object) -> None:
        """`total` heads over `width` ranks; the last one is made with `options`."""
        self.shares = [HeadShare(total, width, rank) for rank in range(width)]
        self.ranks = [
            self.make_rank(f"{name}{share.rank}", share, **(options if share.rank == width - 1 else {}))
            for share in self.shares
        ]

    def make_rank(self, name: str, share: HeadShare, **options: object) -> Worker:
        """One rank with its pool."""
        raise NotImplementedError

    def data(self, rank: Worker) -> Blocks:
        """[BLOCKS, bytes]; the pool's own memory."""
        raise NotImplementedError

    def rows(self, share: HeadShare) -> Blocks:
        """[block, piece, head, byte] of one rank; the pool's own memory."""
        return self.data(self.ranks[share.rank]).reshape(BLOCKS, PIECES, share.heads.count, HEAD_BYTES)

    def fill(self, total: int) -> Blocks:
        """Give each rank its heads of a model [block, piece, head, byte], which is returned."""
        model = np.random.default_rng(1).integers(0, 256, (BLOCKS, PIECES, total, HEAD_BYTES), np.uint8)
        for share in self.shares:
            self.rows(share)[:] = model[:, :, share.heads.first : share.heads.end]
        return model

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def block_bytes(share: HeadShare) -> int:
    """Of one block on this rank."""
    return PIECES * share.heads.count * HEAD_BYTES


def begin(p: RankSide, d: RankSide, targets: tuple[int, ...] = TARGETS, lease_s: float = 5.0) -> bytes:
    """A session from all ranks of one side to all of the other."""
    session, generations = os.urandom(16), (0,) * len(targets)
    for rank in d.ranks:
        rank.engine.expect(Incoming(session, EPOCH, targets, generations, lease_s))
    first, *others = [rank.engine.address for rank in d.ranks]
    grant = Grant(session, "d", EPOCH, first, "", 0, targets, generations, lease_s, "same", tuple(others))
    for rank in p.ranks:
        rank.engine.start(grant)
    return session


def send(p: RankSide, session: bytes) -> None:
    for rank in p.ranks:
        rank.engine.offer(session, list(enumerate(SOURCES))[:3])
        rank.engine.offer(session, list(enumerate(SOURCES))[3:])
        rank.engine.finish(session, Tail((42,)))


def require_landed(p: RankSide, d: RankSide, model: Blocks, session: bytes) -> None:
    for rank in d.ranks:
        assert rank.wait(1) == [Arrived(session, Tail((42,)))]
    for rank in p.ranks:
        assert rank.wait(1) == [OutgoingDone(session)]
    untouched = [block for block in range(BLOCKS) if block not in TARGETS]
    for share in d.shares:
        expected = model[list(SOURCES), :, share.heads.first : share.heads.end]
        np.testing.assert_array_equal(d.rows(share)[list(TARGETS)], expected)
        assert not d.rows(share)[untouched].any()
