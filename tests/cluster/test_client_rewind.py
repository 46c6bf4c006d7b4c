"""Answers rolled back to checkpoints: the rest is that of an answer from which nothing was taken back."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fakes.embedded_app import EmbeddedApp, embedded_codec
from fakes.http_server import HttpServer
from fakes.in_ci import every
from fakes.oracle_app import VOCAB, OracleApp

from penstock.cluster.client import Handle, connect
from penstock.cluster.client_rewind import Mark, RewindableStream
from penstock.cluster.text import TextCodec
from penstock.workers.errors import RequestError
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import Role, SamplingParams
from penstock.workers.settings import WorkerSettings

pytestmark = pytest.mark.timeout(90)
PROMPT = tuple((7 * i) % 330 for i in range(50))
STORY = "Tell me a story about a fox."


class Rewound(OracleApp):
    """Workers with a small or a roomy pool, with and without prefix cache; a second decode worker to go on with."""

    def __init__(self, codec: TextCodec, caching: bool, blocks: int) -> None:
        super().__init__(codec, prefix_caching=caching)
        self._caching, self._blocks = caching, blocks

    def worker_settings(self) -> list[WorkerSettings]:
        prefill, decode = super().worker_settings()
        workers = [prefill, decode, replace(decode, worker_id=f"{Role.DECODE.value}-1")]
        kv = replace(prefill.kv, prefix_caching=self._caching, num_blocks=self._blocks)
        scheduler = replace(prefill.scheduler, reserve_tokens=0)
        runner = replace(prefill.runner, oracle_step_s=0.001)
        return [replace(worker, kv=kv, scheduler=scheduler, runner=runner) for worker in workers]

    def blocks_held(self) -> int:
        """Once everything has ended."""
        deadline = time.monotonic() + 10
        while not self.idle and time.monotonic() < deadline:
            time.sleep(0.01)
        held = 0
        for worker in self._workers:
            scheduler = worker._engine._scheduler
            scheduler.check_integrity()
            held += sum(bank.pool.num_blocks - bank.pool.num_free for bank in scheduler._memory.banks)
        return held


def wander(answer: RewindableStream, rng: random.Random, rollbacks: int) -> None:
    """Read to the end, going back to one of the marks again and again."""
    marks: list[Mark] = [answer.checkpoint()]
    while True:
        for _ in answer:
            if rng.random() < 0.3:
                marks.append(answer.checkpoint())
            if rollbacks and rng.random() < 0.2:
                break
        else:
            if not rollbacks:
                return
        rollbacks -= 1
        mark = rng.choice(marks)
        answer.rollback(mark)
        assert answer.checkpoint() == mark
        marks = [each for each in marks if each.tokens <= mark.tokens]


@pytest.mark.parametrize(("caching", "blocks"), every(2, [(True, 36), (False, 2048), (True, 2048)]))
def test_wherever_it_is_rolled_back_the_rest_is_the_same(codec: TextCodec, caching: bool, blocks: int) -> None:
    """Several answers at once; one wrong, doubled or missing KV block changes every later token of the oracle's."""
    app = Rewound(codec, caching, blocks)
    with HttpServer(app, graceful=True) as server, connect(server.url) as handle:

        async def one(number: int) -> None:
            rng = random.Random(number)
            options: Any = {"max_tokens": 120, "temperature": number % 2, "seed": number, "ignore_eos": True}
            answer = handle.rewindable([*PROMPT, number], **options)
            await asyncio.to_thread(wander, answer, rng, 12)
            sampling = SamplingParams(120, temperature=float(number % 2), seed=number)
            assert tuple(answer.token_ids) == expected_tokens([*PROMPT, number], sampling, VOCAB)
            assert answer.finish_reason == "length"
            plain = await asyncio.to_thread(handle.generate, [*PROMPT, number], **options)
            assert answer.text == plain.text

        async def all_of_them() -> None:
            await asyncio.gather(*(one(number) for number in range(6)))

        asyncio.run(all_of_them())
        assert app.blocks_held() == 0


def test_also_when_a_worker_goes_away_in_between(codec: TextCodec) -> None:
    app = Rewound(codec, True, 2048)
    with HttpServer(app, graceful=True) as server, connect(server.url) as handle:
        answer = handle.rewindable(PROMPT, max_tokens=200, temperature=0, ignore_eos=True)
        while len(answer.token_ids) < 40:
            next(answer)
        mark = answer.checkpoint()
        while len(answer.token_ids) < 80:
            next(answer)
        busy = max(app._workers[1:], key=lambda worker: worker._engine.load().running)
        assert busy._engine.load().running
        busy.stop()
        answer.rollback(mark)
        for _ in answer:
            pass
        assert tuple(answer.token_ids) == expected_tokens(PROMPT, SamplingParams(200), VOCAB)


@pytest.fixture(scope="module")
def embedded() -> Iterator[Handle]:
    codec = embedded_codec()
    with HttpServer(EmbeddedApp(codec), graceful=True) as server, connect(server.url) as handle:
        yield handle


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 5},
        {"temperature": 0.9, "seed": 6, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
        {"temperature": 0.9, "seed": 7, "stop": [" the", "zz"], "min_tokens": 20},
        {"temperature": 0.9, "seed": 8, "structured_outputs": {"regex": "([a-z]{2,9} ){12}"}},
    ],
    ids=["greedy", "drawn", "penalties", "stops", "grammar"],
)
@pytest.mark.parametrize("prompt", every(2, [STORY, [{"role": "user", "content": STORY}]]), ids=["text", "messages"])
def test_a_model_goes_on_as_if_nothing_was_taken_back(embedded: Handle, prompt: Any, options: Any) -> None:
    plain = embedded.generate(prompt, max_tokens=60, **options)
    for seed in range(2):
        answer = embedded.rewindable(prompt, max_tokens=60, **options)
        wander(answer, random.Random(seed), 4)
        assert tuple(answer.token_ids) == plain.token_ids
        assert (answer.text, answer.finish_reason) == (plain.text, plain.choices[0].finish_reason)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 8, "structured_outputs": {"regex": "([a-z]{2,9} ){6}"}},
        {"temperature": 0, "stop": [" the"]},
        {"temperature": 0, "max_tokens": 9},
    ],
    ids=["stop-token", "stop-string", "length"],
)
def test_behind_the_end_nothing_comes(embedded: Handle, options: Any) -> None:
    """Whether the end was heard of or not; unless there is room again."""
    answer = embedded.rewindable(STORY, **{"max_tokens": 60, **options})
    for _ in answer:
        pass
    ended = (list(answer.token_ids), answer.text, answer.finish_reason)
    answer.rollback(answer.checkpoint())
    assert (list(answer), list(answer.token_ids), answer.text, answer.finish_reason) == ([], *ended)
    again = {"emitted_token_ids": ended[0], **options, "max_tokens": 61}
    rest = embedded.generate(STORY, **again)
    if ended[2] == "stop":
        assert (rest.token_ids, rest.text, rest.choices[0].finish_reason) == ((), "", "stop")
        assert [chunk.finish_reason for chunk in embedded.stream(STORY, **again) if chunk.finish_reason] == ["stop"]
    else:
        assert len(rest.token_ids) == 61 - len(ended[0])
        answer.rollback(answer.checkpoint(), max_tokens=61)
        assert "".join(chunk.text for chunk in answer) == rest.text


def test_a_forbidden_token_does_not_come_first_and_comes_later(embedded: Handle) -> None:
    answer = embedded.rewindable(STORY, max_tokens=40, temperature=0)
    for _ in answer:
        pass
    before = list(answer.token_ids)
    answer.rollback(Mark(6, 0), forbid_first=[before[6]])
    for _ in answer:
        pass
    assert answer.token_ids[:6] == before[:6]
    assert answer.token_ids[6] != before[6]
    later = [token for token in before[7:] if token in before[:7]]
    assert later, "the test needs a token that comes again"
    answer.rollback(Mark(0, 0), forbid_first=[later[0]])
    for _ in answer:
        pass
    assert answer.token_ids == before, "it would not have come first anyway"


def test_an_answer_without_a_seed_keeps_the_one_it_drew(embedded: Handle) -> None:
    answer = embedded.rewindable(STORY, max_tokens=30, temperature=1.0, ignore_eos=True)
    for _ in answer:
        pass
    before = list(answer.token_ids)
    answer.rollback(Mark(3, 0))
    for _ in answer:
        pass
    assert answer.token_ids == before
    answer.rollback(Mark(3, 0), seed=12345)
    for _ in answer:
        pass
    assert answer.token_ids[:3] == before[:3]
    assert answer.token_ids != before


def test_on_asyncio(embedded: Handle) -> None:
    async def scenario() -> None:
        plain = await embedded.agenerate(STORY, max_tokens=30, temperature=0)
        answer = embedded.arewindable(STORY, max_tokens=30, temperature=0)
        mark = None
        async for _ in answer:
            mark = answer.checkpoint() if mark is None else mark
            if len(answer.token_ids) > 10:
                break
        assert mark is not None
        await answer.rollback(mark)
        async for _ in answer:
            pass
        assert tuple(answer.token_ids) == plain.token_ids
        assert answer.text == plain.text
        await answer.aclose()
        await embedded._async.close()

    asyncio.run(scenario())


def test_what_cannot_be(embedded: Handle) -> None:
    with pytest.raises(RequestError, match="one choice"):
        embedded.rewindable(STORY, n=2)
    answer = embedded.rewindable(STORY, max_tokens=4, temperature=0)
    with pytest.raises(RequestError, match="rolled back past"):
        answer.rollback(Mark(1, 0))


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({"emitted_token_ids": [1, 2], "max_tokens": 2}, "emitted_token_ids", "counts them"),
        ({"emitted_token_ids": [1], "n": 2}, "emitted_token_ids", "one choice"),
        ({"emitted_token_ids": [1], "echo": True}, "emitted_token_ids", "echo"),
        ({"emitted_token_ids": [-1]}, "emitted_token_ids", "token ids are integers"),
        ({"emitted_token_ids": "a"}, "emitted_token_ids", "list"),
        ({"forbidden_next_token_ids": [1 << 30]}, "forbidden_next_token_ids", "token ids are integers"),
        ({"forbidden_next_token_ids": [1], "n": 2}, "forbidden_next_token_ids", "one choice"),
    ],
)
def test_bad_fields_are_refused_by_name(embedded: Handle, body: dict[str, Any], field: str, words: str) -> None:
    stated = {"prompt": STORY, "max_tokens": 8, **body}
    answer = httpx.post(f"{embedded.url}/v1/completions", json=stated, timeout=20, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert words in answer.json()["error"]["message"]
