"""Generations over real request paths and links; the one worker is scripted."""

import asyncio

import pytest
from fakes.scripted_worker import KEY, ScriptedWorker, frame, until

from penstock.cluster.generation import Generator, open_generator
from penstock.router.journey import RequestReport
from penstock.router.settings import RetrySettings, RouterSettings
from penstock.workers.errors import RefusedError, RequestError
from penstock.workers.protocol import (
    Cancel,
    EndReason,
    Failed,
    FailureCode,
    Generate,
    GenerateRequest,
    SamplingParams,
    Started,
)

SETTINGS = RouterSettings(retry=RetrySettings(no_worker_timeout_s=0.3))
REQUEST = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=8))


async def connected(worker: ScriptedWorker, reports: list[RequestReport]) -> Generator:
    generator = open_generator(SETTINGS, KEY, observe=reports.append)
    generator.links.update(worker.roster())
    assert await generator.links.wait_attached(5.0)
    return generator


async def slot_of(worker: ScriptedWorker) -> int:
    order = await worker.hear()
    assert isinstance(order, Generate)
    return order.slot


def test_tokens_are_read_in_order_and_the_end_comes_last() -> None:
    async def scenario() -> None:
        reports: list[RequestReport] = []
        async with ScriptedWorker() as worker:
            generator = await connected(worker, reports)
            generation = generator.submit(REQUEST)
            slot = await slot_of(worker)
            await worker.say(Started(slot, 1, 2))
            await worker.say(frame((slot, 1, 0, [5], 0)))
            first = await anext(generation)
            assert (first.tokens, first.end) == ((5,), EndReason.NONE)
            assert generation.cached_tokens == 2
            await worker.say(frame((slot, 1, 1, [6], 0)))
            await worker.say(frame((slot, 1, 2, [7], EndReason.STOP)))
            await until(lambda: generation.timings.ended is not None)  # told by a callback, a turn after the end
            rest = [delta async for delta in generation]
            assert [(delta.tokens, delta.end) for delta in rest] == [((6, 7), EndReason.STOP)]
            timings = generation.timings
            assert timings.first_token is not None
            assert timings.ended is not None
            assert timings.submitted <= timings.first_token <= timings.ended
            assert [report.terminal for report in reports] == ["completed"]
            assert generator.open_generations == 0
            await generator.close()

    asyncio.run(scenario())


def test_a_refusal_of_the_worker_reaches_the_reader_typed() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker:
            generator = await connected(worker, [])
            generation = generator.submit(REQUEST)
            await worker.say(Failed(await slot_of(worker), 1, FailureCode.BAD_REQUEST, "no such token"))
            with pytest.raises(RequestError, match="no such token"):
                await anext(generation)
            await generator.close()

    asyncio.run(scenario())


def test_without_a_worker_it_ends_in_time() -> None:
    async def scenario() -> None:
        generator = open_generator(SETTINGS, KEY)
        with pytest.raises(RefusedError) as refused:
            await asyncio.wait_for(anext(generator.submit(REQUEST)), 5.0)
        assert refused.value.code is FailureCode.NO_WORKER
        await generator.close()

    asyncio.run(scenario())


def test_cancel_reaches_the_worker_at_once() -> None:
    async def scenario() -> None:
        reports: list[RequestReport] = []
        async with ScriptedWorker() as worker:
            generator = await connected(worker, reports)
            generation = generator.submit(REQUEST)
            slot = await slot_of(worker)
            await worker.say(frame((slot, 1, 0, [5], 0)))
            await anext(generation)
            generation.cancel()
            assert await worker.hear() == Cancel(slot, 1)
            with pytest.raises(RefusedError) as refused:
                await anext(generation)
            assert refused.value.code is FailureCode.CANCELLED
            generation.cancel()
            assert [report.terminal for report in reports] == ["cancelled"]
            await generator.close()

    asyncio.run(scenario())


def test_a_reader_that_has_enough_ends_it_well() -> None:
    async def scenario() -> None:
        reports: list[RequestReport] = []
        async with ScriptedWorker() as worker:
            generator = await connected(worker, reports)
            generation = generator.submit(REQUEST)
            slot = await slot_of(worker)
            await worker.say(Started(slot, 1, 0))
            await worker.say(frame((slot, 1, 0, [5], 0)))
            assert (await anext(generation)).tokens == (5,)
            generation.finish()
            assert await worker.hear() == Cancel(slot, 1)
            await until(lambda: generation.ended)
            assert [(delta.tokens, delta.end) async for delta in generation] == [((), EndReason.STOP)]
            assert [(report.terminal, report.generated_tokens) for report in reports] == [("completed", 1)]
            await generator.close()

    asyncio.run(scenario())


def test_closing_the_generator_ends_every_generation() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker:
            generator = await connected(worker, [])
            readers = [asyncio.ensure_future(anext(generator.submit(REQUEST))) for _ in range(3)]
            await slot_of(worker)
            await generator.close()
            ends = await asyncio.gather(*readers, return_exceptions=True)
            assert [type(end) for end in ends] == [RefusedError] * 3
            assert generator.open_generations == 0

    asyncio.run(scenario())
