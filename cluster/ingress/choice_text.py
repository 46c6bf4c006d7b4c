"""From the tokens of one choice to what its caller is shown: text, stop strings, tool calls, finish reason.

One `ChoiceText` per choice, fed by `choices.py` with every delta. Pure. Text that could still become a stop string,
and bytes that are not yet a whole character, wait; tokens after a stop string are dropped and not counted. Stop
strings are looked for in what comes after the first `min_tokens` tokens only, as vLLM does; tool calls are read out of
what is left then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.cluster.ingress.call import OutputOptions
from penstock.cluster.stop_strings import StopMatcher
from penstock.cluster.text import TextCodec
from penstock.cluster.tool_calls.parsing import CallParser, CallPiece
from penstock.cluster.tool_calls.tool_plan import ToolPlan
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
    calls: Sequence[CallPiece] = ()


class ChoiceText:
    """State of one choice's text."""

    __slots__ = ("_include_stop", "_index", "_matcher", "_min_tokens", "_parser", "_seen", "_stream", "_tools")

    def __init__(
        self, index: int, codec: TextCodec, output: OutputOptions, min_tokens: int = 0, tools: ToolPlan | None = None
    ) -> None:
        self._index = index
        self._tools = tools or ToolPlan()
        self._parser = self._tools.parser()
        self._stream = codec.stream(output.skip_special_tokens, show_calls=self._parser is not None)
        self._matcher = StopMatcher(output.stops, output.include_stop) if output.stops else None
        self._include_stop = output.include_stop
        self._min_tokens = min_tokens
        self._seen = 0

    def pass_over(self, tokens: Sequence[int], end: EndReason) -> str | None:
        """Tokens that were read before, elsewhere: their text is not shown again, but what follows depends on it. The
        finish reason if nothing can follow."""
        if not tokens:
            return None
        return self.read(Delta(tuple(tokens), None, end)).finish_reason

    def read(self, delta: Delta) -> Piece:
        """Take in everything new. A stop string ends the choice here, whatever the delta says, and so does the one
        tool call that was asked for."""
        if self._parser is None:
            return self._read(delta)
        if self._tools.several or len(delta.tokens) < 2:
            return self._with_calls(self._read(delta), self._parser)
        return self._until_call(delta, self._parser)

    def _until_call(self, delta: Delta, parser: CallParser) -> Piece:
        """Token by token, so that where the choice ends does not depend on how many came at once."""
        pieces: list[Piece] = []
        for number, token in enumerate(delta.tokens, 1):
            logprobs = None if delta.logprobs is None else delta.logprobs[number - 1 : number]
            end = delta.end if number == len(delta.tokens) else EndReason.NONE
            pieces.append(self._with_calls(self._read(Delta((token,), logprobs, end)), parser))
            if pieces[-1].finish_reason is not None:
                break
        used = sum(len(piece.tokens) for piece in pieces)
        return Piece(
            self._index,
            "".join(piece.text for piece in pieces),
            delta.tokens[:used],
            None if delta.logprobs is None else delta.logprobs[:used],
            pieces[-1].finish_reason,
            [call for piece in pieces for call in piece.calls],
        )

    def _with_calls(self, piece: Piece, parser: CallParser) -> Piece:
        reading, reason = parser.push(piece.text), piece.finish_reason
        content, calls = reading.content, reading.calls
        if parser.complete and not self._tools.several:
            calls, reason = _first_call(calls), "stop"
        elif reason is not None:
            last = parser.finish(cut=reason == "length")
            content, calls = content + last.content, (*calls, *last.calls)
        if reason == "stop" and parser.complete and not self._tools.named:
            reason = "tool_calls"
        return replace(piece, text=content, calls=calls, finish_reason=reason)

    def _read(self, delta: Delta) -> Piece:
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


def _first_call(calls: Sequence[CallPiece]) -> tuple[CallPiece, ...]:
    return tuple(call for call in calls if call.index == 0)
