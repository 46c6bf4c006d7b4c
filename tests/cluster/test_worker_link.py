"""One link against a real RPC server whose worker is scripted."""

import asyncio
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.scripted_worker import KEY, ScriptedWorker, frame, until
from fakes.worker_process import CLUSTER_KEY, WorkerProcess, oracle_settings

from penstock.cluster.channel import RequestChannel
from penstock.cluster.roster import RosterEntry, WorkerState
from penstock.cluster.worker_link import LinkIdentity, WorkerLink, token_logprobs
from penstock.router.emission import Emission, TokenLogprob
from penstock.router.port import Ended, Lost
from penstock.router.router import Router
from penstock.router.settings import RouterSettings
from penstock.workers.protocol import (
    OLDEST_WIRE_VERSION,
    Cancel,
    Embedding,
    EndReason,
    Failed,
    FailureCode,
    Generate,
    GenerateRequest,
    KVEvents,
    KVSnapshot,
    Load,
    PromptLogprobs,
    Role,
    SamplingParams,
    Started,
)

OLDER = Path(__file__).parents[1] / "fakes" / "older_worker.py"
REQUEST = GenerateRequest("r", (1, 2, 3), SamplingParams(max_tokens=8, logprobs=1))
LOAD = Load(1, 0.0, 0.01, 1, 0, 0, 900, 10, 0, 0, 0, False)


class OneLink:
    """A link with its router, as `Links` would hold it."""

    def __init__(self, worker: ScriptedWorker, key: str = KEY) -> None:
        self.router = Router(RouterSettings())
        self.link = WorkerLink(worker.entry(), LinkIdentity("router", 1, key, 1.0), self.router)

    def post_to(self, worker_id: str) -> WorkerLink | None:
        return self.link if self.link.attached else None

    def open(self, attempt: int = 1) -> RequestChannel:
        emission = Emission.for_request(REQUEST)
        emission.begin_attempt(attempt)
        return RequestChannel(self, emission)

    async def __aenter__(self) -> "OneLink":
        await until(lambda: self.link.attached)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.link.close()


def test_an_order_goes_out_and_tokens_come_back() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker, OneLink(worker) as one:
            assert list(one.router.fleet.workers) == ["w"]
            channel = one.open()
            channel.generate("w", 1, REQUEST)
            heard = await worker.hear()
            assert heard == Generate(heard.slot, 1, REQUEST)  # type: ignore[union-attr]
            slot = heard.slot  # type: ignore[union-attr]
            await worker.say(Started(slot, 1, 3))
            assert (await channel.next_event(2.0)).body == Started(slot, 1, 3)
            await worker.say(frame((slot, 1, 0, [7], 0), (slot, 2, 1, [99], 0), (slot + 5, 1, 0, [98], 0)))
            await worker.say(frame((slot, 1, 1, [8, 9], EndReason.STOP)))
            assert isinstance((await channel.next_event(2.0)).body, Ended)
            assert channel.emission.take().tokens == (7, 8, 9)
            channel.close()

    asyncio.run(scenario())


def test_a_cancelled_request_is_told_and_late_rows_are_dropped() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker, OneLink(worker) as one:
            channel = one.open()
            channel.generate("w", 1, REQUEST)
            slot = (await worker.hear()).slot  # type: ignore[union-attr]
            channel.close()
            assert await worker.hear() == Cancel(slot, 1)
            await worker.say(frame((slot, 1, 0, [7], 0)))
            await worker.say(Failed(slot, 1, FailureCode.INTERNAL, "late"))
            other = one.open()
            other.generate("w", 1, REQUEST)
            fresh = (await worker.hear()).slot  # type: ignore[union-attr]
            assert fresh != slot, "a slot was used again while the old one's rows may still come"
            await worker.say(Started(fresh, 1, 0))
            assert isinstance((await other.next_event(2.0)).body, Started)
            assert channel.emission.count == other.emission.count == 0

    asyncio.run(scenario())


def test_a_broken_stream_is_told_to_router_and_seats_and_comes_back_with_a_higher_epoch() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker, OneLink(worker) as one:
            channel = one.open()
            channel.generate("w", 1, REQUEST)
            await worker.hear()
            await worker.say(LOAD)
            await until(lambda: one.link.load is not None)
            worker.cut()
            event = await channel.next_event(2.0)
            assert isinstance(event.body, Lost)
            assert list(one.router.fleet.workers) == [], "the router must know before the request is placed again"
            assert one.link.load is None
            await until(lambda: one.link.attached)
            assert [hello.router_epoch for hello in worker.hellos] == [2, 3]
            assert list(one.router.fleet.workers) == ["w"]

    asyncio.run(scenario())


def test_a_stream_cut_on_purpose_is_lost_once() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker, OneLink(worker) as one:
            channel = one.open()
            channel.generate("w", 1, REQUEST)
            one.link.cut("silent")
            assert (await channel.next_event(0.1)).body == Lost("silent")
            await until(lambda: one.link.attached)
            assert len(worker.hellos) == 2
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await channel.next_event(None)

    asyncio.run(scenario())


def test_leases_are_renewed_and_snapshots_asked_for_after_a_gap() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker, OneLink(worker) as one:
            await until(lambda: worker.snapshot_requests == 1)
            await worker.say(KVSnapshot(5, bytes(16)))
            await worker.say(KVEvents(6, bytes(range(8)), b""))
            await worker.say(KVEvents(9, bytes(range(8, 16)), b""))
            await until(lambda: worker.snapshot_requests == 2)
            await until(lambda: worker.renewals >= 2)
            assert one.link.attached

    asyncio.run(scenario())


def test_a_stranger_at_the_address_and_a_wrong_key_are_not_linked() -> None:
    async def scenario() -> None:
        async with ScriptedWorker("other") as worker:
            entry = dataclasses.replace(worker.entry(), worker_id="w")
            link = WorkerLink(entry, LinkIdentity("router", 1, KEY, 1.0), Router(RouterSettings()))
            await asyncio.sleep(0.2)
            assert not link.attached
            assert worker.hellos == []  # it proved to be another one before anything was said
            await link.close()
        async with ScriptedWorker() as worker:
            wrong = WorkerLink(worker.entry(), LinkIdentity("router", 1, "ee" * 32, 1.0), Router(RouterSettings()))
            await asyncio.sleep(0.2)
            assert not wrong.attached
            assert worker.hellos == []
            await wrong.close()

    asyncio.run(scenario())


def test_logprobs_follow_their_tokens() -> None:
    plain = frame((1, 1, 0, [5, 6], 0), (2, 1, 0, [7], 0))
    nan = math.nan
    full = dataclasses.replace(
        plain,
        logprobs=np.array([-0.5, -0.25, nan], np.float32),
        top_counts=np.array([2, 1, 0], np.uint8),
        top_ids=np.array([5, 9, 6], np.int32),
        top_logprobs=np.array([-0.5, -1.5, -0.25], np.float32),
    )
    first, second, none = token_logprobs(full)
    assert first is not None
    assert second is not None
    assert (first.logprob, first.top) == (-0.5, ((5, -0.5), (9, -1.5)))
    assert (second.logprob, second.top) == (-0.25, ((6, -0.25),))
    assert none is None


def test_what_is_said_of_the_prompt_reaches_the_emission_of_its_attempt() -> None:
    async def scenario() -> None:
        async with ScriptedWorker() as worker, OneLink(worker) as one:
            sampling = SamplingParams(max_tokens=8, prompt_logprobs=1)
            emission = Emission.for_request(dataclasses.replace(REQUEST, sampling=sampling, embed=True))
            emission.begin_attempt(2)
            channel = RequestChannel(one, emission)
            channel.prefill("w", 2, REQUEST, None)
            slot = (await worker.hear()).slot  # type: ignore[union-attr]
            values = np.array([-0.5, -0.75], np.float32)
            columns = (values, np.ones(2, np.uint8), np.array([4, 5], np.int32), values)
            await worker.say(PromptLogprobs(slot + 1, 2, 1, *columns))
            await worker.say(PromptLogprobs(slot, 1, 1, *columns))
            await worker.say(Embedding(slot, 1, values))
            await worker.say(frame((slot, 1, 0, [7], 0)))
            await worker.say(PromptLogprobs(slot, 2, 1, *columns))
            await worker.say(Embedding(slot, 2, values * 2))
            await worker.say(frame((slot, 2, 0, [7], EndReason.STOP)))
            while not isinstance((await channel.next_event(2.0)).body, Ended):
                pass
            expected = (None, TokenLogprob(-0.5, ((4, -0.5),)), TokenLogprob(-0.75, ((5, -0.75),)))
            assert channel.emission.prompt_logprobs == expected
            assert channel.emission.embedding is not None
            assert channel.emission.embedding.tolist() == [-1.0, -1.5]
            channel.close()

    asyncio.run(scenario())


def test_a_worker_of_the_version_before_is_spoken_to_in_its_own_words() -> None:
    async def scenario() -> None:
        code = f"import runpy; runpy.run_path({str(OLDER)!r}, run_name='__main__')"
        with WorkerProcess(oracle_settings(), command=(sys.executable, "-c", code)) as old:
            router = Router(RouterSettings())
            entry = RosterEntry("w", Role.MIXED, 1, 1, WorkerState.READY, old.address)
            link = WorkerLink(entry, LinkIdentity("router", 1, CLUSTER_KEY, 5.0), router)
            await until(lambda: link.attached)
            assert router.fleet.workers["w"].welcome.wire_version == OLDEST_WIRE_VERSION
            await link.close()

    asyncio.run(scenario())
