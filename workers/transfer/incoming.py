"""One granted session as the receiving worker sees it: which fragments are here, until when, and from whom.

    WAITING (granted) -> bound to a connection (Open) -> fragments land -> Finish -> whole

Used by `receiver.py`, which does the bytes and the talking; pure apart from that, the clock's reading comes in.

Invariants: a fragment that is marked here is never landed again; a session that has ended names no target; only the
connection that opened the session can change it, and only with the session's epoch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import PenstockError
from penstock.workers.protocol import Tokens
from penstock.workers.transfer.endpoint import Channel
from penstock.workers.transfer.messages import Offer
from penstock.workers.transfer.port import Incoming

# Lost or damaged fragments are asked for again so often before the session fails; each round costs one trip.
MAX_RESEND_ROUNDS = 2
MAX_MISSING = 1 << 16


class SessionError(PenstockError):
    """The session cannot go on; the message is the reason given to engine and peer."""


class IncomingSession:
    """Book-keeping of one expected session."""

    __slots__ = (
        "_blocks",
        "_generations",
        "_have",
        "_lacking",
        "_rounds",
        "channel",
        "expires",
        "granted",
        "open",
        "tokens",
    )

    def __init__(self, granted: Incoming, now: float) -> None:
        self.granted = granted
        self.expires = now + granted.lease_s
        self.open = True
        self.channel: Channel | None = None
        self.tokens: Tokens | None = None  # from Finish
        self._have = bytearray(len(granted.blocks))
        self._lacking = len(granted.blocks)
        self._rounds = 0
        self._blocks = np.asarray(granted.blocks, np.int64)
        self._generations = np.asarray(granted.generations, np.uint64)

    @property
    def whole(self) -> bool:
        """Every fragment and the tail are here."""
        return self._lacking == 0 and self.tokens is not None

    def bind(self, channel: Channel, epoch: int) -> bool:
        """Tie the session to the first connection that opens it. False: this is not that connection, or not ours."""
        if not self.open or epoch != self.granted.epoch:
            return False
        if self.channel is None:
            self.channel = channel
        return self.channel is channel

    def renew(self, now: float) -> None:
        """The peer gave a sign of life."""
        self.expires = now + self.granted.lease_s

    def targets(self, offer: Offer, generations: NDArray[np.uint64]) -> list[int | None]:
        """Block for each entry of the offer; None for one that is here already.

        `generations` is the pool's current one for every block. Raises SessionError for a fragment outside the grant
        or a block that no longer is the one granted.
        """
        fragments, stated = offer.entries["fragment"], offer.entries["target_generation"]
        outside = fragments >= len(self._blocks)
        if outside.any():
            raise SessionError(f"fragment {fragments[outside][0]} of a session of {len(self._blocks)}")
        blocks = self._blocks[fragments]
        reused = (stated != self._generations[fragments]) | (stated != generations[blocks])
        if reused.any():
            raise SessionError(f"fragment {fragments[reused][0]}: the granted block has been reused")
        targets: list[int | None] = []
        seen = bytearray(self._have)
        for fragment, block in zip(fragments.tolist(), blocks.tolist(), strict=True):
            targets.append(None if seen[fragment] else block)
            seen[fragment] = 1
        return targets

    def mark(self, fragment: int) -> None:
        """The fragment's bytes are in its block, verified."""
        if self.open and not self._have[fragment]:
            self._have[fragment] = 1
            self._lacking -= 1

    def finish(self, tokens: Tokens) -> Tokens:
        """The peer has sent everything. Returns the fragments to ask for again, none when whole.

        Raises SessionError when asking again has not helped.
        """
        if self.tokens is None:
            self.tokens = tokens
        if self._lacking == 0:
            return ()
        if self._rounds == MAX_RESEND_ROUNDS:
            raise SessionError(f"{self._lacking} of {len(self._have)} fragments lost or damaged")
        self._rounds += 1
        lacking = [fragment for fragment, here in enumerate(self._have) if not here]
        return tuple(lacking[:MAX_MISSING])
