"""Groups of ranks as real processes, against transformers: tensor and expert ranks, and pools of different widths.

Every rank is a process of its own, as in production; KV travels rank to rank, cut anew where the widths differ.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from fakes.exactness import CheckpointSpec, mixed_prompts
from fakes.in_ci import every
from fakes.roaming import while_roaming
from fakes.sharded_specs import sharded_specs
from fakes.variants import BLOCK_SIZE, KEY, MAX_MODEL_LEN, ROOT

from penstock.cluster.local import LocalCluster
from penstock.router.journey import RequestReport
from penstock.router.settings import AdmissionSettings, PlacementSettings, RouterSettings
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams, Tokens
from penstock.workers.settings import (
    GroupSettings,
    KVSettings,
    RunnerSettings,
    SchedulerSettings,
    TransferSettings,
    WorkerSettings,
)

SPECS = {spec.family: spec for spec in reversed(sharded_specs())}
WITH_EXPERTS = ("qwen3-moe", "mixtral", "qwen2-moe", "deepseek-v2", "deepseek-v3")
TOKENS = 16
pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True)
class Plant:
    """Pairs are (tensor ranks, attention ranks) of `mixed` alone, or of prefill and decode; a number is tensor ranks.

    Attention ranks share the experts of models that have some, and long prompts of others. `chunk`: most prompt tokens
    per step, 0 = all.
    """

    family: str
    mixed: tuple[int, int] = (0, 1)
    prefill: int | tuple[int, int] = 0
    decode: int | tuple[int, int] = 0
    transport: str = "auto"
    chunk: int = 64
    caching: bool = True
    preempt: bool = False

    def __str__(self) -> str:
        where = f"{_name(self.prefill)}to{_name(self.decode)}" if self.prefill else _name(self.mixed)
        words = [self.family, where, self.transport, f"chunk{self.chunk or '-none'}"]
        return "-".join(words + ["cache"] * self.caching + ["preempt"] * self.preempt)

    def workers(self, model_dir: Any) -> list[WorkerSettings]:
        if not self.prefill:
            return [self.worker(model_dir, Role.MIXED, *self.mixed)]
        prefill, decode = _pair(self.prefill), _pair(self.decode)
        return [self.worker(model_dir, Role.PREFILL, *prefill), self.worker(model_dir, Role.DECODE, *decode)]

    def worker(self, model_dir: Any, role: Role, tensor: int, attention: int) -> WorkerSettings:
        spreads = SPECS[self.family].family in WITH_EXPERTS
        experts, context = (attention, 1) if spreads else (1, attention)
        blocks = 24 if self.preempt and role is not Role.PREFILL else 512
        return WorkerSettings(
            worker_id=f"{role.value}-0",
            role=role,
            cluster_key=KEY,
            scheduler=SchedulerSettings(
                max_num_seqs=32,
                max_num_batched_tokens=self.chunk + 32 if self.chunk else 8192,
                long_prefill_token_threshold=self.chunk,
                max_model_len=MAX_MODEL_LEN,
                reserve_tokens=0 if self.preempt else MAX_MODEL_LEN,
                watermark=0.0 if self.preempt else 0.01,
            ),
            kv=KVSettings(block_size=BLOCK_SIZE, num_blocks=blocks, prefix_caching=self.caching),
            transfer=TransferSettings(transport=self.transport, digest="full"),
            runner=RunnerSettings(model_dir=str(model_dir), dtype="float32", threads=1),
            group=GroupSettings(
                tensor,
                experts,
                context,
                context_parallel_threshold=48,
                redundant_experts=1 if experts > 1 else 0,
                start_timeout_s=90.0,
            ),
        )


def _pair(ranks: int | tuple[int, int]) -> tuple[int, int]:
    return (ranks, 1) if isinstance(ranks, int) else ranks


def _name(ranks: int | tuple[int, int]) -> str:
    return str(ranks) if isinstance(ranks, int) else "x".join(map(str, ranks))


IN_CI = [
    Plant("llama", prefill=2, decode=1, transport="tcp"),
    Plant("qwen3-moe", mixed=(1, 2)),
    Plant("llama", prefill=(1, 2), decode=(2, 1), transport="shared_memory", chunk=0),
]
OTHERS = [
    Plant("llama", prefill=1, decode=2, transport="shared_memory", chunk=16, preempt=True),
    Plant("qwen3", prefill=2, decode=4, transport="tcp", chunk=0, caching=False),
    Plant("gemma3", prefill=4, decode=2, transport="shared_memory", chunk=16),
    Plant("mistral", prefill=4, decode=1, transport="tcp", caching=False, preempt=True),
    Plant("qwen2", prefill=2, decode=2, transport="auto", chunk=0, preempt=True),
    Plant("deepseek-v3", prefill=1, decode=2, transport="tcp", chunk=16),
    Plant("deepseek-v2", prefill=2, decode=1, transport="shared_memory", caching=False),
    Plant("qwen2-moe", prefill=2, decode=4, transport="shared_memory"),
    Plant("mixtral", mixed=(2, 1), chunk=0),
    Plant("mixtral", mixed=(2, 2), chunk=16, preempt=True),
    Plant("deepseek-v2", mixed=(1, 4)),
    Plant("qwen3-moe", prefill=(1, 2), decode=(1, 2), transport="tcp", chunk=16),
    Plant("mixtral", prefill=(2, 2), decode=(1, 2), transport="shared_memory", preempt=True),
    Plant("deepseek-v3", prefill=2, decode=(1, 2), transport="tcp", chunk=0, caching=False),
    Plant("gemma2", prefill=(1, 3), decode=(1, 1), transport="tcp", chunk=0),
    Plant("deepseek-v3", mixed=(2, 2), chunk=0, caching=False),
]


def request(name: str, prompt: Tokens) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=TOKENS)
    digests = chain_digests(ROOT, prompt, BLOCK_SIZE)
    return GenerateRequest(name, prompt, sampling, prefix_root=ROOT, prefix_digests=digests)


async def answers(
    plant: Plant, model_dir: Any, prompts: Sequence[Tokens], log_file: Any, more: int = 0
) -> list[list[list[int]]]:
    """Of two rounds; the second finds the first one's prefixes, and goes on with `more` tokens where there are some."""
    router = RouterSettings(PlacementSettings(local_prefill_tokens=0), AdmissionSettings(ttft_target_s=120.0))
    async with LocalCluster(plant.workers(model_dir), router, log_file=log_file, restart=False) as cluster:

        async def ask(name: str, prompt: Tokens) -> list[int]:
            return [token async for delta in cluster.generator.submit(request(name, prompt)) for token in delta.tokens]

        async def turn(number: int, every: Sequence[Tokens]) -> list[list[int]]:
            return list(await asyncio.gather(*(ask(f"{number}-{n}", prompt) for n, prompt in enumerate(every))))

        first = await turn(0, prompts)
        return [first, await turn(1, follow_ups(prompts, first, more) if more else prompts)]


def follow_ups(prompts: Sequence[Tokens], outputs: Sequence[Sequence[int]], more: int) -> list[Tokens]:
    """What was asked and answered, and `more` tokens behind it."""
    return [(*prompt, *output, *prompt[:more]) for prompt, output in zip(prompts, outputs, strict=True)]


def run(plant: Plant, checkpoint: Callable[[CheckpointSpec], Any], log_file: Any, count: int, more: int = 0) -> None:
    model = checkpoint(SPECS[plant.family])
    prompts = mixed_prompts(model.spec.vocab, count)
    if more:
        prompts = [(prompt * 100)[:100] for prompt in prompts]
    try:
        first, second = asyncio.run(asyncio.wait_for(answers(plant, model.directory, prompts, log_file, more), 100.0))
    except BaseException as error:
        error.add_note(log_file.read_text()[-6000:] if log_file.exists() else "no log")
        raise
    model.require_exact(prompts, first)
    if more:
        model.require_exact(follow_ups(prompts, first, more), second)
    else:
        assert second == first


@pytest.mark.parametrize("plant", every(4, IN_CI), ids=str)
def test_a_group_is_exact(plant: Plant, checkpoint: Any, tmp_path: Any) -> None:
    run(plant, checkpoint, tmp_path / "log", count=12)


@pytest.mark.slow
def test_conversations_go_on_over_context_ranks(checkpoint: Any, tmp_path: Any) -> None:
    """Whole prompts, and then what is new behind a beginning that one rank has in its cache, over both ranks."""
    run(Plant("llama", mixed=(1, 2), chunk=0), checkpoint, tmp_path / "log", count=6, more=60)


@pytest.mark.slow
def test_running_sequences_move_between_groups_of_one_and_two_ranks(checkpoint: Any, tmp_path: Any) -> None:
    """Their KV is cut anew on the way, again and again: 1 to 2 ranks, 2 to 1, and 2 to 2."""
    model = checkpoint(SPECS["llama"])
    prompts = mixed_prompts(model.spec.vocab, 8)
    widths = (1, 2, 2)
    plants = [Plant("llama", mixed=(width, 1), transport="tcp") for width in widths]
    workers = [
        replace(plant.worker(model.directory, Role.MIXED, *plant.mixed), worker_id=f"mixed-{n}")
        for n, plant in enumerate(plants)
    ]
    reports: list[RequestReport] = []
    router = RouterSettings(admission=AdmissionSettings(ttft_target_s=120.0))
    log_file = tmp_path / "log"
    ways: set[tuple[int, int]] = set()

    async def scenario() -> list[list[int]]:
        async with LocalCluster(workers, router, log_file=log_file, restart=False, observe=reports.append) as cluster:

            async def ask(number: int, prompt: Tokens) -> list[int]:
                asked = replace(request(str(number), prompt), sampling=SamplingParams(max_tokens=64))
                return [token async for delta in cluster.generator.submit(asked) for token in delta.tokens]

            running = asyncio.gather(*(ask(n, prompt) for n, prompt in enumerate(prompts)))
            return list(await while_roaming(cluster.generator.router, running))

    outputs = asyncio.run(asyncio.wait_for(scenario(), 120.0))
    for report in reports:
        passed = [widths[int(str(attempt.decode)[-1])] for attempt in report.trail.attempts]
        ways |= set(itertools.pairwise(passed))
    print(f"{sum(report.live_moves for report in reports)} moves, {sorted(ways)}")
    model.require_exact(prompts, outputs)
    assert ways == {(1, 2), (2, 1), (2, 2)}
    assert sum(report.recomputed_tokens + report.migrations for report in reports) == 0


@pytest.mark.slow
@pytest.mark.parametrize("plant", OTHERS, ids=str)
def test_every_kind_of_group_is_exact(plant: Plant, checkpoint: Any, tmp_path: Any) -> None:
    run(plant, checkpoint, tmp_path / "log", count=24)


def test_the_plants_cover_what_they_should() -> None:
    plants = [*IN_CI, *OTHERS]
    splits = {(plant.prefill, plant.decode) for plant in plants if plant.prefill}
    assert splits >= {(1, 2), (2, 1), (2, 4), (4, 2), (4, 1)}
    assert {plant.mixed for plant in plants if not plant.prefill} >= {(2, 1), (1, 2), (2, 2), (1, 4)}
    assert {plant.transport for plant in plants if plant.prefill} == {"tcp", "shared_memory", "auto"}
    families = {plant.family for plant in plants}
    assert families >= {"mixtral", "qwen2-moe", "qwen3-moe", "deepseek-v2", "deepseek-v3"}
