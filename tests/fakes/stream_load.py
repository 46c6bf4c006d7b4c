"""An open loop of streamed completions whose every token the oracle tells beforehand: failed or wrong is counted."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable

import httpx

from penstock.workers.oracle import expected_tokens
from penstock.workers.protocol import SamplingParams

VOCAB = 32000
Expected = Callable[[list[int], int], list[int]]


def oracle_answer(prompt: list[int], max_tokens: int) -> list[int]:
    return list(expected_tokens(prompt, SamplingParams(max_tokens=max_tokens), VOCAB))


class StreamLoad:
    """Runs in a thread of its own from `start` until `stop`; arrivals do not wait for answers."""

    def __init__(self, url: str, model: str, rate_s: float = 6.0, max_tokens: tuple[int, int] = (20, 120)) -> None:
        self.url = url
        self.failed: list[str] = []
        self.wrong = 0
        self.done = 0
        self.first_token_s: list[float] = []
        self.gaps_s: list[float] = []  # between two tokens of a stream
        self._model = model
        self._rate = rate_s
        self._lengths = max_tokens
        self._random = random.Random(7)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def start(self) -> StreamLoad:
        self._thread.start()
        return self

    def stop(self) -> None:
        """No more arrivals; returns when all answers are there."""
        self._stop.set()
        self._thread.join(120)
        if self._thread.is_alive():
            raise TimeoutError("answers are still missing")

    async def _run(self) -> None:
        streams: set[asyncio.Task[None]] = set()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # a connection per request
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=60.0, limits=limits) as client:
            while not self._stop.is_set():
                streams.add(asyncio.create_task(self._one(client)))
                await asyncio.sleep(self._random.expovariate(self._rate))
            await asyncio.gather(*streams)

    async def _one(self, client: httpx.AsyncClient) -> None:
        prompt = [self._random.randrange(1, VOCAB) for _ in range(self._random.randint(5, 200))]
        max_tokens = self._random.randint(*self._lengths)
        body = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
        began = time.monotonic()
        try:
            tokens = await self._read(client, {**body, "return_token_ids": True}, began)
        except (httpx.HTTPError, RuntimeError) as error:
            self.failed.append(f"{time.strftime('%X')} after {time.monotonic() - began:.2f} s: {error!r}")
            return
        self.done += 1
        self.wrong += tokens != oracle_answer(prompt, max_tokens)

    async def _read(self, client: httpx.AsyncClient, body: dict[str, object], began: float) -> list[int]:
        tokens: list[int] = []
        last = began
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {(await answer.aread()).decode()[:300]}")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return tokens
                if line.startswith("data: "):
                    now = time.monotonic()
                    if tokens:
                        self.gaps_s.append(now - last)
                    else:
                        self.first_token_s.append(now - began)
                    last = now
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(json.dumps(event["error"]))
                    tokens += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
        raise RuntimeError("the stream ended without [DONE]")
