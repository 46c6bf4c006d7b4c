"""A cluster brought up by the command that users type, `penstock serve`, in its own process, and asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fakes.launched_cluster import LaunchedCluster
from fakes.ports import free_port

PENSTOCK = Path(sys.executable).parent / "penstock"


class ServedCluster(LaunchedCluster):
    """`arguments` follow `penstock serve`; `configuration` becomes the sections of its YAML file."""

    def __init__(self, folder: Path, arguments: Sequence[str], configuration: Mapping[str, Any] | None = None) -> None:
        self.port = free_port()
        self.url = self.admin_url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "serve.log"
        self._see_nothing_yet()
        command = [str(PENSTOCK), "serve", *arguments, "--port", str(self.port), "--admin", "shared"]
        if configuration:
            file = folder / "cluster.yaml"
            file.write_text(json.dumps(configuration))  # JSON is YAML
            command += ["--config", str(file)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.http = httpx.Client(base_url=self.url, trust_env=False, timeout=60.0)


@dataclass
class Choice:
    """One choice of an answer, streamed or not. `top` holds per token {token id: logprob}, the chosen one included."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: list[int] = field(default_factory=list)
    pieces: int = 0

    def add(self, raw: Mapping[str, Any]) -> None:
        """Take in one object of `choices`."""
        self.pieces += 1
        self.tokens += raw["token_ids"]
        self.prompt = raw.get("prompt_token_ids") or self.prompt
        self.finish_reason = raw["finish_reason"]
        found = raw.get("logprobs")
        if found:
            self.logprobs += found["token_logprobs"]
            self.top += [
                {int(k.removeprefix("token_id:")): v for k, v in step.items()} for step in found["top_logprobs"]
            ]


@dataclass
class Completion:
    choices: list[Choice]
    cached_tokens: int


async def complete(url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Completion]:
    """All of them at once; each body may ask for `stream`. Raises AssertionError for anything but an answer."""
    limits = httpx.Limits(max_connections=len(bodies))
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=120.0, limits=limits) as client:
        return list(await asyncio.gather(*(_complete(client, body) for body in bodies)))


async def _complete(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Completion:
    given = {"return_token_ids": True, **body}
    choices = [Choice() for _ in range(given.get("n", 1))]
    if not given.get("stream"):
        answer = await client.post("/v1/completions", json=given)
        assert answer.status_code == 200, answer.text
        whole = answer.json()
        for raw in whole["choices"]:
            choices[raw["index"]].add(raw)
        return Completion(choices, _cached(whole))
    cached = 0
    async with client.stream("POST", "/v1/completions", json={**given, "stream_options": {"include_usage": True}}) as r:
        assert r.status_code == 200, (await r.aread()).decode()
        lines = [line async for line in r.aiter_lines() if line]
    assert lines[-1] == "data: [DONE]", lines[-1]
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        assert "error" not in event, event
        for raw in event["choices"]:
            choices[raw["index"]].add(raw)
        if event["usage"] is not None:
            cached = _cached(event)
    return Completion(choices, cached)


def _cached(answer: Mapping[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
