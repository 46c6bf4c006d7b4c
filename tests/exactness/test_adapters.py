"""Greedy output of requests with low-rank adapters, many in one batch, against transformers with the merged weights.

Three adapters of different ranks, targets and stored dtypes, and the model alone, all at the same time, where a worker
can compute with two adapters at a time; split and mixed, in chunks, with sequences that give way, planned ahead.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.adapters import make_adapter
from fakes.exactness import CheckpointSpec, covering_specs, expert_specs, family_specs, mixed_prompts
from fakes.roaming import while_roaming
from fakes.sharded_specs import sharded_specs
from fakes.threaded_cluster import ThreadedCluster
from fakes.variants import BLOCK_SIZE, Variant

from penstock.cluster.local import LocalCluster
from penstock.router.settings import AdmissionSettings, PlacementSettings, RouterSettings
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.lora.adapter_files import read_adapter
from penstock.workers.lora.projections import adaptable
from penstock.workers.lora.weights import host_adapter
from penstock.workers.model.config import read_config
from penstock.workers.protocol import GenerateRequest, SamplingParams, Tokens
from penstock.workers.settings import AdapterSettings, GroupSettings, WorkerSettings

MAX_RANK = 8
TOKENS = 24
VARIANTS = (
    Variant(split=True, chunk=16, caching=True, preempt=True),
    Variant(split=False, chunk=64, caching=True, preempt=False),
    Variant(split=True, chunk=0, caching=True, preempt=False, transport="tcp"),
    Variant(split=True, chunk=16, caching=True, preempt=True, ahead=True),
)
MODELS = (covering_specs()[0], covering_specs()[7], family_specs()[0], expert_specs()[0])


@pytest.mark.parametrize(
    ("spec", "variant"),
    [*zip(MODELS, VARIANTS, strict=True)]
    + [pytest.param(spec, variant, marks=pytest.mark.slow) for spec in MODELS for variant in VARIANTS],
    ids=lambda value: value.name if isinstance(value, CheckpointSpec) else str(value),
)
def test_every_adapter_says_what_the_merged_model_says(
    checkpoint: Callable[[CheckpointSpec], Any], tmp_path: Path, spec: CheckpointSpec, variant: Variant
) -> None:
    model = checkpoint(spec)
    refs = [None, *adapters_of(tmp_path, model.directory)]
    prompts = mixed_prompts(spec.vocab, 40)
    requests = [asked(f"a{i}", prompt, refs[i % 4]) for i, prompt in enumerate(prompts)]
    answers = asyncio.run(_run(model.directory, tmp_path, variant, requests))
    judge_all(model, tmp_path, refs, prompts, [answer.tokens for answer in answers])


@pytest.mark.timeout(120)
def test_sequences_with_adapters_roam(checkpoint: Callable[[CheckpointSpec], Any], tmp_path: Path) -> None:
    """They go on at another worker with their KV, again and again; each has a place less than there are adapters."""
    model = checkpoint(MODELS[0])
    refs = [None, *adapters_of(tmp_path, model.directory)]
    prompts = mixed_prompts(model.spec.vocab, 12)
    (mixed,) = Variant(split=False, chunk=64, caching=True, preempt=False).workers(model.directory)
    adapters = AdapterSettings(str(tmp_path), max_loaded=2, max_rank=MAX_RANK)
    workers = [replace(mixed, worker_id=f"mixed-{number}", adapters=adapters) for number in range(3)]

    async def scenario() -> list[list[int]]:
        outputs: list[list[int]] = []
        async with ThreadedCluster(workers, VARIANTS[0].router) as cluster:
            moves = 0
            while moves <= len(prompts):
                requests = [asked(f"{len(outputs)}-{i}", prompt, refs[i % 4]) for i, prompt in enumerate(prompts)]
                found = await while_roaming(cluster.generator.router, cluster.generate(requests))
                outputs += [answer.tokens for answer in found]
                moves = sum(report.live_moves for report in cluster.reports)
            assert sum(report.recomputed_tokens + report.migrations for report in cluster.reports) == 0
        return outputs

    outputs = asyncio.run(asyncio.wait_for(scenario(), 100.0))
    judge_all(model, tmp_path, refs, prompts, outputs[: len(prompts)])
    assert outputs == outputs[: len(prompts)] * (len(outputs) // len(prompts))


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "widths",
    [(2, 1), *(pytest.param(widths, marks=pytest.mark.slow) for widths in ((1, 2), (2, 4), (4, 2)))],
    ids=lambda widths: "to".join(map(str, widths)),
)
def test_ranks_that_share_the_layers_share_the_adapters(
    checkpoint: Callable[[CheckpointSpec], Any], tmp_path: Path, widths: tuple[int, int]
) -> None:
    """Prefill and decode groups of these widths, each rank a process; rank 0 alone reads the adapters' files."""
    spec = sharded_specs()[0]
    model = checkpoint(spec)
    refs = [None, *adapters_of(tmp_path, model.directory)]
    prompts = mixed_prompts(spec.vocab, 12)
    requests = [asked(f"a{i}", prompt, refs[i % 4]) for i, prompt in enumerate(prompts)]
    workers = [
        replace(settings, adapters=AdapterSettings(str(tmp_path), max_loaded=2, max_rank=MAX_RANK), group=group)
        for settings, group in zip(
            Variant(split=True, chunk=64, caching=True, preempt=False).workers(model.directory),
            (GroupSettings(tensor_parallel_size=width, start_timeout_s=90.0) for width in widths),
            strict=True,
        )
    ]
    log_file = tmp_path / "log"
    try:
        outputs = asyncio.run(asyncio.wait_for(_run_processes(workers, requests, log_file), 100.0))
    except BaseException as error:
        error.add_note(log_file.read_text()[-6000:] if log_file.exists() else "no log")
        raise
    judge_all(model, tmp_path, refs, prompts, outputs)


async def _run_processes(
    workers: list[WorkerSettings], requests: list[GenerateRequest], log_file: Path
) -> list[list[int]]:
    router = RouterSettings(PlacementSettings(local_prefill_tokens=0), AdmissionSettings(ttft_target_s=120.0))
    async with LocalCluster(workers, router, log_file=log_file, restart=False) as cluster:

        async def ask(request: GenerateRequest) -> list[int]:
            return [token async for delta in cluster.generator.submit(request) for token in delta.tokens]

        return list(await asyncio.gather(*map(ask, requests)))


def judge_all(
    model: Any, home: Path, refs: list[AdapterRef | None], prompts: list[Tokens], outputs: list[list[int]]
) -> None:
    """Prompt i was asked of `refs[i % len(refs)]`; AssertionError unless each said what it has to."""
    for number, ref in enumerate(refs):
        mine = prompts[number :: len(refs)], outputs[number :: len(refs)]
        judge = model.reference if ref is None else merged(model.reference, model.directory, home, ref)
        verdict = judge.judge(*mine)
        model.verdicts.append(verdict)
        assert verdict.steps == len(mine[0]) * TOKENS
        verdict.require_exact()
        if ref is not None:  # and it is not what the model alone says
            assert model.reference.judge(*mine).wrong


def adapters_of(home: Path, model_dir: Path) -> list[AdapterRef]:
    """Three of this model: all projections; two projections of one layer; attention alone, stored in half the bytes."""
    config = read_config(model_dir)
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    make_adapter(home / "all", config, rank=8, alpha=4, seed=1)
    make_adapter(home / "some", config, rank=3, alpha=5, seed=2, modules=("q_proj", "v_proj"), layers=(1,))
    stabilised = {"use_rslora": True}
    make_adapter(home / "half", config, rank=4, alpha=2, seed=3, modules=attention, dtype="BF16", more=stabilised)
    places = adaptable(config)
    return [
        AdapterRef(name, name, read_adapter(home, name, places, MAX_RANK).revision) for name in ("all", "some", "half")
    ]


def asked(name: str, prompt: Tokens, ref: AdapterRef | None) -> GenerateRequest:
    """As the HTTP front makes it: what is cached for one adapter is of no use to another."""
    root = b"\7" * 32 if ref is None else ref.revision
    digests = chain_digests(root, prompt, BLOCK_SIZE)
    return GenerateRequest(name, prompt, SamplingParams(TOKENS), prefix_root=root, prefix_digests=digests, adapter=ref)


def merged(reference: Any, model_dir: Path, home: Path, ref: AdapterRef) -> Any:
    """The judge with the adapter added to its weights, in float64."""
    judge = copy.copy(reference)
    judge.model = copy.deepcopy(reference.model)
    config = read_config(model_dir)
    loaded = host_adapter(read_adapter(home, ref.folder, adaptable(config), MAX_RANK))
    layers = judge.model.model.layers
    for (layer, name), update in loaded.updates.items():
        block = layers[layer].mlp if name in ("gate_proj", "up_proj", "down_proj") else layers[layer].self_attn
        weight = getattr(block, name).weight
        weight.data += update.scale * (update.b.to(weight) @ update.a.to(weight))
    return judge


async def _run(model_dir: Path, home: Path, variant: Variant, requests: list[GenerateRequest]) -> Any:
    adapters = AdapterSettings(str(home), max_loaded=2, max_rank=MAX_RANK)
    workers = [replace(settings, adapters=adapters) for settings in variant.workers(model_dir)]
    async with ThreadedCluster(workers, variant.router) as cluster, asyncio.timeout(90.0):
        answers = await cluster.generate(requests)
        for hosted in cluster.workers.values():
            totals = hosted.worker._engine.load().totals.adapters
            assert totals.failed == 0
            assert totals.loaded == 3
            assert totals.placed > 2  # they took turns
    return answers
