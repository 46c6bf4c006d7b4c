"""From the tokens of one choice to what its caller is shown: text, stop strings, finish reason.

One `ChoiceText` per choice, fed by `choices.py` with every delta. Pure. Text that could still become a stop string,
and bytes that are not yet a whole character, wait; tokens after a stop string are dropped and not counted. Stop
strings are looked for in what comes after the first `min_tokens` tokens only, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.cluster.ingress.call import OutputOptions
from penstock.cluster.stop_strings import StopMatcher
from penstock.cluster.text import TextCodec
from penstock.router.emission import Delta, TokenLogprob
from penstock.workers.protocol import EndReason

FINISH_REASONS = {EndReason.STOP: "stop", EndReason.LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Piece:
    """What one read adds to choice `index`; `finish_reason` is set on its last piece."""

    index: int
    text: str
    tokens: Sequence[int]
    logprobs: Sequence[TokenLogprob] | None
    finish_reason: str | None


class ChoiceText:
    """State of one choice's text."""

    __slots__ = ("_include_stop", "_index", "_matcher", "_min_tokens", "_seen", "_stream")

    def __init__(self, index: int, codec: TextCodec, output: OutputOptions, min_tokens: int = 0) -> None:
        self._index = index
        self._stream = codec.stream(output.skip_special_tokens)
        self._matcher = StopMatcher(output.stops, output.include_stop) if output.stops else None
        self._include_stop = output.include_stop
        self._min_tokens = min_tokens
        self._seen = 0

    def read(self, delta: Delta) -> Piece:
        """Take in everything new. A stop string ends the choice here, whatever the delta says."""
        tokens = delta.tokens
        shown = tokens[:-1] if delta.end is EndReason.STOP and not self._include_stop else tokens
        reason = FINISH_REASONS.get(delta.end)
        if self._matcher is None:
            text = self._stream.push(shown)
            if reason is not None:
                text += self._stream.finish()
            return Piece(self._index, text, tokens, delta.logprobs, reason)
        text, used = self._until_stop(self._matcher, shown)
        if self._matcher.stopped is None and reason is not None:
            rest = self._stream.finish()
            text += self._matcher.push(rest) if self._stops_count else rest
            text += self._matcher.finish()
        if self._matcher.stopped is None:
            return Piece(self._index, text, tokens, delta.logprobs, reason)
        logprobs = None if delta.logprobs is None else delta.logprobs[:used]
        return Piece(self._index, text, tokens[:used], logprobs, "stop")

    @property
    def _stops_count(self) -> bool:
        """Whether more than the least number of tokens is there."""
        return self._seen > self._min_tokens

    def _until_stop(self, matcher: StopMatcher, tokens: Sequence[int]) -> tuple[str, int]:
        """Safe text, and how many tokens it took to complete a stop (all of them if none is complete)."""
        text = ""
        for count, token in enumerate(tokens, 1):
            piece = self._stream.push((token,))
            self._seen += 1
            if not self._stops_count:
                text += piece
                continue
            text += matcher.push(piece)
            if matcher.stopped is not None:
                return text, count
        return text, len(tokens)
