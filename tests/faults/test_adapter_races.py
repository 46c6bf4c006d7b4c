"""Adapters are loaded, unloaded and exchanged under HTTP requests for them: right text or a typed error, and no other.

The whole front over two workers of this process, with fewer places than adapters. `-s` prints the row of the fault
table.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes.adapters import make_adapter
from fakes.embedded_app import EmbeddedApp, embedded_codec
from fakes.http_server import HttpServer

from penstock.cluster.ingress.adapters import Adapters
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.lora.projections import adaptable
from penstock.workers.model.config import read_config
from penstock.workers.settings import AdapterSettings, WorkerSettings

NAMES = ("a", "b", "c")
PROMPTS = [f"Tell me about number {number}." for number in range(4)]
SECONDS = 6.0
LEAST = {("tiny", "200"): 21, ("adapter", "200"): 21, ("adapter", "404"): 1}
LIMIT_S = 60.0


class AdaptedApp(EmbeddedApp):
    """With adapters under `home`, and one place for them."""

    def __init__(self, home: Path) -> None:
        self._adapters = AdapterSettings(str(home), max_loaded=1, max_rank=8, host_bytes=1 << 18)
        served = Adapters(self._adapters, adaptable(read_config(EMBEDDED_MODEL)), ("tiny",))
        super().__init__(embedded_codec(), adapters=served)

    def worker_settings(self) -> list[WorkerSettings]:
        return [replace(settings, adapters=self._adapters) for settings in super().worker_settings()]


async def ask(client: httpx.AsyncClient, model: str, prompt: str) -> tuple[int, str]:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    found: dict[str, Any] = answer.json()
    return answer.status_code, found["choices"][0]["text"] if answer.status_code == 200 else found["error"]["code"]


async def told(client: httpx.AsyncClient, path: str, **body: Any) -> int:
    return (await client.post(f"/v1/{path}_lora_adapter", json=body)).status_code


@pytest.mark.timeout(100)
def test_f38_loads_race_with_unloads_exchanges_and_requests(tmp_path: Path) -> None:
    home = tmp_path / "adapters"
    for name, seed in (*zip(NAMES, range(3), strict=True), ("a2", 9)):
        make_adapter(home / name, rank=4, seed=seed)

    async def scenario(url: str) -> None:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False, limits=limits) as client:
            truth: dict[tuple[str, str], set[str]] = {}
            for name, folder in (*zip(NAMES, NAMES, strict=True), ("a", "a2")):
                assert await told(client, "load", lora_name=name, lora_path=folder, load_inplace=True) == 200
                for prompt in PROMPTS:
                    status, text = await ask(client, name, prompt)
                    assert status == 200, text
                    truth.setdefault((name, prompt), set()).add(text)
            for prompt in PROMPTS:
                truth["tiny", prompt] = {(await ask(client, "tiny", prompt))[1]}
                assert not truth["tiny", prompt] & set().union(*(truth[name, prompt] for name in NAMES))
                assert len(truth["a", prompt]) == 2
            outcomes: Counter[tuple[str, str]] = Counter()
            calls: Counter[tuple[str, int]] = Counter()
            began = time.monotonic()

            def over() -> bool:
                """A slow machine takes longer to see every outcome."""
                spent_s = time.monotonic() - began
                return spent_s > (SECONDS if Counter(LEAST) <= outcomes else LIMIT_S)

            async def asks(number: int) -> None:
                rng = random.Random(number)
                while not over():
                    name, prompt = rng.choice(("tiny", *NAMES)), rng.choice(PROMPTS)
                    status, said = await ask(
                        client, rng.choice((name, f"tiny:{name}")) if name != "tiny" else name, prompt
                    )
                    if status == 200:
                        assert said in truth[name, prompt], f"{name} said something else"
                    else:
                        assert (status, said) == (404, "model_not_found")
                        assert name != "tiny"
                    outcomes[name if name == "tiny" else "adapter", str(status)] += 1

            async def changes(number: int) -> None:
                rng = random.Random(100 + number)
                while not over():
                    name, path = rng.choice(NAMES), rng.choice(("load", "load", "unload"))
                    folder = rng.choice(("a", "a2")) if name == "a" else name
                    body = {"lora_path": folder, "load_inplace": True} if path == "load" else {}
                    calls[path, await told(client, path, lora_name=name, **body)] += 1
                    await asyncio.sleep(rng.random() * 0.05)

            await asyncio.gather(*map(asks, range(12)), *map(changes, range(3)))
            print(f"F38 loads race with unloads and requests | {dict(outcomes)} | {dict(calls)}")
            assert {status for _, status in calls} == {200, 404}  # 404: it had been unloaded already
            assert Counter(LEAST) <= outcomes

    app = AdaptedApp(home)
    with HttpServer(app, graceful=True) as server:
        asyncio.run(scenario(server.url))
        deadline = time.monotonic() + 10
        while not app.idle and time.monotonic() < deadline:
            time.sleep(0.02)
        assert app.idle
        for worker in app._workers:
            scheduler = worker._engine._scheduler
            scheduler.check_integrity()
            assert scheduler._table.adapters.places is not None
            assert scheduler._table.adapters.places.holders == {}
            assert worker._engine.load().totals.adapters.failed == 0
