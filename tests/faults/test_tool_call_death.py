"""The decode worker dies under streamed tool calls: every call keeps its id, and its arguments come once and whole."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fakes.embedded_app import embedded_codec
from fakes.grammars import PERSON
from fakes.liveness import alive
from fakes.variants import Variant

from penstock.cluster.ingress.openapi_bodies import Kind
from penstock.cluster.ingress.service import OpenAIService
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.ingress.stopwatch import Stopwatch
from penstock.cluster.local import LocalCluster
from penstock.cluster.metrics import Metrics
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.settings import WorkerSettings

STREAMS = 16
VARIANT = Variant(split=True, chunk=64, caching=True, preempt=False)
TOOLS = [
    {"type": "function", "function": {"name": "save_person", "parameters": PERSON}},
    {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "required": ["n"],
        "properties": {"n": {"type": "integer"}}, "additionalProperties": False}}},
]  # fmt: skip
Call = list[str]  # id, name, arguments


def body(number: int) -> dict[str, Any]:
    """A third of them name the tool, half are drawn."""
    choice: Any = "required" if number % 3 else {"type": "function", "function": {"name": "save_person"}}
    return {
        "messages": [{"role": "user", "content": f"Save person {number}, who is {number + 20}."}],
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": number % 2 == 0,
        "stream": True,
        "max_tokens": 150,
        "temperature": 1.1 if number % 2 else 0.0,
        "seed": number,
    }


def workers() -> list[WorkerSettings]:
    """The variant's pair and a second decode worker, with room for prompts that state tools."""
    prefill, decode = [
        replace(one, scheduler=replace(one.scheduler, max_model_len=640), kv=replace(one.kv, num_blocks=800))
        for one in VARIANT.workers(EMBEDDED_MODEL)
    ]
    return [prefill, decode, replace(decode, worker_id="decode-1")]


def calls_of(events: list[dict[str, Any]]) -> tuple[list[Call], str]:
    """Calls and finish reason, with OpenAI's rules for deltas asserted on the way."""
    calls, reasons = list[Call](), list[str]()
    for choice in (choice for event in events for choice in event["choices"]):
        assert not choice["delta"].get("content")
        reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        for delta in choice["delta"].get("tool_calls", ()):
            if "id" in delta:
                assert delta["index"] == len(calls)
                assert delta["function"]["arguments"] == ""
                calls.append([delta["id"], delta["function"]["name"], ""])
            calls[delta["index"]][2] += delta["function"]["arguments"]
    (reason,) = reasons
    return calls, reason


@pytest.mark.timeout(110)
def test_decode_worker_killed_in_the_middle_of_calls(tmp_path: Path) -> None:
    async def scenario() -> None:
        cluster = LocalCluster(workers(), VARIANT.router, log_file=tmp_path / "log")
        codec, metrics = embedded_codec(640), Metrics()
        async with cluster, asyncio.timeout(90):
            settings = IngressSettings(("tiny",), 640)
            service = OpenAIService(settings, codec, cluster.generator, metrics)
            streams: list[list[dict[str, Any]]] = []
            under_way = asyncio.Event()

            async def one(number: int) -> None:
                seen = streams[number]

                async def write(events: bytes) -> None:
                    lines = events.decode().split("\n\n")
                    seen.extend(json.loads(line[6:]) for line in lines if line and line != "data: [DONE]")
                    if sum(len(each) > 4 for each in streams) >= STREAMS // 2:
                        under_way.set()

                with service.admit(service.access.authorise([])) as visit:
                    watch = Stopwatch(metrics, None)
                    job = await service.prepare(Kind.CHAT, body(number), visit, watch)
                    await service.stream(job, write)

            async def everybody() -> list[tuple[list[Call], str]]:
                streams[:] = [[] for _ in range(STREAMS)]
                await asyncio.gather(*map(one, range(STREAMS)))
                return [calls_of(events) for events in streams]

            undisturbed = await everybody()
            under_way.clear()
            running = asyncio.ensure_future(everybody())
            await under_way.wait()
            pids = {pid for status in cluster.fleet.workers() for pid in status.pids}
            cluster.kill("decode-0")
            cut_short = sum(map(len, streams))
            found = await running
            print(f"killed after {cut_short} of {sum(map(len, streams))} events")
            assert cut_short < sum(map(len, streams)) - STREAMS, "everything had ended before the fault"
            plain = [[([call[1:] for call in calls], reason) for calls, reason in run] for run in (undisturbed, found)]
            assert plain[0] == plain[1]
            every = [call for run in (undisturbed, found) for calls, _ in run for call in calls]
            assert len({call[0] for call in every}) == len(every)
            ended = [calls for calls, reason in found if reason != "length"]
            assert len(ended) >= STREAMS // 4
            for name, arguments in (call[1:] for calls in ended for call in calls):
                (schema,) = [tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == name]
                jsonschema.validate(json.loads(arguments), schema)
            pids |= {pid for status in cluster.fleet.workers() for pid in status.pids}
        assert [pid for pid in pids if alive(pid)] == []

    asyncio.run(scenario())
