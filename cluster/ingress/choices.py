"""Runs all choices of one call: one generation each, pieces in order per choice, everything cancelled together.

Called by `service.py` with an `on_piece` that writes or collects. Of several choices of one prompt the first goes
ahead to its first token; the others then find the prompt's blocks in the decode worker's prefix cache.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.choice_text import FINISH_REASONS, ChoiceText, Piece
from penstock.cluster.ingress.generator import Generation, Generator
from penstock.cluster.ingress.settings import IngressSettings
from penstock.cluster.text import TextCodec
from penstock.router.emission import Delta, TokenLogprob
from penstock.workers.errors import RefusedError
from penstock.workers.kv.prefix_cache import chain_digests
from penstock.workers.protocol import FailureCode, GenerateRequest

OnPiece = Callable[[Piece], Awaitable[None]]
Scores = tuple[TokenLogprob | None, ...]


class Tally:
    """Tokens of one call so far, as `usage` reports them. A prompt counts once, whatever its `n`."""

    __slots__ = ("cached", "completion", "prompt")

    def __init__(self, call: Call) -> None:
        self.prompt = call.prompt_tokens
        self.completion = 0
        self.cached = 0


@dataclass(frozen=True, slots=True)
class ChoiceRunner:
    """Everything one call's choices share. Piece index = prompt index x runs + number."""

    call: Call
    requests: tuple[GenerateRequest, ...]
    codec: TextCodec
    generator: Generator
    tally: Tally
    scores: dict[int, Scores] = field(default_factory=dict)  # by prompt, there before its first piece

    async def run(self, on_piece: OnPiece, all_at_once: bool) -> None:
        """Until every choice has ended. The first failure cancels the others and is raised."""
        if self.call.num_runs == 1:
            await self._choice(0, on_piece, None)
            return
        together = all_at_once and self.call.sampling.prompt_logprobs is None
        try:
            async with asyncio.TaskGroup() as group:
                for first in range(0, self.call.num_runs, self.call.runs):
                    lead = asyncio.Event()
                    group.create_task(self._choice(first, on_piece, lead))
                    for index in range(first + 1, first + self.call.runs):
                        group.create_task(self._follow(index, on_piece, None if together else lead))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _follow(self, index: int, on_piece: OnPiece, lead: asyncio.Event | None) -> None:
        if lead is not None:
            await lead.wait()
        await self._choice(index, on_piece, None)

    async def _choice(self, index: int, on_piece: OnPiece, lead: asyncio.Event | None) -> None:
        call = self.call
        text = ChoiceText(index, self.codec, call.output, call.sampling.min_tokens, call.tools)
        over = text.pass_over(call.resumption.emitted, call.resumption.end(call.sampling))
        if over is not None:
            await on_piece(Piece(index, "", (), None if call.sampling.logprobs is None else (), over))
            return
        generation = self.generator.submit(self.requests[index])
        tally, first, hidden = self.tally, True, self.call.output.hide_generated
        try:
            async for delta in generation:
                piece = _nothing(index, delta) if hidden else text.read(delta)
                tally.completion += len(piece.tokens)
                if first:
                    first = False
                    if index % self.call.runs == 0:
                        self._lead_began(index, generation)
                    if lead is not None:
                        lead.set()
                await on_piece(piece)
                if piece.finish_reason is not None:
                    generation.finish()
                    return
        finally:
            generation.cancel()

    def _lead_began(self, index: int, generation: Generation) -> None:
        """What the first choice of a prompt tells of the prompt."""
        self.tally.cached += generation.cached_tokens
        if self.call.sampling.prompt_logprobs is None:
            return
        scores = generation.prompt_logprobs
        if len(scores) != len(self.requests[index].prompt) or any(
            s is not None and math.isnan(s.logprob) for s in scores
        ):
            raise RefusedError(FailureCode.INTERNAL, "the prompt's logprobs are incomplete")
        self.scores[index // self.call.runs] = scores


def _nothing(index: int, delta: Delta) -> Piece:
    """In place of a token that nobody asked for."""
    reason = "length" if delta.end in FINISH_REASONS else None
    return Piece(index, "", (), None if delta.logprobs is None else (), reason)


def requests_of(call: Call, call_id: str, settings: IngressSettings, tenant: str = "default") -> list[GenerateRequest]:
    """One request per run, prompt-major; runs of one prompt differ only in their index and id.

    Only the first run of a prompt scores it.
    """
    root = settings.prefix_root(tenant, call.cache_salt, call.adapter)
    cached = settings.prefix_caching
    requests: list[GenerateRequest] = []
    for prompt, max_tokens in zip(call.prompts, call.max_tokens, strict=True):
        digests = chain_digests(root, prompt, settings.block_size) if cached else b""
        lead = GenerateRequest(
            request_id=f"{call_id}-{len(requests)}",
            prompt=prompt,
            sampling=replace(call.sampling, max_tokens=max_tokens),
            tenant=tenant,
            prefix_root=root,
            prefix_digests=digests,
            cache_prefix=cached,
            embed=call.embed,
            adapter=call.adapter,
        )
        requests.append(call.resumption.of(lead))
        unscored = replace(lead.sampling, prompt_logprobs=None)
        for number in range(1, call.runs):
            sampling = replace(unscored, choice=number)
            requests.append(replace(lead, request_id=f"{call_id}-{len(requests)}", sampling=sampling))
    return requests
