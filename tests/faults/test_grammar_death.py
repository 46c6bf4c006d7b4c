"""The decode worker dies under texts that follow a grammar: others go on, and every text is what it would have been."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import jsonschema
import pytest
from fakes.grammars import ENDS, PERSON, SPECS, text_of
from fakes.liveness import alive
from fakes.variants import Variant, request
from tokenizers import Tokenizer

from penstock.cluster.local import LocalCluster
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.protocol import GenerateRequest, Role, SamplingParams
from penstock.workers.settings import WorkerSettings

STREAMS = 24
VARIANT = Variant(split=True, chunk=64, caching=True, preempt=False)


def requests() -> list[GenerateRequest]:
    """Half of them JSON records, greedy and drawn."""
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    found = []
    for number in range(STREAMS):
        prompt = tuple(tokenizer.encode(f"Write a JSON record for person {number}, who is {number + 20}.").ids)
        spec = SPECS[0] if number % 2 else SPECS[1 + number // 2 % 2]
        heat = 0.0 if number % 3 else 1.2
        sampling = SamplingParams(180, heat, seed=number, stop_token_ids=ENDS, grammar=spec)
        found.append(request(f"g{number}", prompt, sampling))
    return found


def workers() -> list[WorkerSettings]:
    prefill, decode = VARIANT.workers(EMBEDDED_MODEL)
    other = WorkerSettings(
        "decode-1", Role.DECODE, cluster_key=decode.cluster_key, scheduler=decode.scheduler, kv=decode.kv,
        runner=decode.runner,
    )  # fmt: skip
    return [prefill, decode, other]


@pytest.mark.timeout(110)
def test_decode_worker_killed_in_the_middle_of_texts(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = LocalCluster(workers(), VARIANT.router, log_file=tmp_path / "log")
        async with cluster, asyncio.timeout(90):
            seen: list[list[int]] = []
            under_way = asyncio.Event()

            async def one(asked: GenerateRequest, tokens: list[int]) -> list[int]:
                async for delta in cluster.generator.submit(asked):
                    tokens += delta.tokens
                    if sum(1 for each in seen if each) >= STREAMS // 2 and sum(map(len, seen)) >= STREAMS * 4:
                        under_way.set()
                return tokens

            async def everybody() -> list[list[int]]:
                seen[:] = [[] for _ in range(STREAMS)]
                return list(await asyncio.gather(*map(one, requests(), seen)))

            undisturbed = await everybody()
            under_way.clear()
            running = asyncio.ensure_future(everybody())
            await under_way.wait()
            killed = next(status for status in cluster.fleet.workers() if status.id == "decode-0")
            pids = {pid for status in cluster.fleet.workers() for pid in status.pids}
            cluster.kill("decode-0")
            cut_short = [len(tokens) for tokens in seen]
            found = await running
            print(f"killed {killed.pids} after {sum(cut_short)} of {sum(map(len, found))} tokens")
            assert sum(cut_short) < sum(map(len, found)), "everything had ended before the fault"
            assert found == undisturbed
            records = [tokens for number, tokens in enumerate(found) if number % 2 and tokens[-1] in ENDS]
            assert len(records) >= STREAMS // 4  # the others were still at it after so many tokens
            for tokens in records:
                jsonschema.validate(json.loads(text_of(tokens)), PERSON)
            pids |= {pid for status in cluster.fleet.workers() for pid in status.pids}
        assert [pid for pid in pids if alive(pid)] == []

    asyncio.run(scenario())
