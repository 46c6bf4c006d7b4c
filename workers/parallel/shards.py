"""Which part of every weight a rank of a tensor-parallel group holds: arithmetic on sizes, nothing else.

Used by `workers/model/loading.py`, which reads those parts, by `decoder.py`, which computes with them, and by whoever
wants to know before a start whether a width can be had. It knows no tensors, files or processes.

The cut is that of Shoeybi et al. 2019 (Megatron-LM, section 3): query, key, value, gate and up projections by output,
heads kept whole; output and down projections by input, so that each rank has a term of the sum; embedding and head by
vocabulary. Key and value heads are repeated where there are more ranks than heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.workers.errors import ConfigError

KEY = "tensor_parallel_size"
MOST_RANKS = 1 << 10
_EVEN = 4  # runs of a rank, at least: more matter less to balance than whole words to speed
_RUN = 16  # columns: kernels want rows of whole words, better of whole vectors


@dataclass(frozen=True, slots=True)
class Widths:
    """The sizes of a model that a group divides. `columns` are those of the feed-forward blocks, by their names."""

    heads: int
    kv_heads: int
    columns: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class TensorShard:
    """The part of `rank` of `width`. Every method gives the range of indices that this rank holds."""

    rank: int = 0
    width: int = 1

    def heads(self, count: int) -> range:
        """Of `count` query heads, which the width divides."""
        own = count // self.width
        return range(self.rank * own, (self.rank + 1) * own)

    def kv_heads(self, count: int) -> range:
        """Of `count` key and value heads: the ones that the rank's query heads attend to."""
        if count >= self.width:
            return self.heads(count)
        first = self.rank * count // self.width
        return range(first, first + 1)

    def columns(self, count: int) -> range:
        """Of `count` outputs that may be cut anywhere; parts are as even as whole runs of columns make them."""
        run = math.gcd(count, _RUN)
        while run > 1 and count // run < _EVEN * self.width:
            run //= 2
        runs = count // run
        return range(self.rank * runs // self.width * run, (self.rank + 1) * runs // self.width * run)

    def vocabulary(self, count: int) -> range:
        """Of `count` token ids; parts are of one size but for the last ones, which may lack some or all."""
        size = self.vocabulary_size(count)
        return range(min(count, self.rank * size), min(count, (self.rank + 1) * size))

    def vocabulary_size(self, count: int) -> int:
        """Rows of every rank's embedding and head, those beyond the vocabulary included."""
        return -(-count // self.width)

    @property
    def adds_bias(self) -> bool:
        """Whether this rank adds the bias of a projection that is cut by input: one of them must."""
        return self.rank == 0


WHOLE = TensorShard()


def require_width(widths: Widths, width: int) -> None:
    """Raises ConfigError with the numbers unless a group of `width` ranks can share a model of these sizes."""
    reason = _obstacle(widths, width)
    if reason is not None:
        fitting = ", ".join(str(each) for each in fitting_widths(widths))
        raise ConfigError(f"{KEY} {width}: {reason}; this model can be cut for {fitting}", key=KEY)


def fitting_widths(widths: Widths) -> tuple[int, ...]:
    """All widths that a model of these sizes can be cut for, in ascending order."""
    return tuple(each for each in range(1, widths.heads + 1) if _obstacle(widths, each) is None)


def _obstacle(widths: Widths, width: int) -> str | None:
    heads, kv_heads = widths.heads, widths.kv_heads
    if not 1 <= width <= MOST_RANKS:
        return f"must be 1 to {MOST_RANKS}"
    if heads % width:
        return f"does not divide the {heads} attention heads"
    if kv_heads % width and width % kv_heads:
        return f"neither divides the {kv_heads} key and value heads nor is a multiple of them"
    for name, count in widths.columns:
        if count < width:
            return f"is above the {count} columns of {name}"
    return None
