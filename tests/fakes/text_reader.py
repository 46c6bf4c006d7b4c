"""Reads many streamed completions at once in a process of its own: a server must not share its core with its readers.

`TextReader` is the test's side. The process gets one JSON line (url, goal, bodies), prints one when `goal` tokens have
come (the token ids of every text so far), and one at the end (what each came to).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from penstock.cluster.bench.event_stream import Outcome, stream_completion

PATIENCE_S = 240.0
LOOK_S = 0.01
LONGEST_LINE = 1 << 26


class TextReader:
    """A context manager around the process."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, stdin=pipe, stdout=pipe, limit=LONGEST_LINE, cwd=Path(__file__).parent
        )
        return self

    async def begin(self, url: str, goal: int, bodies: Sequence[dict[str, Any]]) -> list[list[int]]:
        """Send all; returns at the goal, with the tokens of every text at that moment."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"url": url, "goal": goal, "bodies": list(bodies)}).encode() + b"\n")
        return list(await self._line())

    async def results(self) -> list[dict[str, Any]]:
        """`tokens`, `text`, `finish_reason`, `error`, `ttft_s` and `gap_s` (the longest) of every text, in order."""
        return list(await self._line())

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _line(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(await asyncio.wait_for(self._process.stdout.readline(), PATIENCE_S))


async def _read_all(given: dict[str, Any]) -> None:
    outcomes = [Outcome() for _ in given["bodies"]]
    reading = asyncio.gather(
        *(
            stream_completion(given["url"], "", body, PATIENCE_S, outcome)
            for body, outcome in zip(given["bodies"], outcomes, strict=True)
        )
    )
    # A look now and then is cheaper than an event per token
    while not reading.done() and sum(len(o.token_ids) for o in outcomes) < given["goal"]:  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)
    print(json.dumps([outcome.token_ids for outcome in outcomes]), flush=True)
    await reading
    print(json.dumps([_result(outcome) for outcome in outcomes]), flush=True)


def _result(outcome: Outcome) -> dict[str, Any]:
    return {
        "tokens": outcome.token_ids,
        "text": outcome.text,
        "finish_reason": outcome.finish_reason,
        "error": outcome.error,
        "ttft_s": outcome.ttft_s if outcome.chunks else 0.0,
        "gap_s": max(outcome.itl_s, default=0.0),
    }


if __name__ == "__main__":
    asyncio.run(_read_all(json.loads(sys.stdin.readline())))
