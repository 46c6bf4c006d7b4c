"""Texts under a grammar: equal to a plain loop over transformers' logits and llguidance's mask, however computed.

The embedded model in float32, inside this process; `tests/faults/test_grammar_death.py` has processes that die.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from fakes.grammars import ENDS, PERSON, SPECS, PatientGrammars, follow_plainly, text_of
from fakes.in_ci import every
from fakes.in_process import InProcessWorker, load_runner
from fakes.rank_threads import GroupedRunner
from fakes.threaded_cluster import ThreadedCluster
from fakes.variants import Variant, request
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.parallel.plan_codec import decode_plan, encode_plan
from penstock.workers.protocol import GenerateRequest, SamplingParams, Tokens
from penstock.workers.settings import SchedulerSettings

COUNT = 48
MAX_MODEL_LEN = 256
QUESTIONS = (
    "Write a JSON record for Ana, who is 31 and lives in Rome.",
    "Tell me a story about a fox. " * 12,
    "What is 23 + 45?" * 8,
    "Hello!",
)


@pytest.fixture(scope="module")
def prompts() -> list[Tokens]:
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    return [tuple(tokenizer.encode(question).ids) for question in QUESTIONS]


@pytest.fixture(scope="module")
def truth(prompts: list[Tokens]) -> list[list[int]]:
    """Of every prompt under every grammar."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    return [follow_plainly(model, prompt, spec, COUNT) for prompt in prompts for spec in SPECS]


def requests(prompts: Sequence[Tokens], emitted: int = 0, of: Any = None, **fields: Any) -> list[GenerateRequest]:
    """Every prompt under every grammar; `emitted` leading tokens of their answers `of` are already out."""
    found = []
    for number, prompt in enumerate(prompts):
        for index, spec in enumerate(SPECS):
            sampling = SamplingParams(COUNT, stop_token_ids=ENDS, grammar=spec, **fields)
            one = request(f"q{number}.{index}", prompt, sampling)
            answer = [] if of is None else of[number * len(SPECS) + index]
            found.append(dataclasses.replace(one, emitted=tuple(answer[:emitted])))
    return found


def worker(runner: Any, **changes: Any) -> InProcessWorker:
    settings = {"max_model_len": MAX_MODEL_LEN, "max_num_batched_tokens": 512, "max_num_seqs": 64, **changes}
    blocks = settings.pop("num_blocks", 1024)
    return InProcessWorker(
        runner, num_blocks=blocks, scheduler=SchedulerSettings(**settings), grammars=PatientGrammars()
    )


def test_texts_are_what_the_grammars_say(truth: list[list[int]]) -> None:
    """Of the judge itself: else equality would prove little."""
    ended = [tokens[-1] in ENDS for tokens in truth]
    assert sum(ended) >= len(truth) // 2
    for number, tokens in enumerate(truth):
        if ended[number] and number % len(SPECS) == 0:
            jsonschema.validate(json.loads(text_of(tokens)), PERSON)


VARIANTS = (
    Variant(split=True, chunk=16, caching=True, preempt=True, transport="tcp"),
    Variant(split=False, chunk=16, caching=False, preempt=True),
    Variant(split=False, chunk=0, caching=True, preempt=False),
    Variant(split=True, chunk=64, caching=False, preempt=False, ahead=True),
)


@pytest.mark.parametrize("variant", every(2, VARIANTS), ids=str)
def test_greedy_texts_equal_the_plain_loop(variant: Variant, prompts: list[Tokens], truth: list[list[int]]) -> None:
    async def scenario() -> tuple[list[list[int]], int]:
        async with ThreadedCluster(variant.workers(EMBEDDED_MODEL), variant.router) as cluster:
            answers = await cluster.generate(requests(prompts))  # while their grammars are compiled
            answers += await cluster.generate(requests(prompts) * 2)
        return [answer.tokens for answer in answers], sum(w.preemptions for w in cluster.workers.values())

    found, preemptions = asyncio.run(scenario())
    assert found == truth * 3
    assert (preemptions > 0) == variant.preempt


def test_resumed_after_every_token(prompts: list[Tokens], truth: list[list[int]]) -> None:
    with worker(load_runner(EMBEDDED_MODEL, max_model_len=MAX_MODEL_LEN)) as one:
        for point in range(1, COUNT):
            asked = requests(prompts[:2], point, truth)
            open_ones = [n for n, r in enumerate(asked) if point < len(truth[n])]
            outputs = one.generate([asked[n] for n in open_ones])
            assert [output.tokens for output in outputs] == [truth[n][point:] for n in open_ones]


def test_two_tensor_ranks(prompts: list[Tokens], truth: list[list[int]]) -> None:
    """Every plan goes the way that it takes to another rank."""
    with GroupedRunner(EMBEDDED_MODEL, 2, max_model_len=MAX_MODEL_LEN) as runner, worker(runner) as one:
        run = runner.run
        runner.run = lambda plan: run(decode_plan(bytearray(encode_plan(plan))))  # type: ignore[method-assign]
        assert [output.tokens for output in one.generate(requests(prompts))] == truth


def test_drawn_tokens_are_the_same_alone_together_and_preempted(prompts: list[Tokens]) -> None:
    runner = load_runner(EMBEDDED_MODEL, max_model_len=MAX_MODEL_LEN)
    asked = requests(prompts, temperature=1.1, top_p=0.95, seed=77, repetition_penalty=1.1)
    with worker(runner) as one:
        alone = [one.generate([each])[0].tokens for each in asked]
        assert [output.tokens for output in one.generate(asked)] == alone
    runner.detach()
    with worker(runner, num_blocks=22, reserve_tokens=0, watermark=0.0) as scarce:
        assert [output.tokens for output in scarce.generate(asked)] == alone
        assert scarce.preemptions > 0
    assert len({tuple(tokens) for tokens in alone}) > len(prompts)
