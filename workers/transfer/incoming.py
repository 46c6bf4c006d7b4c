"""One granted session as a receiving rank sees it: which fragments are here, until when, and from whom.

    WAITING (granted) -> opened by each sender (Open) -> fragments land -> Finish from each -> whole

A sending group that is wider than ours has several ranks with heads for us: each delivers its slice of every fragment
over a connection of its own. Used by `receiver.py`, which does the bytes and the talking; pure apart from that, the
clock's reading comes in.

Invariants: a fragment that is marked in a delivery is never landed again by it; a session that has ended names no
target; only a connection that opened the session can change it, only with the session's epoch, and no two of them
deliver the same head; the session is whole once its deliveries are, and carry all heads of this rank.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.workers.errors import PenstockError
from penstock.workers.protocol import Tokens
from penstock.workers.transfer.endpoint import Channel
from penstock.workers.transfer.head_slices import ALONE, HeadRange
from penstock.workers.transfer.messages import Offer
from penstock.workers.transfer.port import Incoming

# Lost or damaged fragments are asked for again so often before the session fails; each round costs one trip.
MAX_RESEND_ROUNDS = 2
MAX_MISSING = 1 << 16


class SessionError(PenstockError):
    """The session cannot go on; the message is the reason given to engine and peer."""


class IncomingSession:
    """Book-keeping of one expected session; `own` are the heads in this rank's blocks."""

    __slots__ = (
        "_deliveries",
        "_own",
        "_unopened_until",
        "blocks",
        "fragments",
        "generations",
        "granted",
        "mismatches",
        "open",
        "tokens",
    )

    def __init__(self, granted: Incoming, now: float, own: HeadRange = ALONE.heads) -> None:
        self.granted = granted
        self.open = True
        self.mismatches = 0  # blocks that came with a wrong digest
        self.tokens: Tokens | None = None  # from the first Finish
        self.fragments: int | None = None  # as `tokens`; see `Finish`
        self.blocks = np.asarray(granted.blocks, np.int64)
        self.generations = np.asarray(granted.generations, np.uint64)
        self._own = own
        self._unopened_until = now + granted.lease_s  # by then every head has a sender
        self._deliveries: dict[Channel, Delivery] = {}

    @property
    def channels(self) -> list[Channel]:
        """Connections that have opened the session."""
        return list(self._deliveries)

    @property
    def expires(self) -> float:
        """The lease ends then: one sender gave no sign of life, or never came."""
        leases = [delivery.expires for delivery in self._deliveries.values()]
        return min(leases if self._covered else [self._unopened_until, *leases])

    @property
    def whole(self) -> bool:
        """Every fragment of every sender, and the tail, are here."""
        return self._covered and all(delivery.whole for delivery in self._deliveries.values())

    def delivery(self, channel: Channel, epoch: int, heads: HeadRange, now: float) -> Delivery | None:
        """What this connection delivers, renewed; opened with its first sign. None: the session is not for it."""
        if not self.open or epoch != self.granted.epoch:
            return None
        found = self._deliveries.get(channel)
        if found is None:
            if any(other.heads.meets(heads) for other in self._deliveries.values()):
                return None
            found = self._deliveries[channel] = Delivery(self, channel, heads)
        found.renew(now)
        return found

    def delivered_by(self, channel: Channel) -> Delivery | None:
        """What this connection delivers, if it has opened the session."""
        return self._deliveries.get(channel)

    @property
    def _covered(self) -> bool:
        return sum(delivery.heads.count for delivery in self._deliveries.values()) == self._own.count


class Delivery:
    """One sender's part of a session: the same heads of every fragment."""

    __slots__ = ("_finished", "_have", "_lacking", "_rounds", "channel", "expires", "heads", "session")

    def __init__(self, session: IncomingSession, channel: Channel, heads: HeadRange) -> None:
        self.session = session
        self.channel = channel
        self.heads = heads
        self.expires = 0.0
        self._have = bytearray(len(session.blocks))
        self._lacking = len(session.blocks)
        self._rounds = 0
        self._finished = False

    @property
    def open(self) -> bool:
        """The session lives: its blocks may be written."""
        return self.session.open

    @property
    def whole(self) -> bool:
        """Every fragment and the tail are here."""
        return self._lacking == 0 and self._finished

    def renew(self, now: float) -> None:
        """The sender gave a sign of life."""
        self.expires = now + self.session.granted.lease_s

    def targets(self, offer: Offer, generations: NDArray[np.uint64]) -> list[int | None]:
        """Block for each entry of the offer; None for one that is here already.

        `generations` is the pool's current one for every block. Raises SessionError for a fragment outside the grant
        or a block that no longer is the one granted.
        """
        granted = self.session
        fragments, stated = offer.entries["fragment"], offer.entries["target_generation"]
        outside = fragments >= len(self._have)
        if outside.any():
            raise SessionError(f"fragment {fragments[outside][0]} of a session of {len(self._have)}")
        blocks = granted.blocks[fragments]
        reused = (stated != granted.generations[fragments]) | (stated != generations[blocks])
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
        if self.open and fragment < len(self._have) and not self._have[fragment]:
            self._have[fragment] = 1
            self._lacking -= 1

    def finish(self, tokens: Tokens, fragments: int | None = None) -> Tokens:
        """The sender has sent everything. Returns the fragments to ask for again, none when whole.

        `fragments`: it fills only so many of the granted blocks.

        Raises SessionError when asking again has not helped, or when senders disagree about the tokens.
        """
        if self.session.tokens is None:
            self.session.tokens, self.session.fragments = tokens, fragments
        if not self._finished and (self.session.tokens, self.session.fragments) != (tokens, fragments):
            raise SessionError("the sending ranks have sampled different tokens")
        if fragments is not None and not self._finished:
            if fragments > len(self._have):
                raise SessionError(f"{fragments} fragments of a session of {len(self._have)}")
            del self._have[fragments:]
            self._lacking = self._have.count(0)
        self._finished = True
        if self._lacking == 0:
            return ()
        if self._rounds == MAX_RESEND_ROUNDS:
            raise SessionError(f"{self._lacking} of {len(self._have)} fragments lost or damaged")
        self._rounds += 1
        lacking = [fragment for fragment, here in enumerate(self._have) if not here]
        return tuple(lacking[:MAX_MISSING])
