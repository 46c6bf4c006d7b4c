"""JSON of the answers to `/v1/completions` and `/v1/chat/completions`, streamed and whole.

One `AnswerFormat` per call, used by `service.py`. Streamed chunks are put together from prepared text: per chunk only
the new text is quoted, since this runs once per token of every request. Both kinds share everything but a few words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import Scores, Tally
from penstock.cluster.ingress.logprob_format import (
    TextOffsets,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from penstock.cluster.ingress.results import ChoiceResult
from penstock.cluster.text import TextCodec
from penstock.cluster.tool_calls.parsing import CallPiece
from penstock.router.emission import TokenLogprob

_NO_LOGPROBS = ',"logprobs":null'
DONE = b"data: [DONE]\n\n"
_quote: Callable[[str], str] = json.JSONEncoder(ensure_ascii=False).encode


class AnswerFormat:
    """Writes one call's answer. `chat` chooses the API; `scores` fills up while the call runs."""

    def __init__(
        self, call: Call, codec: TextCodec, chat: bool, head: Mapping[str, Any], scores: Mapping[int, Scores]
    ) -> None:
        self._call = call
        self._codec = codec
        self._chat = chat
        self._scores = scores
        self._head = {**head, "object": _object(chat, call.output.stream)}
        self._prefix = "data: " + json.dumps(self._head)[:-1] + ',"choices":['
        self._begun: set[int] = set()
        self._offsets: dict[int, TextOffsets] = {}

    def chunk(self, piece: Piece, tally: Tally) -> bytes:
        """The events for one piece: for chat also the one that opens the choice and the one that closes it."""
        usage = self._usage(tally)
        first = piece.index not in self._begun
        if first:
            self._begun.add(piece.index)
        if not self._chat:
            echoed = self._echoed(piece.index) if first else ""
            text = _quote(echoed + piece.text)
            reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
            extras = self._extras(piece, first)
            prompt = self._prompt_ids(piece.index) if first else ""
            choice = f'{{"index":{piece.index},"text":{text},"finish_reason":{reason}{extras}{prompt}}}'
            return f"{self._prefix}{choice}]{usage}}}\n\n".encode()
        events = ""
        if first:
            whole = usage + self._prompt_ids(0) if len(self._begun) == 1 else usage
            events = self._event(piece.index, '{"role":"assistant","content":""}', "null", _NO_LOGPROBS, whole)
        if piece.text or (piece.tokens and not piece.calls):
            delta = f'{{"content":{_quote(piece.text)}}}'
            events += self._event(piece.index, delta, "null", self._extras(piece, False), usage)
        for number, call in enumerate(call for call in piece.calls if not call.dropped):
            extras = self._extras(piece, False) if number == 0 and not piece.text else _NO_LOGPROBS
            events += self._event(piece.index, f'{{"tool_calls":[{_call_delta(call)}]}}', "null", extras, usage)
        if piece.finish_reason is not None:
            events += self._event(piece.index, "{}", f'"{piece.finish_reason}"', _NO_LOGPROBS, usage)
        return events.encode()

    def tail(self, tally: Tally, comment: bytes = b"") -> bytes:
        """What follows the last piece of a complete answer; `comment` stands before its end."""
        if not self._call.output.include_usage:
            return comment + DONE
        return f'{self._prefix}],"usage":{json.dumps(usage_object(tally))}}}\n\n'.encode() + comment + DONE

    def whole(self, results: Sequence[ChoiceResult], tally: Tally) -> dict[str, Any]:
        """The answer in one piece; `results` in the order of choices."""
        call = self._call
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        answer: dict[str, Any] = {**self._head, "choices": choices, "usage": usage_object(tally)}
        if self._chat and call.output.return_token_ids:
            answer["prompt_token_ids"] = list(call.prompts[0])
        if self._chat and call.output.prompt_logprobs:
            answer["prompt_logprobs"] = prompt_logprobs(self._codec, call.prompts[0], self._scores[0])
        return answer

    def _event(self, index: int, delta: str, reason: str, extras: str, whole: str) -> str:
        """`extras` go into the choice, `whole` beside it."""
        choice = f'{{"index":{index},"delta":{delta},"finish_reason":{reason}{extras}}}'
        return f"{self._prefix}{choice}]{whole}}}\n\n"

    def _echoed(self, index: int) -> str:
        """The prompt's text, where the answer begins with it."""
        call = self._call
        return call.texts[index // call.n] if call.output.echo else ""

    def _extras(self, piece: Piece, first: bool) -> str:
        extras = _NO_LOGPROBS
        if self._call.output.logprobs:
            extras = f',"logprobs":{json.dumps(self._logprobs(piece.index, piece.tokens, piece.logprobs or (), first))}'
        if self._call.output.return_token_ids:
            extras += f',"token_ids":{json.dumps(list(piece.tokens))}'
        return extras

    def _usage(self, tally: Tally) -> str:
        output = self._call.output
        if output.continuous_usage:
            return f',"usage":{json.dumps(usage_object(tally))}'
        return ',"usage":null' if output.include_usage else ""

    def _prompt_ids(self, index: int) -> str:
        if not self._call.output.return_token_ids:
            return ""
        return f',"prompt_token_ids":{json.dumps(list(self._call.prompts[index // self._call.n]))}'

    def _logprobs(
        self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob], first: bool
    ) -> dict[str, Any]:
        """Of these tokens, after the prompt's when an echo begins."""
        if self._chat:
            return chat_logprobs(self._codec, tokens, logprobs)
        if index not in self._offsets:
            self._offsets[index] = TextOffsets(self._codec, self._call.output.skip_special_tokens)
        walk, offsets = self._offsets[index], list[int]()
        entries: list[TokenLogprob | None] = [*logprobs]
        if first and self._call.output.echo:
            prompt = index // self._call.n
            offsets = walk.of_echo(self._call.prompts[prompt], self._call.texts[prompt])
            tokens, entries = [*self._call.prompts[prompt], *tokens], [*self._scores[prompt], *logprobs]
        offsets += walk.of_generated(tokens[len(offsets) :])
        return completion_logprobs(self._codec, tokens, entries, offsets)

    def _choice(self, index: int, result: ChoiceResult) -> dict[str, Any]:
        output, prompt = self._call.output, index // self._call.n
        text = "".join(result.text)
        choice: dict[str, Any] = {"index": index}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if result.calls:
                calls = [_call(call.id, call.name, "".join(call.arguments)) for call in result.calls]
                choice["message"] |= {"content": text or None, "tool_calls": calls}
        else:
            choice["text"] = self._echoed(index) + text
        choice["logprobs"] = self._logprobs(index, result.tokens, result.logprobs, True) if output.logprobs else None
        choice["finish_reason"] = result.finish_reason
        if output.return_token_ids:
            choice["token_ids"] = result.tokens
            if not self._chat:
                choice["prompt_token_ids"] = list(self._call.prompts[prompt])
        if output.prompt_logprobs and not self._chat:
            choice["prompt_logprobs"] = prompt_logprobs(self._codec, self._call.prompts[prompt], self._scores[prompt])
        return choice


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _call_delta(call: CallPiece) -> str:
    """A call's first piece has its id and name, the others only more of its arguments."""
    if call.id:
        return json.dumps({"index": call.index, **_call(call.id, call.name, call.arguments)})
    return json.dumps({"index": call.index, "function": {"arguments": call.arguments}})


def usage_object(tally: Tally) -> dict[str, Any]:
    """OpenAI's `usage`, with the cached share always told."""
    return {
        "prompt_tokens": tally.prompt,
        "completion_tokens": tally.completion,
        "total_tokens": tally.prompt + tally.completion,
        "prompt_tokens_details": {"cached_tokens": tally.cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def _object(chat: bool, stream: bool) -> str:
    if not chat:
        return "text_completion"
    return "chat.completion.chunk" if stream else "chat.completion"
