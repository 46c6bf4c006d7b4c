"""What openai's client sees when workers die under its streams: answers while somebody survives, errors when nobody."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import openai
import pytest
from fakes.oracle_cluster import VOCAB, Pace, oracle_workers

from penstock.cluster.config import load_config
from penstock.cluster.ingress.app import build_app
from penstock.cluster.ingress.listener import Listener
from penstock.cluster.ingress.settings import ingress_settings
from penstock.cluster.local import LocalCluster
from penstock.cluster.metrics import Metrics
from penstock.cluster.model_directory import describe
from penstock.cluster.text import load_text
from penstock.router.settings import AdmissionSettings, RetrySettings, RouterSettings
from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import SamplingParams

STREAMS = 40
TOKENS = 60


def listener_over(cluster: LocalCluster) -> Listener:
    config = load_config(values={"runner.kind": "oracle", "kv.num_blocks": 4096, "kv.block_size": 4}, environment={})
    model = describe(config.runner)
    text = load_text(model, True, config.scheduler.max_model_len)
    app = build_app(ingress_settings(config, model), text, cluster.generator, Metrics(), cluster.fleet)
    return Listener(app, "127.0.0.1", 0, shared=False, drain_s=1)


async def ask(client: openai.AsyncOpenAI, number: int, seen: Counter[str], under_way: asyncio.Event) -> str:
    """`right`, `wrong`, or the name of the exception that the client raised."""
    prompt = [(number * 101 + i) % VOCAB for i in range(30)]
    got: list[int] = []
    try:
        stream = await client.completions.create(
            model="oracle",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            extra_body={"return_token_ids": True},
        )
        async for chunk in stream:
            for choice in chunk.choices:
                got += choice.model_extra["token_ids"]
                seen["tokens"] += len(choice.model_extra["token_ids"])
                if seen["tokens"] >= STREAMS * 5:
                    under_way.set()
    except openai.APIError as error:
        return type(error).__name__
    return "right" if got == list(expected_tokens(prompt, SamplingParams(max_tokens=TOKENS), VOCAB)) else "wrong"


async def kill_decode_under_streams(decode_workers: int, log: Path) -> Counter[str]:
    pace = Pace(step_s=0.01)
    router = RouterSettings(
        admission=AdmissionSettings(ttft_target_s=120.0), retry=RetrySettings(no_worker_timeout_s=1.0)
    )
    cluster = LocalCluster(oracle_workers(1, decode_workers, pace), router, restart=False, log_file=log)
    async with cluster:
        listener = listener_over(cluster)
        listener.start()
        url = f"http://127.0.0.1:{listener.port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
            seen: Counter[str] = Counter()
            under_way = asyncio.Event()
            asking = [asyncio.ensure_future(ask(client, number, seen, under_way)) for number in range(STREAMS)]
            await under_way.wait()
            cluster.kill("decode-0")
            outcomes = Counter(await asyncio.wait_for(asyncio.gather(*asking), 40))
        await listener.stop()
    print(f"{decode_workers} decode workers, one killed: {dict(outcomes)}")
    return outcomes


@pytest.mark.timeout(60)
def test_streams_go_on_while_somebody_survives(tmp_path: Path) -> None:
    assert asyncio.run(kill_decode_under_streams(2, tmp_path / "log")) == {"right": STREAMS}


@pytest.mark.timeout(60)
def test_no_stream_ends_silently_when_nobody_survives(tmp_path: Path) -> None:
    outcomes = asyncio.run(kill_decode_under_streams(1, tmp_path / "log"))
    assert outcomes["right"] + outcomes["wrong"] == 0, "the fault did not fire, or a stream ended short in silence"
    assert set(outcomes) <= {"APIError", "APIConnectionError", "InternalServerError"}
