"""Prompt logprobs and embeddings of a real model against transformers, however prompts are cut, cached or preempted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes.exactness import CheckpointSpec, Reference, make_checkpoint, mixed_prompts
from fakes.in_process import InProcessWorker, Output, load_runner

from penstock.workers import token_logprobs
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import EndReason, GenerateRequest, SamplingParams, Tokens
from penstock.workers.settings import SchedulerSettings

SPEC = CheckpointSpec("qwen3", 4, 1, 64, vocab=500)
ROOT = b"\3" * 32


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), SPEC)


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


def worker(model_dir: Path, *, chunk: int = 0, blocks: int = 512, **limits: int) -> InProcessWorker:
    runner = load_runner(model_dir, max_model_len=256, block_size=16)
    scheduler = SchedulerSettings(
        max_num_batched_tokens=max(48, chunk * 2) if chunk else 4096,
        long_prefill_token_threshold=chunk,
        max_model_len=256,
        watermark=0.0,
        **limits,
    )
    return InProcessWorker(runner, num_blocks=blocks, scheduler=scheduler)


def scoring(prompt: Tokens, alternatives: int | None, max_tokens: int = 3, **fields: object) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=alternatives)
    digests = chain_digests(ROOT, prompt, 16)
    request = GenerateRequest("s", prompt, sampling, prefix_root=ROOT, prefix_digests=digests)
    return dataclasses.replace(request, **fields)  # type: ignore[arg-type]


def require_right(output: Output, prompt: Tokens, reference: Reference, alternatives: int) -> None:
    assert output.scores is not None
    assert output.scores.complete
    first, *scores = output.scores.read()
    assert first is None
    assert len(scores) == len(prompt) - 1
    if not scores:
        return
    truth = reference.logprobs([prompt[:1]], [prompt[1:]])[0]
    np.testing.assert_allclose(
        [score.logprob for score in scores], truth.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0], atol=1e-4
    )
    for row, score in enumerate(scores):
        values, _ = torch.topk(truth[row], alternatives)
        assert len(score.top) == alternatives
        np.testing.assert_allclose([value for _, value in score.top], values, atol=1e-4)
        np.testing.assert_allclose([truth[row, token] for token, _ in score.top], values, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 16, 7])
def test_scores_are_those_of_transformers(
    model_dir: Path, reference: Reference, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for beside others that ask for nothing; a step holds at most so many logits of scored rows."""
    monkeypatch.setattr(token_logprobs, "PIECE_ELEMENTS", 10 * SPEC.vocab)
    prompts = mixed_prompts(SPEC.vocab, 12, longest=70, seed=5)
    with worker(model_dir, chunk=chunk) as serving:
        asked = [scoring(prompt, number % 4 * 5 if number % 3 else None) for number, prompt in enumerate(prompts)]
        outputs = serving.generate(asked)
        plain = serving.generate([scoring(prompt, None) for prompt in prompts])
    for request, output in zip(asked, outputs, strict=True):
        if request.sampling.prompt_logprobs is None:
            assert output.scores is None
        else:
            require_right(output, request.prompt, reference, request.sampling.prompt_logprobs)
    assert [output.tokens for output in outputs] == [output.tokens for output in plain]


def test_a_scored_prompt_reads_no_cache_but_fills_it(model_dir: Path, reference: Reference) -> None:
    prompt = mixed_prompts(SPEC.vocab, 12, longest=70, seed=5)[9]
    prompt = (prompt * 70)[:70]
    with worker(model_dir, chunk=16) as serving:
        serving.generate([scoring(prompt, 0)])
        assert serving.cached_tokens == 0
        serving.generate([scoring(prompt, None)])
        assert serving.cached_tokens == 64
        require_right(serving.generate([scoring(prompt, 2)])[0], prompt, reference, 2)
        assert serving.cached_tokens == 64


def test_preempted_in_the_middle_every_token_is_still_scored_once(model_dir: Path, reference: Reference) -> None:
    prompts = [tuple((7 * n + 13 * i) % SPEC.vocab for i in range(100)) for n in range(5)]
    with worker(model_dir, chunk=16, blocks=14, reserve_tokens=0) as serving:
        outputs = serving.generate([scoring(prompt, 1, max_tokens=40) for prompt in prompts])
        assert serving.preemptions > 0
    for prompt, output in zip(prompts, outputs, strict=True):
        require_right(output, prompt, reference, 1)
        assert output.scored_pieces <= 7 + 3  # ended chunks only, none sent again


def test_one_that_goes_on_elsewhere_is_scored_over_its_prompt_only(model_dir: Path, reference: Reference) -> None:
    prompt, emitted = tuple(range(40)), tuple(range(60, 85))
    with worker(model_dir, chunk=16) as serving:
        output = serving.generate([scoring(prompt, 3, max_tokens=30, emitted=emitted)])[0]
    require_right(output, prompt, reference, 3)


def test_embeddings_are_the_last_hidden_state(model_dir: Path, reference: Reference) -> None:
    prompts = mixed_prompts(SPEC.vocab, 12, longest=70, seed=6)
    with worker(model_dir, chunk=16) as serving:
        for _ in range(2):  # computed, then from the cache
            outputs = serving.generate([scoring(prompt, None, max_tokens=1, embed=True) for prompt in prompts])
            for prompt, output in zip(prompts, outputs, strict=True):
                with torch.inference_mode():
                    states = reference.model.model(input_ids=torch.tensor([prompt])).last_hidden_state
                assert output.embedding is not None
                assert output.embedding.dtype == np.float32
                np.testing.assert_allclose(output.embedding, states[0, -1], atol=1e-4)
                assert output.end is EndReason.LENGTH
        assert serving.cached_tokens > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_models_score_and_embed_in_float32(model_dir: Path, reference: Reference, dtype: str) -> None:
    prompt = tuple(range(3, 60))
    runner = load_runner(model_dir, dtype=dtype, max_model_len=128)
    with InProcessWorker(runner, scheduler=SchedulerSettings(max_model_len=128)) as serving:
        output = serving.generate([scoring(prompt, 2, max_tokens=1, embed=True)])[0]
    assert output.embedding is not None
    assert output.embedding.dtype == np.float32
    assert output.scores is not None
    scores = output.scores.read()[1:]
    truth = reference.logprobs([prompt[:1]], [prompt[1:]])[0].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    np.testing.assert_allclose([score.logprob for score in scores if score], truth, atol=0.3)
