"""Context parallelism: the tokens of long prompts over all attention ranks of a worker, exactly.

Of every prompt that they share (`shared_prompts.py` chooses), and of its tokens in one step, every rank computes two
pieces: they are cut into 2 R equal ones, and rank r takes pieces r and 2 R - 1 - r. Work per token grows with its
position, with a cached beginning as without, so that makes for equal work under a causal mask (the zigzag of Ring and
Striped Attention's successors; Brandon et al. 2023, section 3, for why contiguous shares are not balanced). What comes
before the pieces is copied block by block, before the first layer, from its owner to those who lack it: keys and values
and not queries travel, since a cached beginning lies with one rank, which would else attend to it alone. Then in every
layer the ranks give each other their tokens' keys and values (the all-gather variant, best for few ranks), so each
holds the whole prompt's in its own blocks: the owner in the sequence's, the others in scratch. Called by
`attention_ranks.py` (who computes what), by the runner before the layers and by them (the exchange).

Legend: R ranks, t tokens of a rank, B blocks, L layers, C parts (key and value), H kv heads, P slots of a block, D head
dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.parallel.collectives import Collectives
from penstock.workers.scheduler.plan import I32

I64 = NDArray[np.int64]
_COPY_BYTES = 32 << 20  # of a prompt's beginning that travel at once


@dataclass(frozen=True, slots=True, eq=False)
class SharedChunk:
    """The prompt tokens of row `row` that all ranks compute in this step."""

    row: int
    start: int  # position of the first of them
    count: int
    owner: int  # the place, among the ranks that are there, of the one in whose bank the prompt lies
    held: int  # leading positions whose keys and values the others have in their scratch
    scratch: I32  # the blocks of it there, from the first token on
    pieces: tuple[tuple[tuple[int, int], ...], ...]  # of each rank, within the chunk

    @property
    def end(self) -> int:
        """Position behind the last of them."""
        return self.start + self.count

    @property
    def last_rank(self) -> int:
        """Who computes the last token."""
        return 0

    def positions(self, rank: int) -> I64:
        """Positions in the prompt of the tokens that this rank computes, ascending."""
        return np.concatenate([np.arange(self.start + begin, self.start + end) for begin, end in self.pieces[rank]])


def zigzag(count: int, ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Of each rank, the two pieces `[begin, end)` of `count` >= 2 R tokens that it computes."""
    borders = [place * count // (2 * ranks) for place in range(2 * ranks + 1)]
    last = 2 * ranks - 1
    return tuple(
        ((borders[rank], borders[rank + 1]), (borders[last - rank], borders[last - rank + 1])) for rank in range(ranks)
    )


class ContextExchange:
    """One rank's side of the exchange of shared chunks' keys and values, for all layers of a step."""

    def __init__(
        self,
        group: Collectives,
        chunks: Sequence[SharedChunk],
        tables: Sequence[I32],
        block_size: int,
        device: torch.device,
    ) -> None:
        """`tables`: of each chunk, blocks of this rank that hold the prompt from its first token on."""
        self._group = group
        self._device = device
        self._beginnings = [
            (chunk.owner, table[chunk.held // block_size : -(-chunk.start // block_size)])
            for chunk, table in zip(chunks, tables, strict=True)
            if chunk.held < chunk.start
        ]
        places = [
            [_places(table, chunk.positions(rank), block_size) for chunk, table in zip(chunks, tables, strict=True)]
            for rank in range(group.width)
        ]
        every = [np.concatenate(of_rank) for of_rank in places]
        self._most = max(map(len, every))
        self._own = _columns(every[group.rank], device)
        others = [rank for rank in range(group.width) if rank != group.rank]
        self._others = _columns(np.concatenate([every[rank] for rank in others]), device)
        rows = np.concatenate([np.arange(len(every[rank])) + rank * self._most for rank in others])
        self._rows = torch.from_numpy(rows).to(device)

    def bring_beginnings(self, kv_BLCHPD: Tensor) -> None:
        """Copy what comes before the chunks from their owners to the others, for all layers. Collective.

        Before the first layer: of the last block, slots that this step writes are copied too.
        """
        block_bytes = kv_BLCHPD[0].numel() * kv_BLCHPD.element_size()
        size = max(1, _COPY_BYTES // block_bytes)
        for owner, table in self._beginnings:
            for begin in range(0, len(table), size):
                blocks = torch.from_numpy(table[begin : begin + size].astype(np.int64)).to(self._device)
                mine = owner == self._group.rank
                copied = kv_BLCHPD[blocks] if mine else kv_BLCHPD.new_empty(len(blocks), *kv_BLCHPD.shape[1:])
                self._group.broadcast(copied, owner)
                if not mine:
                    kv_BLCHPD[blocks] = copied

    def share(self, kv_BLCHPD: Tensor, layer: int) -> None:
        """Give the others what this rank has just written for its tokens, and write what they have. Collective."""
        blocks, slots = self._own
        own_tCHD = kv_BLCHPD[blocks, layer, :, :, slots]
        padded = own_tCHD.new_zeros(self._most, *own_tCHD.shape[1:])
        padded[: len(own_tCHD)] = own_tCHD
        gathered = self._group.all_gather(padded)
        blocks, slots = self._others
        kv_BLCHPD[blocks, layer, :, :, slots] = gathered[self._rows]


def _places(table: I32, positions: I64, block_size: int) -> I64:
    """[t, 2]: block and slot of each position."""
    return np.stack((table[positions // block_size].astype(np.int64), positions % block_size), axis=1)


def _columns(places: I64, device: torch.device) -> tuple[Tensor, Tensor]:
    blocks, slots = torch.from_numpy(np.ascontiguousarray(places.T)).to(device)
    return blocks, slots
