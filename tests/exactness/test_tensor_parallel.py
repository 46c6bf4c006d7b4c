"""Tensor-parallel groups of every width against transformers, and against each other where tokens are drawn.

Ranks are threads that meet over the loopback interface, behind the real scheduler, pool and prefix cache; what is
computed is what processes compute (`test_ranks_that_are_processes`).
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.exactness import CheckpointSpec, mixed_prompts
from fakes.in_ci import every
from fakes.in_process import InProcessWorker
from fakes.rank_threads import GroupedRunner
from fakes.sampled import as_requests, edited_requests, fields
from fakes.sharded_specs import WIDTHS, Layout, all_layouts, covering_layouts, sharded_specs
from fakes.variants import uncovered_pairs

from penstock.workers.forward_pass import kv_view
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.settings import SchedulerSettings

SPECS = sharded_specs()
DENSE, SHARED_EXPERT = SPECS[0], SPECS[9]
MAX_MODEL_LEN = 256
TOKENS = 24

Checkpoints = Callable[[CheckpointSpec], Any]


def hosted(runner: GroupedRunner, layout: Layout, on_plan: Any = None) -> InProcessWorker:
    settings = SchedulerSettings(
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=layout.chunk or 8192,
        max_num_seqs=min(layout.chunk or 64, 64),
        reserve_tokens=0 if layout.preempt else MAX_MODEL_LEN,
        watermark=0.0 if layout.preempt else 0.01,
    )
    blocks = 20 if layout.preempt else 512
    grouped: Any = runner  # stands for all ranks' runners
    return InProcessWorker(
        grouped, num_blocks=blocks, prefix_caching=layout.caching, scheduler=settings, on_plan=on_plan
    )


def require_exact(model: Any, layout: Layout, count: int) -> None:
    prompts = mixed_prompts(model.spec.vocab, count)
    with GroupedRunner(model.directory, layout.width, max_model_len=MAX_MODEL_LEN) as runner:
        with hosted(runner, layout) as worker:
            outputs = [output.tokens for output in worker.greedy(prompts, TOKENS)]
            assert (worker.preemptions > 0) == layout.preempt
            if layout.caching:
                assert [output.tokens for output in worker.greedy(prompts, TOKENS)] == outputs
                assert worker.cached_tokens > 0
        model.require_exact(prompts, outputs)


@pytest.mark.parametrize(
    ("spec", "layout"), every(3, zip(SPECS, covering_layouts(), strict=True)), ids=lambda v: _id(v)
)
def test_every_family_in_one_layout(checkpoint: Checkpoints, spec: CheckpointSpec, layout: Layout) -> None:
    require_exact(checkpoint(spec), layout, count=20)


@pytest.mark.slow
@pytest.mark.parametrize("layout", all_layouts(), ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: _id(spec))
def test_every_family_in_every_layout(checkpoint: Checkpoints, spec: CheckpointSpec, layout: Layout) -> None:
    require_exact(checkpoint(spec), layout, count=40)


def test_the_cover_holds_every_pair() -> None:
    assert uncovered_pairs([layout.factors for layout in covering_layouts()]) == set()
    assert len({layout.factors for layout in all_layouts()}) == 36
    assert len({spec.family for spec in SPECS}) == 11


@pytest.mark.parametrize("spec", [DENSE, SHARED_EXPERT], ids=lambda spec: _id(spec))
def test_drawn_tokens_are_the_same_at_every_width(checkpoint: Checkpoints, spec: CheckpointSpec) -> None:
    model = checkpoint(spec)
    requests = as_requests(fields(spec.vocab)) + edited_requests(spec.vocab)
    layout = Layout(1, 64, caching=True, preempt=False)
    drawn = []
    for width in WIDTHS:
        with (
            GroupedRunner(model.directory, width, max_model_len=MAX_MODEL_LEN) as runner,
            hosted(runner, layout) as one,
        ):
            drawn.append([output.tokens for output in one.generate(requests)])
    assert drawn[1] == drawn[0]
    assert drawn[2] == drawn[0]


@pytest.mark.parametrize(("spec", "width"), [(DENSE, 4), (SHARED_EXPERT, 2)], ids=lambda v: _id(v))
def test_logprobs_of_tokens_and_prompts(checkpoint: Checkpoints, spec: CheckpointSpec, width: int) -> None:
    model, prompts = checkpoint(spec), mixed_prompts(spec.vocab, 6, longest=60)[2:]
    sampling = SamplingParams(max_tokens=6, logprobs=3, prompt_logprobs=0)
    requests = [GenerateRequest(f"p{n}", prompt, sampling, cache_prefix=False) for n, prompt in enumerate(prompts)]
    layout = Layout(width, 64, caching=False, preempt=False)
    with GroupedRunner(model.directory, width, max_model_len=MAX_MODEL_LEN) as runner, hosted(runner, layout) as worker:
        outputs = worker.generate(requests)
    truth = model.reference.logprobs(prompts, [output.tokens for output in outputs])
    whole = model.reference.logprobs([prompt[:1] for prompt in prompts], [prompt[1:] for prompt in prompts])
    for prompt, output, expected, behind in zip(prompts, outputs, truth, whole, strict=True):
        chosen = torch.tensor([logprob for logprob, _ in output.logprobs], dtype=torch.float64)
        right = expected.gather(1, torch.tensor(output.tokens)[:, None])[:, 0]
        assert float((chosen - right).abs().max()) < 1e-4
        assert output.scores is not None
        found = [score.logprob for score in output.scores.read() if score is not None]
        right = behind.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        assert float((torch.tensor(found, dtype=torch.float64) - right).abs().max()) < 1e-4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_block_that_is_altered_on_any_rank_is_noticed(checkpoint: Checkpoints, rank: int) -> None:
    model, altered = checkpoint(DENSE), []

    def alter(plan: Any) -> None:
        if plan.num_decode and not altered:
            storage, layout = runner.storages[rank], runner.runners[rank].layout
            kv_view(storage.data, layout)[int(plan.block_tables[0, 0]), :, 1].neg_()
            altered.append(plan)

    prompts = [prompt for prompt in mixed_prompts(DENSE.vocab) if len(prompt) > 40][:4]
    layout = Layout(2, 64, caching=False, preempt=False)
    with (
        GroupedRunner(model.directory, 2, max_model_len=MAX_MODEL_LEN) as runner,
        hosted(runner, layout, on_plan=alter) as worker,
    ):
        outputs = [output.tokens for output in worker.greedy(prompts, TOKENS)]
    assert altered
    assert model.reference.judge(prompts, outputs).wrong


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_ranks_that_are_processes(checkpoint: Checkpoints) -> None:
    """The benchmark's processes, one thread each, fed the same plans: as one rank alone."""
    model, script = checkpoint(dataclasses.replace(DENSE, seed=5)), Path(__file__).parents[1] / "benchmarks"
    command = [sys.executable, "tensor_parallel.py", str(model.directory), "--rows", "3", "--dtype", "float32"]
    command += ["--width", "2", "--context", "40", "--steps", "12"]
    done = subprocess.run(command, cwd=script, capture_output=True, text=True, timeout=90, check=True)
    (result,) = json.loads(done.stdout)["results"]
    assert result["same_tokens"] is True


def _id(value: object) -> str:
    return value.name if isinstance(value, CheckpointSpec) else str(value)
