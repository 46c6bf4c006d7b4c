"""A lean HTTP client for one streamed completion: when each chunk came, and what the server counted.

Used by `runner.py`. Plain asyncio streams, since a general client would cost more per chunk than the server does and
so hide what is measured. One connection per request, HTTP/1.1, chunked or closed bodies.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from penstock.cluster.trust import trust

MAX_LINE_BYTES = 1 << 24


@dataclass(slots=True)
class Outcome:
    """One request as the client saw it. Times are monotonic seconds; `chunks` are those that carried choices."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    sent: float = 0.0
    chunks: list[float] = field(default_factory=list)
    error: str = ""
    scheduled: float = 0.0  # when the plan wanted it sent; set by who sends
    token_ids: list[int] = field(default_factory=list)  # of the answer, where the request asks for them
    text: str = ""
    finish_reason: str = ""

    @property
    def ttft_s(self) -> float:
        """First streamed chunk minus send."""
        return self.chunks[0] - self.sent

    @property
    def latency_s(self) -> float:
        """Last streamed chunk minus send."""
        return self.chunks[-1] - self.sent

    @property
    def tpot_s(self) -> float:
        """(latency - TTFT) / (output tokens - 1); zero for a single token."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def itl_s(self) -> list[float]:
        """Gap before each chunk but the first."""
        return [after - before for before, after in zip(self.chunks, self.chunks[1:], strict=False)]


async def stream_completion(
    url: str, api_key: str, body: dict[str, Any] | bytes, timeout_s: float, outcome: Outcome | None = None
) -> Outcome:
    """POST `/v1/completions` and read it to its end, into `outcome` if given. Failures are in `error`, never raised."""
    outcome = outcome or Outcome()
    try:
        async with asyncio.timeout(timeout_s):
            await _exchange(url, api_key, body if isinstance(body, bytes) else json.dumps(body).encode(), outcome)
    except (OSError, ValueError, KeyError, EOFError, TimeoutError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    if not outcome.error and not outcome.chunks:
        outcome.error = "the answer held no token"
    return outcome


async def _exchange(url: str, api_key: str, body: bytes, outcome: Outcome) -> None:
    parts = urlsplit(url)
    secure = trust() if parts.scheme == "https" else None
    port = parts.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=MAX_LINE_BYTES)
    try:
        key = f"authorization: Bearer {api_key}\r\n" if api_key else ""
        head = f"POST {parts.path}/v1/completions HTTP/1.1\r\nhost: {parts.netloc}\r\nconnection: close\r\n{key}"
        outcome.sent = time.perf_counter()
        writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        status, headers = await _read_head(reader)
        if status != 200:
            text = b"".join([piece async for piece in _pieces(reader, headers)])
            outcome.error = f"HTTP {status}: {text[:300].decode(errors='replace')}"
            return
        await _read_events(_pieces(reader, headers), outcome)
    finally:
        writer.close()


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split(" ")[1]), headers


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """The body as it comes. Raises IncompleteReadError when it breaks off."""
    if headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _read_events(pieces: AsyncIterator[bytes], outcome: Outcome) -> None:
    pending = b""
    async for piece in pieces:
        now = time.perf_counter()
        *events, pending = (pending + piece).split(b"\n\n")
        for event in events:
            if event == b"data: [DONE]":
                return
            if event.startswith(b"data: "):
                _read_event(json.loads(event[6:]), now, outcome)
    raise EOFError("the stream ended without [DONE]")


def _read_event(event: dict[str, Any], now: float, outcome: Outcome) -> None:
    if "error" in event:
        raise ValueError(str(event["error"].get("message")))
    if event["choices"]:
        outcome.chunks.append(now)
        choice = event["choices"][0]
        outcome.token_ids += choice.get("token_ids") or ()
        outcome.text += choice.get("text") or ""
        outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
    elif usage := event.get("usage"):
        outcome.input_tokens = usage["prompt_tokens"]
        outcome.output_tokens = usage["completion_tokens"]
        outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
