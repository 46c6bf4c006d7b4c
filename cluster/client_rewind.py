"""Answers that can be taken back: a stream with checkpoints, rolled back to one of them and gone on with differently.

    answer = handle.rewindable("def area(r):", max_tokens=200, temperature=0.8)
    for chunk in answer:
        if worth_keeping(answer.text):
            mark = answer.checkpoint()
        elif broken(answer.text):
            answer.rollback(mark, forbid_first=[wrong_token])      # or seed=..., temperature=...

Made by the two handles. A mark is a number of tokens and characters: it holds nothing in the cluster, costs nothing, is
good on any worker, and needs no release. Going on from one is a new request that names the tokens before it; their KV
is found in the prefix cache (or a tier) as long as that has room, and computed again otherwise. Noise depends on seed
and position alone, and penalties, stop strings, `min_tokens` and grammars follow from the tokens: with nothing changed,
the rest is the very same as if nothing had been taken back.

Invariant: nothing that was on its way when an answer was rolled back is ever part of it: its stream is closed first.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from penstock.cluster.client_answers import Chunk
from penstock.cluster.client_calls import Options, Prompt, Unpack
from penstock.workers.errors import RequestError


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in an answer: after so many tokens, when so much of their text was out."""

    tokens: int
    characters: int


class Answer:
    """What came so far, and what to ask for next; the same for both handles."""

    def __init__(self, prompt: Prompt, options: Options) -> None:
        """A seed is drawn where none is given: the rest of an answer must not depend on who goes on with it."""
        if options.get("n", 1) != 1 or options.get("best_of", 1) != 1:
            raise RequestError("n: an answer that can be taken back is one choice", field="n", code="unsupported_value")
        self.prompt = prompt
        self.token_ids: list[int] = list(options.get("emitted_token_ids", ()))
        self.text = ""
        self.finish_reason: str | None = None
        self._options = cast("Options", {"seed": secrets.randbits(63), **options})

    def checkpoint(self) -> Mark:
        """The place where the answer stands now."""
        return Mark(len(self.token_ids), len(self.text))

    def request(self) -> Options:
        """What to ask for, to go on from where the answer stands."""
        return cast("Options", {**self._options, "emitted_token_ids": list(self.token_ids)})

    def take(self, chunk: Chunk) -> None:
        """Add a chunk. What was forbidden right behind the last mark is now behind another token."""
        if chunk.token_ids:
            self._options.pop("forbidden_next_token_ids", None)
        self.token_ids += chunk.token_ids
        self.text += chunk.text
        self.finish_reason = self.finish_reason or chunk.finish_reason

    def go_back(self, mark: Mark, forbid_first: Sequence[int], changes: Options) -> None:
        """Forget what came after `mark`; `forbid_first` may not come next, and `changes` replace options.

        An answer that had ended there has still ended, unless something is forbidden or changed.
        """
        if mark.tokens > len(self.token_ids) or mark.characters > len(self.text):
            raise RequestError("mark: lies behind what the answer has; it was rolled back past it", field="mark")
        if mark == self.checkpoint() and not forbid_first and not changes:
            return
        del self.token_ids[mark.tokens :]
        self.text = self.text[: mark.characters]
        self.finish_reason = None
        self._options.pop("forbidden_next_token_ids", None)
        forbidden = {"forbidden_next_token_ids": list(forbid_first)} if forbid_first else {}
        self._options = cast("Options", {**self._options, **forbidden, **changes})


class RewindableStream(Answer):
    """Iterate for chunks; after `rollback` the iteration goes on with other ones. One thread at a time."""

    def __init__(self, prompt: Prompt, options: Options, begin: Callable[..., Iterator[Chunk]]) -> None:
        """`begin` is `Handle.stream`."""
        super().__init__(prompt, options)
        self._begin = begin
        self._stream: Iterator[Chunk] | None = None

    def __iter__(self) -> RewindableStream:
        return self

    def __next__(self) -> Chunk:
        """Raises what a stream raises; the answer then stands where it stood, and may be rolled back."""
        if self._stream is None:
            if self.finish_reason is not None:
                raise StopIteration
            self._stream = self._begin(self.prompt, **self.request())
        try:
            chunk = next(self._stream)
        except BaseException:
            self._stream = None
            raise
        self.take(chunk)
        return chunk

    def rollback(self, mark: Mark, *, forbid_first: Sequence[int] = (), **changes: Unpack[Options]) -> None:
        """Take back what came after `mark`; its work in the cluster ends. See `Answer.go_back`."""
        self.close()
        self.go_back(mark, forbid_first, changes)

    def close(self) -> None:
        """End the work in the cluster. Safe to call twice."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]  # a generator


class AsyncRewindableStream(Answer):
    """The same on asyncio."""

    def __init__(self, prompt: Prompt, options: Options, begin: Callable[..., AsyncIterator[Chunk]]) -> None:
        """`begin` is `Handle.astream`."""
        super().__init__(prompt, options)
        self._begin = begin
        self._stream: AsyncIterator[Chunk] | None = None

    def __aiter__(self) -> AsyncRewindableStream:
        return self

    async def __anext__(self) -> Chunk:
        """See `RewindableStream.__next__`."""
        if self._stream is None:
            if self.finish_reason is not None:
                raise StopAsyncIteration
            self._stream = self._begin(self.prompt, **self.request())
        try:
            chunk = await anext(self._stream)
        except BaseException:
            self._stream = None
            raise
        self.take(chunk)
        return chunk

    async def rollback(self, mark: Mark, *, forbid_first: Sequence[int] = (), **changes: Unpack[Options]) -> None:
        """See `RewindableStream.rollback`."""
        await self.aclose()
        self.go_back(mark, forbid_first, changes)

    async def aclose(self) -> None:
        """See `RewindableStream.close`."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.aclose()  # type: ignore[attr-defined]  # a generator
