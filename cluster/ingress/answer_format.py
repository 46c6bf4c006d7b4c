"""JSON of the answers to `/v1/completions` and `/v1/chat/completions`, streamed and whole.

One `AnswerFormat` per call, used by `app.py`. Streamed chunks are put together from prepared text: per chunk only the
new text is quoted, since this runs once per token of every request. Both kinds share everything but a few words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.cluster.ingress.call import Call
from penstock.cluster.ingress.choice_text import Piece
from penstock.cluster.ingress.choices import Tally
from penstock.cluster.ingress.logprob_format import chat_logprobs, completion_logprobs
from penstock.cluster.text import TextCodec
from penstock.router.emission import TokenLogprob

DONE = b"data: [DONE]\n\n"
_quote: Callable[[str], str] = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(slots=True)
class ChoiceResult:
    """A whole choice, collected from its pieces."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Append one piece."""
        self.text.append(piece.text)
        self.tokens.extend(piece.tokens)
        self.logprobs.extend(piece.logprobs or ())
        self.finish_reason = piece.finish_reason


class AnswerFormat:
    """Writes one call's answer. `chat` chooses the API."""

    def __init__(self, call: Call, codec: TextCodec, chat: bool, answer_id: str, created: int) -> None:
        self._call = call
        self._codec = codec
        self._chat = chat
        self._head = {
            "id": answer_id,
            "object": _object(chat, call.output.stream),
            "created": created,
            "model": call.model,
        }
        self._prefix = "data: " + json.dumps(self._head)[:-1] + ',"choices":['
        self._begun: set[int] = set()
        self._offsets = [0] * call.num_choices

    def chunk(self, piece: Piece, tally: Tally) -> bytes:
        """The events for one piece: for chat also the one that opens the choice and the one that closes it."""
        text = _quote(piece.text)
        extras = self._extras(piece)
        usage = self._usage(tally)
        first = piece.index not in self._begun
        if first:
            self._begun.add(piece.index)
        if not self._chat:
            reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
            prompt = self._prompt_ids(piece.index) if first else ""
            choice = f'{{"index":{piece.index},"text":{text},"finish_reason":{reason}{extras}{prompt}}}'
            return f"{self._prefix}{choice}]{usage}}}\n\n".encode()
        events = ""
        if first:
            whole = usage + self._prompt_ids(0) if len(self._begun) == 1 else usage
            events = self._event(piece.index, '{"role":"assistant","content":""}', "null", "", whole)
        if piece.text or piece.tokens:
            events += self._event(piece.index, f'{{"content":{text}}}', "null", extras, usage)
        if piece.finish_reason is not None:
            events += self._event(piece.index, "{}", f'"{piece.finish_reason}"', "", usage)
        return events.encode()

    def tail(self, tally: Tally) -> bytes:
        """What follows the last piece of a complete answer."""
        if not self._call.output.include_usage:
            return DONE
        return f'{self._prefix}],"usage":{json.dumps(usage_object(tally))}}}\n\n'.encode() + DONE

    def whole(self, results: Sequence[ChoiceResult], tally: Tally) -> bytes:
        """The answer in one piece."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        answer: dict[str, Any] = {**self._head, "choices": choices, "usage": usage_object(tally)}
        if self._chat and self._call.output.return_token_ids:
            answer["prompt_token_ids"] = list(self._call.prompts[0])
        return json.dumps(answer).encode()

    def _event(self, index: int, delta: str, reason: str, extras: str, whole: str) -> str:
        """`extras` go into the choice, `whole` beside it."""
        choice = f'{{"index":{index},"delta":{delta},"finish_reason":{reason}{extras}}}'
        return f"{self._prefix}{choice}]{whole}}}\n\n"

    def _extras(self, piece: Piece) -> str:
        extras = ""
        if piece.logprobs is not None:
            extras = f',"logprobs":{json.dumps(self._logprobs(piece.index, piece.tokens, piece.logprobs))}'
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

    def _logprobs(self, index: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            return chat_logprobs(self._codec, tokens, logprobs)
        formatted, self._offsets[index] = completion_logprobs(self._codec, tokens, logprobs, self._offsets[index])
        return formatted

    def _choice(self, index: int, result: ChoiceResult) -> dict[str, Any]:
        wanted = self._call.sampling.logprobs is not None
        text = "".join(result.text)
        choice: dict[str, Any] = {"index": index}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        choice["logprobs"] = self._logprobs(index, result.tokens, result.logprobs) if wanted else None
        choice["finish_reason"] = result.finish_reason
        if self._call.output.return_token_ids:
            choice["token_ids"] = result.tokens
            if not self._chat:
                choice["prompt_token_ids"] = list(self._call.prompts[index // self._call.n])
        return choice


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
