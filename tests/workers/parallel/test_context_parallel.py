"""That the pieces of shared prompts are the whole, evenly much work, and exchanged in full, beginnings included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes.rank_threads import RankThreads

from penstock.workers.parallel import context_parallel
from penstock.workers.parallel.context_parallel import ContextExchange, SharedChunk, zigzag

BLOCK, LAYERS = 4, 2


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [16, 17, 31, 64, 1000, 4096])
def test_pieces_are_everything_once_and_evenly_much_work(ranks: int, count: int) -> None:
    pieces = zigzag(count, ranks)
    tokens = [token for own in pieces for begin, end in own for token in range(begin, end)]
    assert sorted(tokens) == list(range(count))
    for start in (0, 3000):
        # Pairs of query and key under the causal mask.
        work = [sum(start + token + 1 for begin, end in own for token in range(begin, end)) for own in pieces]
        if count >= 64 * ranks:
            assert max(work) / (sum(work) / ranks) <= 1.02


def chunk_of(row: int, start: int, count: int, owner: int, held: int, ranks: int, scratch: range) -> SharedChunk:
    return SharedChunk(row, start, count, owner, held, np.array(scratch, np.int32), zigzag(count, ranks))


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("copy_bytes", [1, 1 << 20])  # beginnings block by block, and at once
def test_every_rank_ends_up_with_all_keys_and_values(
    ranks: int, copy_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_parallel, "_COPY_BYTES", copy_bytes)
    chunks = [
        chunk_of(0, 0, 45, 0, 0, ranks, range(40, 52)),  # from its first token on
        chunk_of(1, 32, 17, 1, 0, ranks, range(52, 65)),  # behind whole blocks that only the owner has
        chunk_of(2, 22, 9, 1, 0, ranks, range(65, 73)),  # behind a part of one
        chunk_of(3, 18, 20, 0, 18, ranks, range(73, 83)),  # behind what all have
        chunk_of(4, 30, 12, 0, 9, ranks, range(83, 94)),  # behind what they have in part
    ]
    own_tables = [np.arange(13 * place, 13 * place + 13, dtype=np.int32) for place in range(len(chunks))]
    truths = [torch.randn(chunk.end, LAYERS, 2, 3, 5) for chunk in chunks]

    def places(table: np.ndarray, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(table.astype(np.int64))[positions // BLOCK], positions % BLOCK

    def work(group: Any) -> list[torch.Tensor]:
        kv = torch.full((200, LAYERS, 2, 3, BLOCK, 5), torch.nan)
        tables = [
            own + 100 if chunk.owner == group.rank else chunk.scratch
            for chunk, own in zip(chunks, own_tables, strict=True)
        ]
        for chunk, table, truth in zip(chunks, tables, truths, strict=True):
            there = torch.arange(chunk.start if chunk.owner == group.rank else chunk.held)
            blocks, slots = places(table, there)
            for layer in range(LAYERS):
                kv[blocks, layer, :, :, slots] = truth[there, layer]
        exchange = ContextExchange(group, chunks, tables, BLOCK, torch.device("cpu"))
        exchange.bring_beginnings(kv)
        for layer in range(LAYERS):
            for chunk, table, truth in zip(chunks, tables, truths, strict=True):
                own = torch.from_numpy(chunk.positions(group.rank))
                blocks, slots = places(table, own)
                kv[blocks, layer, :, :, slots] = truth[own, layer]
            exchange.share(kv, layer)
        found = []
        for chunk, table in zip(chunks, tables, strict=True):
            blocks, slots = places(table, torch.arange(chunk.end))
            found.append(torch.stack([kv[blocks, layer, :, :, slots] for layer in range(LAYERS)], dim=1))
        return found

    with RankThreads(ranks) as threads:
        for found in threads.all(work):
            for one, truth in zip(found, truths, strict=True):
                torch.testing.assert_close(one, truth, rtol=0, atol=0)
