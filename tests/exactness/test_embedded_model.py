"""The built-in model through `penstock serve` without arguments: transformers' own answers, and sums it never saw."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import torch
from fakes.exactness import Reference
from fakes.served_cluster import ServedCluster

from penstock.cluster.config import load_config
from penstock.cluster.model_directory import EMBEDDED_MODEL

QUESTIONS = (
    "Hello!",
    "Who are you?",
    "Tell me a story about a fox.",
    "Tell me a story about a boat and a girl.",
    "What is 23 + 45?",
    "Add 71 and 28.",
    "99 + 99",
    "Sort the list 9, 3, 7, 1.",
    "Reverse this list: 4, 8, 15, 16.",
    "Copy this list: apple, pear, plum.",
    "Write a JSON record for Ana, who is 31 and lives in Rome.",
    "What colour is the sky?",
    "Where does a bear live?",
    "Tom has 12 apples and gets 30 more. How many apples does Tom have now?",
    "Thank you.",
    "Tell me something about a small dog.",
    "What is the opposite of cold?",
    "näive Füße, 日本語 🙂",
    "a",
    "Please write a long story about a king, a queen and a very old tree near the river.",
)
MAX_TOKENS = 64
SUMS = 100

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(240),
    pytest.mark.skipif(
        not (EMBEDDED_MODEL / "config.json").is_file(), reason="the embedded model has not been trained yet"
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCluster]:
    """One prefill and one decode worker, the default; short questions are split too."""
    split = {"router": {"placement": {"local_prefill_tokens": 0}}}
    cluster = ServedCluster(tmp_path_factory.mktemp("embedded"), [], split)
    try:
        cluster.wait_ready(120.0)
        yield cluster
        assert cluster.terminate() == 0
        assert cluster.survivors(10.0) == []
    finally:
        cluster.end()


def test_it_is_served_in_float32() -> None:
    config = load_config(environment={})
    assert (config.runner.dtype, config.sources["runner.dtype"]) == ("float32", "the embedded model")
    assert Path(config.runner.model_dir) == EMBEDDED_MODEL


def test_greedy_answers_are_those_of_transformers(cluster: ServedCluster) -> None:
    found = asyncio.run(ask(cluster.url, list(QUESTIONS), MAX_TOKENS, return_token_ids=True))
    prompts = [answer["prompt_token_ids"] for answer in found]
    choices = [answer["choices"][0] for answer in found]
    verdict = Reference(EMBEDDED_MODEL).judge(prompts, [choice["token_ids"] for choice in choices])
    assert verdict.wrong == []
    single = Reference(EMBEDDED_MODEL, torch.float32)
    stops = single.model.generation_config.eos_token_id
    different = 0
    for prompt, choice in zip(prompts, choices, strict=True):
        wanted = generated(single, prompt)
        different += choice["token_ids"] != wanted
        assert (choice["finish_reason"] == "stop") == (choice["token_ids"][-1] in stops)
    assert different <= verdict.ties  # where the two best are that close, either may follow


def test_sums_of_pairs_that_training_never_showed(cluster: ServedCluster) -> None:
    from deploy.train_model.addition import held_out_pairs, is_right, phrased

    rng = Random(41)
    pairs = rng.sample(held_out_pairs(), SUMS)
    found = asyncio.run(ask(cluster.url, [phrased(rng, a, b) for a, b in pairs], 24))
    replies = [answer["choices"][0]["message"]["content"] for answer in found]
    wrong = [(a, b, reply) for (a, b), reply in zip(pairs, replies, strict=True) if not is_right(reply, a, b)]
    assert len(wrong) <= SUMS // 10, wrong


def generated(reference: Reference, prompt: list[int]) -> list[int]:
    """`transformers.generate`, greedy; the model's own stop tokens end it."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_TOKENS
        )
    return [int(token) for token in out[0, len(prompt) :]]


async def ask(url: str, questions: list[str], max_tokens: int, **fields: Any) -> list[dict[str, Any]]:
    """Whole chat answers, greedy, 16 at a time."""
    limits = httpx.Limits(max_connections=16)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120.0, limits=limits) as client:

        async def one(question: str) -> dict[str, Any]:
            body = {"messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "temperature": 0}
            answer = await client.post("/v1/chat/completions", json={**body, **fields})
            assert answer.status_code == 200, answer.text
            return answer.json()

        return list(await asyncio.gather(*map(one, questions)))
