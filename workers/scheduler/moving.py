"""Running sequences on their way to another worker, which has granted them blocks and will go on with them.

Part of the scheduler: the engine begins a move and says how it stands, and takes from here what is to be sent. While
the blocks that are full travel the sequence decodes on; then it pauses, its last blocks and tokens follow, and it is
over here once the peer has verified everything. If anything fails on the way it just goes on here. Knows rows and
blocks, no sessions.

Invariants: a paused sequence is in no new plan; its tail leaves once no step under way computes it, and then holds all
tokens but those that the peer's request had; blocks that were offered stay its own until the session is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from penstock.workers.kv.layout import KVLayout
from penstock.workers.protocol import Tokens
from penstock.workers.scheduler.events import Offer, SequenceKey, StaysEvent
from penstock.workers.scheduler.handover import offer_blocks
from penstock.workers.scheduler.roster import Roster
from penstock.workers.scheduler.sequence import Moving, Sequence
from penstock.workers.scheduler.table import DECODE


class MovedTail(NamedTuple):
    """Everything of a sequence was offered: `fragments` blocks of the grant, and the tokens the peer lacks."""

    key: SequenceKey
    tokens: Tokens
    fragments: int


@dataclass(frozen=True, slots=True)
class MoveTerms:
    """What the peer granted: context blocks from `first_block` on; its request had `emitted` generated tokens."""

    first_block: int
    num_blocks: int
    emitted: int


class Moves:
    """The sequences of one scheduler that are to go on elsewhere."""

    def __init__(self, roster: Roster, layout: KVLayout) -> None:
        self._roster = roster
        self._layout = layout
        self._open: dict[SequenceKey, Sequence] = {}

    def begin(self, key: SequenceKey, terms: MoveTerms) -> str:
        """Get a sequence ready to leave; why it cannot, empty where it can."""
        sequence = self._roster.find(key)
        if sequence is None or sequence.slot is None or self._roster.table.state[sequence.slot] != DECODE:
            return "it does not decode here at the moment"
        if sequence.moving is not None:
            return "it is on its way already"
        length = int(self._roster.table.length[sequence.slot])
        if not 0 <= terms.first_block * self._layout.block_size < length:
            return "the peer has blocks of a longer context"
        if sequence.prompt_length + terms.emitted > length:
            return "the peer knows tokens that were not generated here"
        end_block = terms.first_block + terms.num_blocks
        will_have = int(self._roster.table.computed[sequence.slot]) + self._roster.under_way.holds(sequence.slot)
        if will_have > end_block * self._layout.block_size:
            return "it has outgrown what the peer reserved"  # the peer took its time
        sequence.moving = Moving(end_block, terms.emitted)
        sequence.first_block = sequence.offered = terms.first_block
        self._open[key] = sequence
        return ""

    def bank_of(self, key: SequenceKey) -> int:
        """Where the blocks of a sequence lie that has begun to move."""
        return self._open[key].bank

    def caught_up(self, key: SequenceKey) -> None:
        """The peer has all that was offered: what is left is little, so let it follow at once."""
        sequence = self._open.get(key)
        if sequence is not None and sequence.moving is not None and sequence.slot is not None:
            self._roster.pause(sequence)

    def collect(self) -> tuple[list[Offer], list[MovedTail]]:
        """What can be sent now; ask after every step and event."""
        offers: list[Offer] = []
        tails: list[MovedTail] = []
        for key, sequence in list(self._open.items()):
            if sequence.moving is None or sequence.slot is None or self._roster.find(key) is not sequence:
                del self._open[key]  # it ended, or goes on here
            elif not sequence.moving.sent:
                self._collect(sequence, sequence.moving, sequence.slot, offers, tails)
        return offers, tails

    def arrived(self, key: SequenceKey, tokens: Tokens) -> None:
        """A sequence that ran at a peer is here; these are its tokens that the reservation did not have."""
        self._roster.take_over(key, tokens)

    def done(self, key: SequenceKey) -> None:
        """The peer has it, verified: it is over here, without an event."""
        self._open.pop(key, None)
        if not self._roster.settle(key):
            self._roster.leave(key)

    def failed(self, key: SequenceKey, reason: str) -> None:
        """Nobody reads its blocks any more: it goes on here, unless it ended meanwhile."""
        sequence = self._open.pop(key, None)
        if not self._roster.settle(key) and sequence is not None and self._roster.find(key) is sequence:
            self._roster.stay(sequence)
            self._roster.events.append(StaysEvent(key, reason))

    def _collect(
        self, sequence: Sequence, moving: Moving, slot: int, offers: list[Offer], tails: list[MovedTail]
    ) -> None:
        table, under_way = self._roster.table, self._roster.under_way
        computed = int(table.computed[slot])
        if computed + 1 >= moving.end_block * self._layout.block_size:
            self._roster.pause(sequence)  # the peer's room ends here
        if not moving.paused or under_way.holds(slot):
            # Steps under way count as computed already, one token each.
            whole = max(0, computed - len(under_way)) // self._layout.block_size
            offer_blocks(self._roster, sequence, slot, whole, offers)
            return
        offer_blocks(self._roster, sequence, slot, self._layout.blocks_for(computed), offers)
        known, length = sequence.prompt_length + moving.emitted, int(table.length[slot])
        tokens = tuple(table.tokens[slot, known:length].tolist())
        moving.sent = True
        tails.append(MovedTail(sequence.key, tokens, sequence.offered - sequence.first_block))
