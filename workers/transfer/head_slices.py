"""Which KV heads travel between which ranks when groups of different widths exchange blocks. Pure arithmetic.

Used by `sender.py` (to whom, and which part of each block), `receiver.py` (whether that part is ours) and, before any
block moves, by whoever asks whether two widths can work together. A block holds the same heads on every rank of one
width; so one block of the model is a slice of blocks on several ranks, and every slice has exactly one sender for each
rank that needs it. Heads that a group holds more than once, since it is wider than there are heads, travel once per
receiving rank, from a copy chosen so that the copies share the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.workers.parallel.shards import TensorShard


@dataclass(frozen=True, slots=True)
class HeadRange:
    """KV heads `[first, first + count)` of the model."""

    first: int
    count: int

    @property
    def end(self) -> int:
        """The head behind the last."""
        return self.first + self.count

    def holds(self, other: HeadRange) -> bool:
        """All of the other's heads are among these, and it has some."""
        return other.count > 0 and self.first <= other.first and other.end <= self.end

    def meets(self, other: HeadRange) -> bool:
        """They have a head in common."""
        return self.first < other.end and other.first < self.end


@dataclass(frozen=True, slots=True)
class HeadShare:
    """What one rank of a group of `width` holds of a model with `total` KV heads."""

    total: int = 1
    width: int = 1
    rank: int = 0

    @property
    def heads(self) -> HeadRange:
        """The heads in this rank's blocks."""
        own = TensorShard(self.rank, self.width).kv_heads(self.total)
        return HeadRange(own.start, len(own))

    def deliveries(self, width: int) -> list[tuple[int, HeadRange]]:
        """(rank of a receiving group of `width`, the heads it gets from this rank), ascending; perhaps none."""
        found = []
        for rank in range(width):
            target = HeadShare(self.total, width, rank)
            found += [(rank, heads) for source, heads in target.sources(self.width) if source == self.rank]
        return found

    def sources(self, width: int) -> list[tuple[int, HeadRange]]:
        """(rank of a sending group of `width`, the heads that this rank gets from it), ascending by head."""
        found: list[tuple[int, HeadRange]] = []
        for head in range(self.heads.first, self.heads.end):
            source = _source_of(head, self.total, width, self.rank)
            if found and found[-1][0] == source:
                found[-1] = (source, HeadRange(found[-1][1].first, found[-1][1].count + 1))
            else:
                found.append((source, HeadRange(head, 1)))
        return found


ALONE = HeadShare()  # a worker of one rank: its blocks are whole, whatever they hold


def reason_against(source_width: int, target_width: int) -> str | None:
    """Why groups of these widths cannot exchange blocks; None if they can.

    Widths that divide one another cut every slice out of one piece; the others are refused rather than half supported.
    """
    if source_width % target_width == 0 or target_width % source_width == 0:
        return None
    return f"tensor-parallel widths {source_width} and {target_width}: neither divides the other"


def _source_of(head: int, total: int, width: int, target: int) -> int:
    """The rank of the sending group that gives this head to rank `target` of the receiving one."""
    if width <= total:
        return head // (total // width)
    copies = width // total
    return head * copies + target % copies
