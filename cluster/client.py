"""The Python handle: `connect()` to a running cluster, then generate and stream, blocking or on asyncio.

    from penstock.cluster.client import connect
    handle = connect()
    print(handle.generate("12+34=", max_tokens=8).text)
    for chunk in handle.stream([{"role": "user", "content": "Hello"}]):
        print(chunk.text, end="")

A prompt is text or token ids (`/v1/completions`), or a list of messages (`/v1/chat/completions`). Failures raise the
same typed errors as inside the cluster: RequestError names the field, RefusedError carries a FailureCode. Imports
neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType

import httpx

from penstock.cluster.client_answers import (
    Chunk,
    Completion,
    Options,
    Prompt,
    Unpack,
    broken_stream,
    completion_of,
    path_and_body,
    problem_of,
    read_event,
    unreachable,
)
from penstock.cluster.config import server_address

__all__ = ["AsyncHandle", "Chunk", "Completion", "Handle", "connect"]

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0


def connect(url: str | None = None, api_key: str | None = None) -> Handle:
    """A handle for the cluster at `url` (else $PENSTOCK_URL, else http://127.0.0.1:8000). Nothing is sent yet."""
    return Handle(*server_address(url, api_key))


class Handle:
    """One cluster seen from outside. The blocking calls are thread-safe; the others belong to one asyncio loop."""

    def __init__(self, url: str, api_key: str) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        verify = url.startswith("https:")
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(base_url=url, headers=headers, timeout=timeout, verify=verify, limits=limits)
        self._async = AsyncHandle(
            httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, verify=verify, limits=limits)
        )

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer."""
        path, body = path_and_body(prompt, options, stream=False)
        try:
            response = self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise unreachable(self.url, error) from error
        if response.status_code != httpx.codes.OK:
            raise problem_of(response.status_code, response.content, response.headers)
        return completion_of(response.json())

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Chunk]:
        """Pieces as they come; the last one carries `usage`. A stream that does not end properly raises."""
        path, body = path_and_body(prompt, options, stream=True)
        begun = False
        try:
            with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise problem_of(response.status_code, response.read(), response.headers)
                for line in response.iter_lines():
                    begun = True
                    event = read_event(line)
                    if event.done:
                        return
                    yield from event.chunks
        except httpx.TransportError as error:
            raise (broken_stream() if begun else unreachable(self.url, error)) from error
        raise broken_stream()

    async def agenerate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """`generate` on asyncio."""
        return await self._async.generate(prompt, **options)

    def astream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """`stream` on asyncio."""
        return self._async.stream(prompt, **options)

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


class AsyncHandle:
    """The asyncio half of a `Handle`."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._url = str(client.base_url)

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer."""
        path, body = path_and_body(prompt, options, stream=False)
        try:
            response = await self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise unreachable(self._url, error) from error
        if response.status_code != httpx.codes.OK:
            raise problem_of(response.status_code, response.content, response.headers)
        return completion_of(response.json())

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """Pieces as they come; see `Handle.stream`."""
        path, body = path_and_body(prompt, options, stream=True)
        begun = False
        try:
            async with self._client.stream("POST", path, json=body) as response:
                if response.status_code != httpx.codes.OK:
                    raise problem_of(response.status_code, await response.aread(), response.headers)
                async for line in response.aiter_lines():
                    begun = True
                    event = read_event(line)
                    if event.done:
                        return
                    for chunk in event.chunks:
                        yield chunk
        except httpx.TransportError as error:
            raise (broken_stream() if begun else unreachable(self._url, error)) from error
        raise broken_stream()

    async def close(self) -> None:
        """Drop the connections."""
        await self._client.aclose()
