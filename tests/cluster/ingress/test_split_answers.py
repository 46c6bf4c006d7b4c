"""Scores and embeddings through the whole front and a split cluster of oracle workers, prefix cache and all."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from fakes.http_server import HttpServer
from fakes.oracle_app import VOCAB, OracleApp

from penstock.cluster.text import TextCodec
from penstock.workers.oracle import expected_embedding, expected_tokens
from penstock.workers.protocol import SamplingParams

pytestmark = pytest.mark.timeout(60)
PROMPT = [(7 * i) % 330 for i in range(150)]  # nine full blocks and some


@pytest.fixture(scope="module")
def client(codec: TextCodec) -> Iterator[httpx.Client]:
    with (
        HttpServer(OracleApp(codec), graceful=True) as server,
        httpx.Client(base_url=server.url, timeout=20, trust_env=False) as found,
    ):
        yield found


@pytest.mark.parametrize("stated", [{"max_tokens": 0}, {"max_tokens": 1}, {"max_tokens": 6, "n": 3}])
def test_a_prompt_is_scored_whole_also_when_it_is_cached(client: httpx.Client, stated: dict[str, int]) -> None:
    """Twice, so that the second time its blocks are in the caches of both workers."""
    body = {"prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0, "ignore_eos": True, **stated}
    first, second = (client.post("/v1/completions", json=body).json() for _ in range(2))
    for found in (first, second):
        assert len(found["choices"]) == stated.get("n", 1)
        for choice in found["choices"]:
            scores = choice["logprobs"]["token_logprobs"]
            assert len(scores) == len(PROMPT) + stated["max_tokens"]
            assert scores[0] is None
            assert all(isinstance(score, float) for score in scores[1:])
    assert first["choices"][0]["logprobs"] == second["choices"][0]["logprobs"]


def test_embeddings(client: httpx.Client) -> None:
    inputs = [PROMPT, PROMPT[:5], PROMPT[:16]]
    for _ in range(2):
        found = client.post("/v1/embeddings", json={"input": inputs}).json()
        for data, prompt in zip(found["data"], inputs, strict=True):
            wanted = expected_embedding(prompt)
            np.testing.assert_allclose(data["embedding"], wanted / np.linalg.norm(wanted), rtol=1e-5)
    assert found["usage"]["prompt_tokens"] == sum(map(len, inputs))


def test_the_best_of_four_are_right_tokens(client: httpx.Client) -> None:
    body = {"prompt": PROMPT, "n": 2, "best_of": 4, "max_tokens": 8, "temperature": 1, "seed": 5, "ignore_eos": True}
    found = client.post("/v1/completions", json={**body, "return_token_ids": True}).json()
    may = {
        expected_tokens(PROMPT, SamplingParams(max_tokens=8, temperature=1.0, seed=5, choice=c), VOCAB)
        for c in range(4)
    }
    got = [tuple(choice["token_ids"]) for choice in found["choices"]]
    assert len(set(got)) == 2
    assert set(got) <= may
