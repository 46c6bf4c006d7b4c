"""Runs all choices of one call: one generation each, pieces in order per choice, everything cancelled together.

Called by `app.py` with an `on_piece` that writes or collects. Of several choices of one prompt the first goes ahead
to its first token; the others then find the prompt's blocks in the decode worker's prefix cache.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.choice_text import ChoiceText, Piece
from penstock.cluster.ingress.generator import Generator
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import GenerateRequest

OnPiece = Callable[[Piece], Awaitable[None]]


class Tally:
    """Tokens of one call so far, as `usage` reports them. A prompt counts once, whatever its `n`."""

    __slots__ = ("cached", "completion", "prompt")

    def __init__(self, call: Call) -> None:
        self.prompt = sum(map(len, call.prompts))
        self.completion = 0
        self.cached = 0


@dataclass(frozen=True, slots=True)
class ChoiceRunner:
    """Everything one call's choices share."""

    call: Call
    requests: tuple[GenerateRequest, ...]
    codec: TextCodec
    generator: Generator
    tally: Tally

    async def run(self, on_piece: OnPiece, all_at_once: bool) -> None:
        """Until every choice has ended. The first failure cancels the others and is raised."""
        if self.call.num_choices == 1:
            await self._choice(0, on_piece, None)
            return
        try:
            async with asyncio.TaskGroup() as group:
                for first in range(0, self.call.num_choices, self.call.n):
                    lead = asyncio.Event()
                    group.create_task(self._choice(first, on_piece, lead))
                    for index in range(first + 1, first + self.call.n):
                        group.create_task(self._follow(index, on_piece, None if all_at_once else lead))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _follow(self, index: int, on_piece: OnPiece, lead: asyncio.Event | None) -> None:
        if lead is not None:
            await lead.wait()
        await self._choice(index, on_piece, None)

    async def _choice(self, index: int, on_piece: OnPiece, lead: asyncio.Event | None) -> None:
        text = ChoiceText(index, self.codec, self.call.output)
        generation = self.generator.submit(self.requests[index])
        tally, first = self.tally, True
        try:
            async for delta in generation:
                piece = text.read(delta)
                tally.completion += len(piece.tokens)
                if first:
                    first = False
                    if index % self.call.n == 0:
                        tally.cached += generation.cached_tokens
                    if lead is not None:
                        lead.set()
                await on_piece(piece)
                if piece.finish_reason is not None:
                    return
        finally:
            generation.cancel()


def requests_of(call: Call, call_id: str, settings: IngressSettings, tenant: str = "default") -> list[GenerateRequest]:
    """One request per choice, prompt-major; choices of one prompt differ only in their index and id."""
    root = settings.prefix_root(tenant, call.cache_salt)
    requests: list[GenerateRequest] = []
    for prompt, max_tokens in zip(call.prompts, call.max_tokens, strict=True):
        digests = chain_digests(root, prompt, settings.block_size) if settings.prefix_caching else b""
        lead = GenerateRequest(
            request_id=f"{call_id}-{len(requests)}",
            prompt=prompt,
            sampling=replace(call.sampling, max_tokens=max_tokens),
            tenant=tenant,
            prefix_root=root,
            prefix_digests=digests,
            cache_prefix=settings.prefix_caching,
        )
        requests.append(lead)
        for number in range(1, call.n):
            sampling = replace(lead.sampling, choice=number)
            requests.append(replace(lead, request_id=f"{call_id}-{len(requests)}", sampling=sampling))
    return requests
