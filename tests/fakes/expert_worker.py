"""Live workers whose ranks share experts: a small checkpoint, settings, and streams that remember what came and when.

The fault tests and the survival benchmark use it. Texts are compared with those of one undisturbed worker of one rank.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fakes.exactness import CheckpointSpec, make_checkpoint
from safetensors.torch import load_file, save_file

from penstock.cluster.local import LocalCluster
from penstock.cluster.status import WorkerStatus
from penstock.workers.errors import PenstockError
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams, Tokens
from penstock.workers.settings import GroupSettings, KVSettings, RunnerSettings, SchedulerSettings, WorkerSettings

KEY = "ab" * 32
ROOT = b"\3" * 32
_FIRST_FEATURE = (3.5, 0.9)  # about, as the router of each layer sees it
VOCAB, EXPERTS, CHOSEN, BLOCK_SIZE, MAX_MODEL_LEN = 509, 8, 2, 16, 512


def expert_checkpoint(directory: Path, experts: int = EXPERTS, favour: float = 0.0) -> Path:
    """Two layers of experts. `favour`: tokens choose expert e in proportion to about (e + 1) ** -favour."""
    changes = {"num_experts": experts, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": 64}
    spec = CheckpointSpec("qwen3-moe", 4, 2, 32, hidden=64, vocab=VOCAB, std=0.2, seed=11, changes=json.dumps(changes))
    make_checkpoint(directory, spec)
    if favour:
        _favour(directory / "model.safetensors", favour)
    return directory


def _favour(weights: Path, power: float) -> None:
    """Routers of this family have no bias: the first feature, much the same in all hidden states now, stands for it."""
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][:, 0] = 2.0
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[0] = 0.0  # nothing is added to that feature, and nobody but routers reads it
        elif name.endswith(("_proj.weight", "lm_head.weight")):
            tensor[:, 0] = 0.0
        if name.endswith("mlp.gate.weight"):
            feature = _FIRST_FEATURE[int(name.split("layers.")[1].split(".")[0])]
            tensor[:, 0] = -power * torch.arange(1, len(tensor) + 1).float().log() / feature
    save_file(tensors, weights, metadata={"format": "pt"})


def expert_worker(model_dir: Path, ranks: int, role: Role = Role.MIXED, **group: Any) -> WorkerSettings:
    """Rank 0's settings of one worker; by default every expert has two copies where there are ranks for them."""
    spare = EXPERTS // ranks if ranks > 1 else 0
    return WorkerSettings(
        worker_id=f"{role.value}-0",
        role=role,
        cluster_key=KEY,
        scheduler=SchedulerSettings(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=MAX_MODEL_LEN),
        kv=KVSettings(block_size=BLOCK_SIZE, num_blocks=256),
        runner=RunnerSettings(model_dir=str(model_dir), dtype="float32", threads=1),
        group=GroupSettings(
            **{
                "expert_parallel_size": ranks,
                "redundant_experts": spare,
                "expert_rebalance_steps": 0,
                "start_timeout_s": 60.0,
                **group,
            }
        ),
    )


def expert_request(number: int, output_tokens: int, seed: int = 0, *, sampled: bool = False) -> GenerateRequest:
    """Every other one is sampled, or all: greedy ones of so small a model soon repeat themselves."""
    chance = random.Random(f"{seed}/{number}")
    prompt = tuple(chance.randrange(VOCAB) for _ in range(8 + number % 40))
    temperature = 1.0 if sampled else float(number % 2)
    sampling = SamplingParams(max_tokens=output_tokens, temperature=temperature, seed=number * 7919 + 1)
    digests = chain_digests(ROOT, prompt, BLOCK_SIZE)
    return GenerateRequest(f"r{seed}-{number}", prompt, sampling, prefix_root=ROOT, prefix_digests=digests)


@dataclass
class Answers:
    """What came of some requests."""

    texts: list[Tokens] = field(default_factory=list)
    failed: list[PenstockError] = field(default_factory=list)
    tokens: int = 0
    longest_gap_s: float = 0.0  # between two tokens of one stream

    def wrong(self, wanted: Sequence[Tokens]) -> int:
        """Texts that are not those."""
        return sum(got != want for got, want in zip(self.texts, wanted, strict=True))


class Streams:
    """Requests under way at one cluster."""

    def __init__(self, cluster: LocalCluster, requests: Sequence[GenerateRequest]) -> None:
        self.answers = Answers([()] * len(requests))
        self._cluster = cluster
        self._news = asyncio.Event()
        streams = [self._one(number, request) for number, request in enumerate(requests)]
        self._running = asyncio.gather(*streams)

    async def until_tokens(self, count: int, timeout_s: float = 30.0) -> None:
        """Returns once so many tokens have come over all streams."""
        async with asyncio.timeout(timeout_s):
            while self.answers.tokens < count:
                self._news.clear()
                await self._news.wait()

    async def ended(self, timeout_s: float = 60.0) -> Answers:
        """All have."""
        await asyncio.wait_for(self._running, timeout_s)
        return self.answers

    async def _one(self, number: int, request: GenerateRequest) -> None:
        answers, last = self.answers, 0.0
        try:
            async for delta in self._cluster.generator.submit(request):
                now = time.monotonic()
                answers.longest_gap_s = max(answers.longest_gap_s, now - last if last else 0.0)
                last = now
                answers.texts[number] += tuple(delta.tokens)
                answers.tokens += len(delta.tokens)
                self._news.set()
        except PenstockError as error:
            answers.failed.append(error)


async def undisturbed(model_dir: Path, waves: Sequence[Sequence[GenerateRequest]], log: Path) -> list[list[Tokens]]:
    """The texts of one worker of one rank, for each wave of requests."""
    async with LocalCluster([expert_worker(model_dir, 1)], log_file=log, restart=False) as cluster:
        answers = [await Streams(cluster, wave).ended() for wave in waves]
    assert not any(each.failed for each in answers)
    return [each.texts for each in answers]


async def until_status(cluster: LocalCluster, ready: Any, timeout_s: float = 20.0) -> WorkerStatus:
    """The first worker's status, once `ready` is true of it."""
    async with asyncio.timeout(timeout_s):
        while not ready(status := cluster.fleet.workers()[0]):  # noqa: ASYNC110 - a heartbeat sets no event of ours
            await asyncio.sleep(0.02)
    return status
