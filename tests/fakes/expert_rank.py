"""One rank with experts as a process: streams of tokens from a tiny model whose experts lie on several ranks.

`python expert_rank.py` reads one line of JSON (`ExpertRun`). Streams belong to the members in turn; every rank hears of
every token after each step, as rank 0 of a real group does, so that streams of a lost rank go on elsewhere. Steps are
paced by sleep. Rank 0 prints a line per step, and all tokens at the end; every rank ends by itself.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.expert_group import all_weights, packed_layers

from penstock.kernels import ops
from penstock.workers.errors import GroupError
from penstock.workers.parallel.expert_load import skew
from penstock.workers.parallel.expert_membership import (
    LocalProcesses,
    Membership,
    store_meeting,
    survive,
)
from penstock.workers.parallel.expert_parallel import ExpertParallel, ExpertPolicy, ExpertRank
from penstock.workers.parallel.expert_planner import PlacementLimits
from penstock.workers.parallel.expert_weights import ExpertShape, HostExperts
from penstock.workers.parallel.process_group import join_store, serve_store

VOCABULARY, CHOSEN = 97, 2
START_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class ExpertRun:
    rank: int
    num_ranks: int
    address: str  # of rank 0's store; rank 0 prints it
    streams: int
    steps: int
    step_s: float = 0.004  # of every layer
    experts: int = 8
    slots: int = 4
    least_copies: int = 2
    rebalance_steps: int = 0
    timeout_s: float = 10.0
    grace_s: float = 5.0
    power: float = 0.0  # of the router's favour for low expert numbers

    @property
    def shape(self) -> ExpertShape:
        return ExpertShape(2, self.experts, 24, 32, torch.float32)


class StreamModel:
    """Embedding, experts and head, all drawn from one seed."""

    def __init__(self, run: ExpertRun) -> None:
        chance = torch.Generator().manual_seed(7)
        shape = run.shape
        self.embedding = torch.randn(VOCABULARY, shape.inputs, generator=chance)
        self.positions = torch.randn(run.steps + 1, shape.inputs, generator=chance)
        self.routers = torch.randn(shape.num_layers, shape.num_experts, shape.inputs, generator=chance)
        self.head = torch.randn(VOCABULARY, shape.inputs, generator=chance)
        # Favour by a power law of the expert's number, on top of what tokens choose.
        self.favour = -run.power * torch.arange(1, shape.num_experts + 1).float().log()

    def next_tokens(self, tokens: Tensor, step: int, expert_layer: Any) -> Tensor:
        x = self.embedding[tokens] + self.positions[step]
        for layer, router in enumerate(self.routers):
            # In double precision, lest a choice hang on how many rows are multiplied at once.
            logits = x.double() @ router.double().t() * 0.2 + self.favour
            ids, gates = ops.route_experts(logits.float(), CHOSEN)
            x = x + expert_layer(layer, x, ids, gates)
        return (x.double() @ self.head.double().t()).argmax(dim=-1)


def undisturbed(run: ExpertRun) -> list[list[int]]:
    """Tokens [step][stream] of one rank that holds everything."""
    model, layers = StreamModel(run), packed_layers(run.shape, all_weights(run.shape))

    def whole(layer: int, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return ops.fused_moe(x, layers[layer], ids, gates)

    history = [list(range(run.streams))]
    for step in range(run.steps):
        tokens = torch.tensor(history[-1]) % VOCABULARY
        history.append(model.next_tokens(tokens, step, whole).tolist())
    return history


class Rank:
    def __init__(self, run: ExpertRun) -> None:
        self.run, self.model = run, StreamModel(run)
        if run.rank == 0:
            self.store, address = serve_store("127.0.0.1", START_TIMEOUT_S)
            say(address=address)
        else:
            self.store = join_store(run.address, START_TIMEOUT_S)
        LocalProcesses.introduce(self.store, run.rank)
        lives = LocalProcesses(self.store, run.num_ranks)
        self.membership = Membership(self.store, run.rank, run.grace_s, lives.alive)
        self.meet = store_meeting(self.store, "127.0.0.1", run.timeout_s)
        limits = PlacementLimits(run.slots, run.least_copies)
        policy = ExpertPolicy(limits, run.rebalance_steps, half_life_steps=40.0)
        who = ExpertRank(run.rank, run.num_ranks)
        self.experts = ExpertParallel(who, run.shape, self.sources(), policy, self.meet)
        self.history = [list(range(run.streams))]
        self.experts.regroup(tuple(range(run.num_ranks)), 0)
        self.agree_on_step()

    def sources(self) -> HostExperts:
        return all_weights(self.run.shape)

    def agree_on_step(self) -> None:
        """Some may have heard of the last step's end, others not: it is run again."""
        ended = self.experts._group.all_gather(torch.tensor([len(self.history)]))
        del self.history[int(ended.min()) :]

    def work(self) -> float:
        longest, last = 0.0, time.monotonic()
        while len(self.history) <= self.run.steps:
            try:
                self.step()
            except GroupError as error:
                print(f"rank {self.run.rank}: {error}", file=sys.stderr, flush=True)
                survive(self.experts, self.membership)
                self.agree_on_step()
                continue
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            if self.run.rank == 0:
                say(step=len(self.history) - 1, skew=skew(self.experts.rank_rows()), at=now)
        return longest

    def step(self) -> None:
        members, step = self.experts.members, len(self.history) - 1
        own = [stream for stream in range(self.run.streams) if members[stream % len(members)] == self.run.rank]
        self.experts.begin_step(step)
        tokens = torch.tensor([self.history[-1][stream] for stream in own], dtype=torch.int64) % VOCABULARY
        made = self.model.next_tokens(tokens, step, self.layer)
        everyone = torch.zeros(self.run.streams, dtype=torch.int64)
        everyone[own] = made
        heard = self.experts._group.all_reduce(everyone).tolist()
        self.experts.end_step()
        self.history.append(heard)

    def layer(self, layer: int, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        time.sleep(self.run.step_s)
        return self.experts.forward(layer, x, ids, gates)


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    run = ExpertRun(**json.loads(sys.stdin.readline()))
    rank = Rank(run)
    longest = rank.work()
    placement = rank.experts.placement
    copies = int(placement.holders().sum(axis=2).min())
    if run.rank == 0:
        say(history=rank.history, stall_s=longest, generation=placement.generation, copies=copies)
    rank.experts.close()
    # Whoever serves the store leaves last.
    rank.store.set(f"left/{run.rank}", "1")
    if run.rank == 0:
        for member in rank.experts.members:
            rank.store.get(f"left/{member}")


def as_line(run: ExpertRun) -> str:
    return json.dumps(dataclasses.asdict(run)) + "\n"


if __name__ == "__main__":
    main()
