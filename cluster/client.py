"""The Python handle: `connect()` to a running cluster, then generate, stream, batch, score and embed.

    from penstock.cluster.client import connect
    handle = connect()
    print(handle.generate("12+34=", max_tokens=8).text)
    for chunk in handle.stream([{"role": "user", "content": "Hello"}]):
        print(chunk.text, end="")
    answers = handle.batch(["1+1=", "2+2="], max_tokens=4)

A prompt is text or token ids (`/v1/completions`), or a list of messages (`/v1/chat/completions`). It is HTTP
underneath, so limits and errors are the same; failures raise the same typed errors as inside the cluster: RequestError
names the field, RefusedError carries a FailureCode. Imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

import httpx

from penstock.cluster.client_answers import (
    Choice,
    Chunk,
    Completion,
    Embeddings,
    Score,
    ToolCall,
    Usage,
    broken_stream,
    joined,
    problem_of,
    read_event,
)
from penstock.cluster.client_async import JSON_HEADERS, AsyncHandle, httpx_settings, read_answer, transport_problem
from penstock.cluster.client_batch import BatchPlan, Outcome, run_batch
from penstock.cluster.client_calls import (
    Call,
    Options,
    Prompt,
    Unpack,
    detokenize_call,
    embed_calls,
    generate_call,
    score_call,
    tokenize_call,
)
from penstock.cluster.client_rewind import AsyncRewindableStream, Mark, RewindableStream
from penstock.cluster.config import DEFAULT_URL, ray_is_announced, stated_server

__all__ = [
    "Choice",
    "Chunk",
    "Completion",
    "Embeddings",
    "Handle",
    "Mark",
    "RewindableStream",
    "Score",
    "ToolCall",
    "Usage",
    "connect",
]

Answer = TypeVar("Answer")
Messages = Sequence[Mapping[str, Any]]


def connect(
    url: str | None = None, api_key: str | None = None, *, cluster: str | None = None, ca_file: str | None = None
) -> Handle:
    """A handle for one cluster; no request is sent yet.

    Which one: `url`; else $PENSTOCK_URL; else, inside a Ray job, task or actor or with `cluster` (its name), the
    cluster that runs on that Ray; else http://127.0.0.1:8000. The key is `api_key`, else $PENSTOCK_API_KEY. `ca_file`,
    else $PENSTOCK_CA_FILE: who must have signed an https server's certificate, instead of the usual ones. Raises
    ConfigError when the cluster named, or the only one, cannot be found.
    """
    stated, key = stated_server(url, api_key)
    if stated is None and (cluster is not None or ray_is_announced()):
        from penstock.cluster.client_lookup import find_url  # late: it imports Ray

        stated = find_url(cluster or "", key)
    return Handle(stated or DEFAULT_URL, key, ca_file)


class Handle:
    """One cluster seen from outside. The blocking calls are thread-safe; those on asyncio belong to one event loop."""

    def __init__(self, url: str, api_key: str, ca_file: str | None = None) -> None:
        self.url = url
        self._ca_file = ca_file
        self._api_key = api_key
        self._client = httpx.Client(**httpx_settings(url, api_key, ca_file))  # type: ignore[arg-type]
        self._async = AsyncHandle(url, api_key, ca_file)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer."""
        return self._ask(generate_call(prompt, options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Chunk]:
        """Pieces as they come; the last one carries `usage`. A stream that does not end properly raises.

        Closing the iterator ends the work in the cluster.
        """
        call = generate_call(prompt, options, stream=True)
        content, headers = call.content(), {**JSON_HEADERS, **call.headers}
        begun = False
        try:
            with self._client.stream("POST", call.path, content=content, headers=headers) as response:
                if response.status_code != httpx.codes.OK:
                    raise problem_of(response.status_code, response.read(), response.headers)
                for line in response.iter_lines():
                    begun = True
                    event = read_event(line)
                    if event.done:
                        return
                    yield from event.chunks
        except httpx.HTTPError as error:
            raise (broken_stream() if begun else transport_problem(self.url, error)) from error
        raise broken_stream()

    def rewindable(self, prompt: Prompt, **options: Unpack[Options]) -> RewindableStream:
        """`stream` with checkpoints to which the answer can be rolled back; see `client_rewind.py`."""
        return RewindableStream(prompt, options, self.stream)

    @overload
    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        max_concurrency: int = 32,
        progress: bool = True,
        ordered: bool = True,
        return_exceptions: Literal[False] = False,
        **options: Unpack[Options],
    ) -> list[Completion]: ...

    @overload
    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        max_concurrency: int = 32,
        progress: bool = True,
        ordered: bool = True,
        return_exceptions: bool,
        **options: Unpack[Options],
    ) -> list[Outcome]: ...

    def batch(
        self,
        prompts: Iterable[Prompt],
        *,
        max_concurrency: int = 32,
        progress: bool = True,
        ordered: bool = True,
        return_exceptions: bool = False,
        **options: Unpack[Options],
    ) -> list[Completion] | list[Outcome]:
        """Answers to all prompts, so many at once, with a progress bar on standard error.

        Prompts that are refused with 429 or 503 are asked again, after as long as the server says. What fails for good
        is raised and ends the batch, or stands in its prompt's place when `return_exceptions`. `ordered=False` gives
        the answers as they ended.
        """
        plan = BatchPlan(max_concurrency, progress, ordered, return_exceptions)
        return run_apart(self._batch_apart(prompts, options, plan))

    def score(self, prompt: Prompt, *, top: int = 0, model: str | None = None) -> Score:
        """Log-probability of every token of the prompt after the ones before it, and of `top` others in its place."""
        return self._ask(score_call(prompt, top, model))

    def embed(self, inputs: Sequence[str] | Sequence[Sequence[int]], *, model: str | None = None) -> Embeddings:
        """One vector per text (or list of token ids): the model's last hidden state at its last token, of length 1."""
        return joined([self._ask(call) for call in embed_calls(inputs, model)])

    def tokenize(
        self, prompt: str | Messages, *, add_special_tokens: bool = True, model: str | None = None
    ) -> tuple[int, ...]:
        """Token ids of a text, or of the prompt that messages make."""
        return self._ask(tokenize_call(prompt, add_special_tokens, model))

    def detokenize(self, token_ids: Sequence[int], *, model: str | None = None) -> str:
        """Text of token ids."""
        return self._ask(detokenize_call(token_ids, model))

    async def agenerate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """`generate` on asyncio."""
        return await self._async.generate(prompt, **options)

    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """`stream` on asyncio."""
        return self._async.stream(prompt, **options)

    def arewindable(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncRewindableStream:
        """`rewindable` on asyncio."""
        return AsyncRewindableStream(prompt, options, self.astream)

    async def abatch(
        self, prompts: Iterable[Prompt], plan: BatchPlan | None = None, **options: Unpack[Options]
    ) -> list[Outcome]:
        """`batch` on asyncio; `plan` holds its settings."""
        return await run_batch(self._async, prompts, options, plan or BatchPlan())

    async def ascore(self, prompt: Prompt, *, top: int = 0, model: str | None = None) -> Score:
        """`score` on asyncio."""
        return await self._async.ask(score_call(prompt, top, model))

    async def aembed(self, inputs: Sequence[str] | Sequence[Sequence[int]], *, model: str | None = None) -> Embeddings:
        """`embed` on asyncio."""
        return joined(await self._async.ask_all(embed_calls(inputs, model)))

    def close(self) -> None:
        """Drop the blocking connections."""
        self._client.close()

    async def aclose(self) -> None:
        """Drop all connections."""
        self._client.close()
        await self._async.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, call: Call[Answer]) -> Answer:
        content, headers = call.content(), {**JSON_HEADERS, **call.headers}
        try:
            response = self._client.post(call.path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise transport_problem(self.url, error) from error
        return read_answer(self.url, call, response)

    async def _batch_apart(self, prompts: Iterable[Prompt], options: Options, plan: BatchPlan) -> list[Outcome]:
        """On connections of its own: those of the asyncio calls belong to another loop."""
        handle = AsyncHandle(self.url, self._api_key, self._ca_file)
        try:
            return await run_batch(handle, prompts, options, plan)
        finally:
            await handle.close()


def run_apart(work: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine to its end, also where this thread has a running loop already (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
