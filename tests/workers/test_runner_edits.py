"""Logit edits over a real model: as transformers' own processors, alone as in a crowd, and resumed at every point."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.exactness import CheckpointSpec, make_checkpoint, mixed_prompts
from fakes.in_process import InProcessWorker, load_runner
from fakes.plain_edits import banned_tokens
from fakes.sampled import EDITED_KINDS, edited_requests
from transformers import AutoModelForCausalLM, LogitsProcessorList
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.settings import SchedulerSettings

SPEC = CheckpointSpec("llama", 4, 1, 48, vocab=300, std=0.2)
COUNT = 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), SPEC)


@pytest.fixture(scope="module")
def model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()


def worker(model_dir: Path, *, chunk: int = 0, blocks: int = 512, **limits: int) -> InProcessWorker:
    scheduler = SchedulerSettings(
        max_num_seqs=64,
        max_num_batched_tokens=chunk * 2 + 64 if chunk else 4096,
        long_prefill_token_threshold=chunk,
        max_model_len=256,
        watermark=0.0,
        **limits,
    )
    return InProcessWorker(load_runner(model_dir, max_model_len=256), num_blocks=blocks, scheduler=scheduler)


def greedy(prompt: Sequence[int], **wish: Any) -> GenerateRequest:
    return GenerateRequest("g", tuple(prompt), SamplingParams(max_tokens=COUNT, **wish))


def theirs(model: Any, prompt: Sequence[int], processors: list[Any], stop: Sequence[int] = ()) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=COUNT,
            logits_processor=LogitsProcessorList(processors),
            eos_token_id=list(stop) or None,
            pad_token_id=0,
        )
    return [int(token) for token in out[0, len(prompt) :]]


def test_greedy_output_is_that_of_their_processors(model_dir: Path, model: Any) -> None:
    prompts = [prompt for prompt in mixed_prompts(SPEC.vocab, 16, longest=60, seed=2) if len(prompt) > 3]
    with worker(model_dir, chunk=16) as serving:
        plain = [output.tokens for output in serving.greedy(prompts, COUNT)]
        # Words and stops are taken from what comes without edits, so that they matter.
        words = [((p[0],), (p[2], p[3]), (p[6], p[7], p[8])) for p in plain]
        biases = [((p[1], -3.0), (p[5] + 1 if p[5] + 1 < SPEC.vocab else 0, 4.5)) for p in plain]
        biases = [tuple({token: (token, value) for token, value in pair}.values()) for pair in biases]
        wishes: list[dict[str, Any]] = []
        for number, (word, bias, tokens) in enumerate(zip(words, biases, plain, strict=True)):
            every = {"repetition_penalty": 1.4, "logit_bias": bias, "bad_words": word}
            every |= {"stop_token_ids": (tokens[3], tokens[9]), "min_tokens": 6 + number % 4}
            some = [["repetition_penalty"], ["logit_bias"], ["bad_words"], ["stop_token_ids", "min_tokens"], [*every]]
            wishes.append({name: every[name] for name in some[number % 5]})
        outputs = serving.generate([greedy(p, **wish) for p, wish in zip(prompts, wishes, strict=True)])
    changed = 0
    for prompt, wish, before, output in zip(prompts, wishes, plain, outputs, strict=True):
        processors: list[Any] = []
        if "repetition_penalty" in wish:
            processors.append(RepetitionPenaltyLogitsProcessor(wish["repetition_penalty"]))
        if "logit_bias" in wish:
            processors.append(SequenceBiasLogitsProcessor([[[token], value] for token, value in wish["logit_bias"]]))
        if "bad_words" in wish:
            processors.append(NoBadWordsLogitsProcessor([list(word) for word in wish["bad_words"]]))
        if "min_tokens" in wish:
            processors.append(
                MinNewTokensLengthLogitsProcessor(len(prompt), wish["min_tokens"], list(wish["stop_token_ids"]))
            )
        assert output.tokens == theirs(model, prompt, processors, wish.get("stop_token_ids", ())), wish
        changed += output.tokens != before
    assert changed >= len(prompts) - 2


@pytest.fixture(scope="module")
def alone(model_dir: Path) -> list[list[int]]:
    with worker(model_dir) as serving:
        return [serving.generate([request])[0].tokens for request in edited_requests(SPEC.vocab)]


@pytest.mark.parametrize("preempt", [False, True])
def test_alone_or_in_a_crowd_is_the_same(model_dir: Path, alone: list[list[int]], preempt: bool) -> None:
    requests = edited_requests(SPEC.vocab)
    others = [greedy(prompt) for prompt in mixed_prompts(SPEC.vocab, 32, longest=60, seed=8)]
    limits = {"blocks": 40, "reserve_tokens": 0} if preempt else {}
    with worker(model_dir, chunk=16, **limits) as serving:
        found = [output.tokens for output in serving.generate([*others[::2], *requests, *others[1::2]])]
        assert (serving.preemptions > 0) == preempt
    assert found[16 : 16 + len(requests)] == alone
    assert len(requests) == len(EDITED_KINDS)


def test_resumed_at_every_point_it_goes_on_the_same(model_dir: Path, alone: list[list[int]]) -> None:
    with worker(model_dir) as serving:
        for request, tokens in zip(edited_requests(SPEC.vocab), alone, strict=True):
            points = range(1, len(tokens))
            resumed = [dataclasses.replace(request, emitted=tuple(tokens[:point])) for point in points]
            outputs = serving.generate(resumed)
            assert [output.tokens for output in outputs] == [tokens[point:] for point in points], request.sampling


def test_what_is_banned_does_not_come_out(alone: list[list[int]]) -> None:
    for request, tokens in zip(edited_requests(SPEC.vocab), alone, strict=True):
        sampling = request.sampling
        for point, token in enumerate(tokens):
            assert token not in banned_tokens(sampling, request.prompt, tokens[:point])
            assert sampling.allowed_token_ids is None or token in sampling.allowed_token_ids
        assert len(tokens) >= min(sampling.min_tokens, sampling.max_tokens)


def test_logprobs_are_of_the_raw_logits(model_dir: Path) -> None:
    prompt = tuple(range(20))
    with worker(model_dir) as serving:
        first = serving.generate([greedy(prompt, logprobs=3)])[0]
        best = first.tokens[0]
        edited = serving.generate([greedy(prompt, logprobs=3, bad_words=((best,),), repetition_penalty=1.3)])[0]
    assert edited.tokens[0] != best
    assert dict(edited.logprobs[0][1]) == pytest.approx(dict(first.logprobs[0][1]), abs=1e-5)
    assert edited.logprobs[0][0] < first.logprobs[0][0]
