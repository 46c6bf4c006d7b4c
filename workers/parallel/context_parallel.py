"""Context parallelism: the tokens of one long prompt over all attention ranks of a worker, exactly.

Of one prompt at a time, and of its tokens in one step, every rank computes two pieces: the prompt is cut into 2 R equal
pieces, and rank r takes pieces r and 2 R - 1 - r, which makes for equal work under a causal mask (the zigzag of Ring
and Striped Attention's successors; Brandon et al. 2023, section 3, for why contiguous shares are not balanced). In
every layer the ranks give each other their tokens' keys and values (the all-gather variant, best for few ranks), so
each holds the whole prompt's in its own blocks: the owner in the sequence's, the others in scratch that nobody else
uses. Used by `attention_ranks.py` (who computes what) and by the model's layers (the exchange).

Legend: R ranks, t tokens of a rank, L layers, C parts (key and value), H kv heads, P slots of a block, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.parallel.collectives import Collectives
from penstock.workers.scheduler.plan import I32, StepPlan

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SharedChunk:
    """The prompt tokens of row `row` that all ranks compute in this step."""

    step: int
    row: int
    slot: int
    start: int  # position of the first of them
    count: int
    blocks: bytes  # ids of the blocks that hold the prompt up to the end of this chunk, as the plan has them
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


def shared_chunk(plan: StepPlan, ranks: int, threshold: int, before: SharedChunk | None) -> SharedChunk | None:
    """What the ranks compute together of this plan: its longest prompt chunk of at least `threshold` tokens, if any.

    Only one that begins a prompt, or goes on where the chunk shared in the step `before` ended: else the other ranks
    would lack what comes before it. A prompt whose tokens are scored stays with its owner.
    """
    if not threshold or ranks < 2:
        return None
    counts = np.diff(plan.offsets)
    found: SharedChunk | None = None
    for row in np.flatnonzero(counts >= max(threshold, 2 * ranks)).tolist():
        count, start, slot = int(counts[row]), int(plan.starts[row]), int(plan.slots[row])
        chunk = SharedChunk(plan.step, row, slot, start, count, plan.block_tables[row].tobytes(), zigzag(count, ranks))
        if (found is None or count > found.count) and _can_be_shared(plan, chunk, before):
            found = chunk
    return found


def zigzag(count: int, ranks: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Of each rank, the two pieces `[begin, end)` of `count` >= 2 R tokens that it computes."""
    borders = [place * count // (2 * ranks) for place in range(2 * ranks + 1)]
    last = 2 * ranks - 1
    return tuple(
        ((borders[rank], borders[rank + 1]), (borders[last - rank], borders[last - rank + 1])) for rank in range(ranks)
    )


def _can_be_shared(plan: StepPlan, chunk: SharedChunk, before: SharedChunk | None) -> bool:
    if plan.scored is not None:
        first, end = plan.offsets[chunk.row], plan.offsets[chunk.row + 1]
        if ((plan.scored.token_rows >= first) & (plan.scored.token_rows < end)).any():
            return False
    if chunk.start == 0:
        return True
    # In the very next step nothing else can have been written to the scratch, nor to blocks that go on being these.
    return (
        before is not None
        and before.step + 1 == plan.step
        and (before.slot, before.end) == (chunk.slot, chunk.start)
        and chunk.blocks.startswith(before.blocks.rstrip(b"\0")[: len(chunk.blocks)])
    )


class ContextExchange:
    """One rank's side of the exchange of a shared chunk's keys and values, for all layers of a step."""

    def __init__(
        self, group: Collectives, chunk: SharedChunk, table: I32, block_size: int, device: torch.device
    ) -> None:
        """`table`: blocks of this rank that hold the prompt from its first token on."""
        self._group = group
        every = [chunk.positions(rank) for rank in range(group.width)]
        self._most = max(map(len, every))
        own = every[group.rank]
        self._own = _places(table, own, block_size, device)
        others = [rank for rank in range(group.width) if rank != group.rank]
        self._others = _places(table, np.concatenate([every[rank] for rank in others]), block_size, device)
        rows = np.concatenate([np.arange(len(every[rank])) + rank * self._most for rank in others])
        self._rows = torch.from_numpy(rows).to(device)

    def share(self, kv_BLCHPD: Tensor, layer: int) -> None:
        """Give the others what this rank has just written for its tokens, and write what they have. Collective."""
        blocks, slots = self._own
        own_tCHD = kv_BLCHPD[blocks, layer, :, :, slots]
        padded = own_tCHD.new_zeros(self._most, *own_tCHD.shape[1:])
        padded[: len(own_tCHD)] = own_tCHD
        gathered = self._group.all_gather(padded)
        blocks, slots = self._others
        kv_BLCHPD[blocks, layer, :, :, slots] = gathered[self._rows]


def _places(table: I32, positions: I64, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(block, slot) of each position."""
    blocks = table[positions // block_size].astype(np.int64)
    return torch.from_numpy(blocks).to(device), torch.from_numpy(positions % block_size).to(device)
