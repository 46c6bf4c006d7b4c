"""Ranks with experts as threads of one process: real collectives, real weights, tiny sizes, routers that tests draw.

`ExpertThreads.each` runs the same work on every rank at the same time. `lost` closes a rank's groups without a word, as
the end of its process would.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from penstock.kernels import ops
from penstock.kernels.packing import PackedExperts
from penstock.workers.errors import GroupError
from penstock.workers.parallel.collectives import Collectives
from penstock.workers.parallel.expert_parallel import ExpertParallel, ExpertPolicy, ExpertRank, Meet
from penstock.workers.parallel.expert_weights import ExpertShape, HostExperts
from penstock.workers.parallel.process_group import GroupPlace, join_store, open_group, serve_store

TIMEOUT_S = 20.0
SHAPE = ExpertShape(num_layers=2, num_experts=8, width=24, inputs=32, dtype=torch.float32)


def all_weights(shape: ExpertShape = SHAPE, seed: int = 0) -> HostExperts:
    """Every expert of a random model, of sizes that keep activations near one."""
    chance = torch.Generator().manual_seed(seed)
    weights = HostExperts()
    for layer, expert in itertools.product(range(shape.num_layers), range(shape.num_experts)):
        gate_up = torch.randn(2 * shape.width, shape.inputs, generator=chance) * shape.inputs**-0.5
        down = torch.randn(shape.inputs, shape.width, generator=chance) * shape.width**-0.5
        weights.add(layer, expert, gate_up.to(shape.dtype), down.to(shape.dtype))
    return weights


def packed_layers(shape: ExpertShape, weights: HostExperts) -> list[PackedExperts]:
    """Every layer whole, for one rank that holds everything."""
    layers = []
    for layer in range(shape.num_layers):
        pairs = [weights.read(layer, expert) for expert in range(shape.num_experts)]
        layers.append(
            ops.pack_experts(torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs]))
        )
    return layers


def routed(chance: torch.Generator, tokens: int, chosen: int, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct experts per token drawn by `shares` [E], and gates that add up to one."""
    if not tokens:
        return torch.empty(0, chosen, dtype=torch.int64), torch.empty(0, chosen)
    ids = torch.multinomial(shares.expand(tokens, -1), chosen, generator=chance)
    return ids, torch.rand(tokens, chosen, generator=chance).softmax(dim=-1)


class ExpertThreads:
    """`num_ranks` ranks; `sources` gives what each can read from its host's memory (default: everything)."""

    def __init__(
        self,
        num_ranks: int,
        policy: ExpertPolicy,
        shape: ExpertShape = SHAPE,
        sources: Callable[[int], HostExperts] | None = None,
    ) -> None:
        self.num_ranks, self.shape, self.policy = num_ranks, shape, policy
        self._weights = all_weights(shape)
        self.whole = packed_layers(shape, self._weights)
        self._sources = sources or (lambda _: self._weights)
        self._threads = [ThreadPoolExecutor(1, f"rank-{rank}") for rank in range(num_ranks)]
        self._store, self._address = serve_store("127.0.0.1", TIMEOUT_S)
        self.ranks: dict[int, ExpertParallel] = {}
        self.each(lambda rank: self.ranks.update({rank: self._make(rank, joins=False)}))
        self.each(lambda rank: self.ranks[rank].regroup(tuple(range(num_ranks)), 0))

    def each(self, work: Callable[[int], Any], ranks: tuple[int, ...] | None = None) -> list[Any]:
        """`work(rank)` everywhere at once; the results, or the first rank's error after all have ended."""
        running = [self._threads[rank].submit(work, rank) for rank in (ranks or range(self.num_ranks))]
        for each in running:
            each.exception(TIMEOUT_S)
        return [each.result() for each in running]

    def regroup(self, members: tuple[int, ...], epoch: int, joins: tuple[int, ...] = ()) -> None:
        for rank in joins:
            self.ranks[rank] = self._make(rank, joins=True)
        self.each(lambda rank: self.ranks[rank].regroup(members, epoch), members)

    def lose(self, rank: int) -> None:
        self.ranks.pop(rank).close()

    def close(self) -> None:
        for experts in self.ranks.values():
            experts.close()
        for thread in self._threads:
            thread.shutdown()

    def _make(self, rank: int, joins: bool) -> ExpertParallel:
        meet = store_meeting(self._store if rank == 0 else join_store(self._address, TIMEOUT_S), TIMEOUT_S)
        who = ExpertRank(rank, self.num_ranks, joins)
        return ExpertParallel(who, self.shape, self._sources(rank), self.policy, meet)


def store_meeting(store: Store, timeout_s: float) -> Meet:
    """What ranks on one store are given to meet each other."""

    def meet(name: str, rank: int, width: int, beside_steps: bool) -> Collectives:
        place = GroupPlace(name, rank, width, timeout_s=timeout_s, share_memory=not beside_steps)
        return open_group(place, store)

    return meet


def fails_with_group_error(work: Callable[[], Any]) -> bool:
    with contextlib.suppress(GroupError):
        work()
        return False
    return True
