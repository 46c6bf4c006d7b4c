"""Many prompts at once: order, bounds, patience with refusals, what failures do, and the bar."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fakes.fake_generator import FakeFleet, FakeGenerator, deltas
from fakes.http_server import HttpServer
from fakes.tiny_model import CONTEXT

from penstock.cluster import client_batch
from penstock.cluster.client import Handle, connect
from penstock.cluster.client_batch import BatchPlan
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.metrics import Metrics
from penstock.cluster.text import TextCodec
from penstock.workers.errors import PenstockError, RefusedError, RequestError
from penstock.workers.protocol import FailureCode, GenerateRequest

pytestmark = pytest.mark.timeout(60)
Connect = Callable[[FakeGenerator], Handle]
PROMPTS = [[5, 6, 7, number] for number in range(8, 28)]


@pytest.fixture
def handle_on(codec: TextCodec, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    monkeypatch.setattr(client_batch, "FIRST_BACKOFF_S", 0.01)
    with ExitStack() as stack:

        def start(generator: FakeGenerator) -> Handle:
            settings = IngressSettings(("tiny",), CONTEXT)
            server = stack.enter_context(HttpServer(build_app(settings, codec, generator, Metrics(), FakeFleet())))
            return stack.enter_context(connect(server.url))

        yield start


def last_token(request: GenerateRequest) -> list[Any]:
    """Later prompts answer sooner, so that answers come out of order."""
    return [(28 - request.prompt[-1]) * 0.005, *deltas([request.prompt[-1]])]


def test_answers_stand_where_their_prompts_stood(handle_on: Connect) -> None:
    handle = handle_on(FakeGenerator(last_token))
    answers = handle.batch(PROMPTS, progress=False, max_tokens=1)
    assert [answer.token_ids for answer in answers] == [(prompt[-1],) for prompt in PROMPTS]
    ended = handle.batch(iter(PROMPTS), progress=False, ordered=False, max_tokens=1)
    assert sorted(a.token_ids for a in ended) == [a.token_ids for a in answers]
    assert [a.token_ids for a in ended] != [a.token_ids for a in answers]
    assert handle.batch([], progress=False) == []


def test_no_more_at_once_than_asked_for(handle_on: Connect) -> None:
    running, most = 0, 0

    def script(request: GenerateRequest) -> Iterator[Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        yield 0.02
        running -= 1
        yield from deltas([5])

    handle = handle_on(FakeGenerator(script))
    handle.batch(PROMPTS, max_concurrency=3, progress=False)
    assert most == 3
    with pytest.raises(RequestError, match="max_concurrency"):
        handle.batch(PROMPTS, max_concurrency=0)
    for odd in ("5", 1.5, True):
        with pytest.raises(RequestError, match="max_concurrency"):
            handle.batch(PROMPTS, max_concurrency=odd)  # type: ignore[call-overload]
    for prompts in ("abc", None, {"a": 1}):
        with pytest.raises(RequestError, match="prompts: give a list"):
            handle.batch(prompts, progress=False)  # type: ignore[call-overload]
    kinds = [type(one) for one in handle.batch([PROMPTS[0], None], progress=False, return_exceptions=True)]  # type: ignore[list-item]
    assert kinds[1] is RequestError


def test_refused_prompts_are_asked_again_after_as_long_as_the_server_says(handle_on: Connect) -> None:
    asked: dict[int, list[float]] = {}

    def script(request: GenerateRequest) -> list[Any]:
        times = asked.setdefault(request.prompt[-1], [])
        times.append(time.monotonic())
        if len(times) < 3 and request.prompt[-1] % 2:
            wait = 1.0 if len(times) == 1 else None
            return [RefusedError(FailureCode.QUEUE_FULL, "full", wait)]
        return deltas([request.prompt[-1]])

    answers = handle_on(FakeGenerator(script)).batch(PROMPTS[:4], progress=False, max_tokens=1)
    assert [answer.token_ids[0] for answer in answers] == [8, 9, 10, 11]
    assert {token: len(times) for token, times in asked.items()} == {8: 1, 9: 3, 10: 1, 11: 3}
    assert 1.0 <= asked[9][1] - asked[9][0] < 3.0


@pytest.mark.parametrize(
    "refusal",
    [
        RefusedError(FailureCode.QUEUE_FULL, "come back tomorrow", 86400.0),
        RefusedError(FailureCode.DEADLINE, "too late"),
        RefusedError(FailureCode.INTERNAL, "a defect"),
    ],
)
def test_what_waiting_does_not_help_is_asked_once(handle_on: Connect, refusal: RefusedError) -> None:
    generator = FakeGenerator(lambda request: [refusal])
    with pytest.raises(RefusedError, match=str(refusal)):
        handle_on(generator).batch(PROMPTS[:1], progress=False)
    assert len(generator.submitted) == 1


def test_patience_ends(handle_on: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_batch, "MAX_ATTEMPTS", 2)
    generator = FakeGenerator(lambda request: [RefusedError(FailureCode.OVERLOADED, "busy", 1.0)])
    with pytest.raises(RefusedError, match="busy"):
        handle_on(generator).batch(PROMPTS[:1], progress=False)
    assert len(generator.submitted) == 2


def test_failures_are_raised_or_stand_in_their_places(handle_on: Connect) -> None:
    handle = handle_on(FakeGenerator(last_token))
    mixed = ["", PROMPTS[0], [10**6], PROMPTS[1]]
    found = handle.batch(mixed, progress=False, return_exceptions=True, max_tokens=1)
    kinds = [type(outcome).__name__ for outcome in found]
    assert kinds == ["RequestError", "Completion", "RequestError", "Completion"]
    assert isinstance(found[0], RequestError)
    assert found[0].field == "prompt"
    with pytest.raises(RequestError, match="prompt"):
        handle.batch(mixed, progress=False, max_tokens=1)


def test_the_bar_counts_prompts_tokens_and_failures(handle_on: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    handle = handle_on(FakeGenerator(last_token))
    handle.batch([*PROMPTS, ""], return_exceptions=True, max_tokens=1)
    shown = capsys.readouterr()
    assert "21/21" in shown.err
    assert "tokens/s, 1 failed" in shown.err
    assert shown.out == ""
    handle.batch(PROMPTS, progress=False, max_tokens=1)
    assert capsys.readouterr().err == ""


def test_beside_a_running_loop_and_on_it(handle_on: Connect) -> None:
    handle = handle_on(FakeGenerator(last_token))

    async def main() -> None:
        inside = handle.batch(PROMPTS[:3], progress=False, max_tokens=1)  # as in a notebook
        awaited = await handle.abatch(PROMPTS[:3], BatchPlan(progress=False), max_tokens=1)
        for outcomes in (inside, awaited):
            tokens = [None if isinstance(outcome, PenstockError) else outcome.token_ids[0] for outcome in outcomes]
            assert tokens == [8, 9, 10]
        await handle.aclose()

    asyncio.run(main())
