"""The handle's asyncio half: the same calls as `client.Handle`, awaited. Belongs to one event loop.

`client.Handle` makes one for its `a…` methods, `client_batch.py` uses one for many prompts. Knows httpx, and nothing of
what the calls mean.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from penstock.cluster.client_answers import (
    Chunk,
    Completion,
    broken_stream,
    not_an_answer,
    problem_of,
    read_event,
    unreachable,
)
from penstock.cluster.client_calls import Call, Options, Prompt, Unpack, generate_call
from penstock.cluster.trust import trust
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.protocol import FailureCode

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 600.0
JSON_HEADERS = {"content-type": "application/json"}
Answer = TypeVar("Answer")


def httpx_settings(url: str, api_key: str, ca_file: str | None = None) -> dict[str, object]:
    """Keyword arguments of httpx's clients for one server. Raises ConfigError for what is no URL or no key."""
    if not _is_url(url):
        raise ConfigError(f"{url!r} is not the URL of a server, like http://127.0.0.1:8000", "url")
    if not isinstance(api_key, str) or not _is_plain(api_key):
        raise ConfigError("an API key is ASCII without spaces", "api_key")
    return {
        "base_url": url,
        "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
        "timeout": httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
        "verify": trust(ca_file) if url.startswith("https:") else False,
        "limits": httpx.Limits(max_connections=None),
    }


def _is_url(url: object) -> bool:
    if not isinstance(url, str) or not _is_plain(url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not match, a port that is none
        return False


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def transport_problem(url: str, error: httpx.HTTPError) -> RefusedError:
    """The typed error behind a failed exchange."""
    if isinstance(error, httpx.ReadTimeout):
        return RefusedError(FailureCode.DEADLINE, f"no answer from {url} within {READ_TIMEOUT_S:.0f} s")
    return unreachable(url, error)


def read_answer(url: str, call: Call[Answer], response: httpx.Response) -> Answer:
    """The call's answer, or the error that was answered instead."""
    if response.status_code != httpx.codes.OK:
        raise problem_of(response.status_code, response.content, response.headers)
    try:
        return call.read(response.json(), response.headers)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise not_an_answer(url) from error


class AsyncHandle:
    """One cluster seen from one event loop."""

    def __init__(self, url: str, api_key: str, ca_file: str | None = None) -> None:
        self.url = url
        self._client = httpx.AsyncClient(**httpx_settings(url, api_key, ca_file))  # type: ignore[arg-type]

    async def ask(self, call: Call[Answer]) -> Answer:
        """Send one call and read its answer."""
        content, headers = call.content(), {**JSON_HEADERS, **call.headers}
        try:
            response = await self._client.post(call.path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise transport_problem(self.url, error) from error
        return read_answer(self.url, call, response)

    async def ask_all(self, calls: Sequence[Call[Answer]]) -> list[Answer]:
        """One after the other, in order."""
        return [await self.ask(call) for call in calls]

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Completion:
        """The whole answer."""
        return await self.ask(generate_call(prompt, options))

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """Pieces as they come; see `Handle.stream`."""
        call = generate_call(prompt, options, stream=True)
        content, headers = call.content(), {**JSON_HEADERS, **call.headers}
        begun = False
        try:
            async with self._client.stream("POST", call.path, content=content, headers=headers) as response:
                if response.status_code != httpx.codes.OK:
                    raise problem_of(response.status_code, await response.aread(), response.headers)
                async for line in response.aiter_lines():
                    begun = True
                    event = read_event(line)
                    if event.done:
                        return
                    for chunk in event.chunks:
                        yield chunk
        except httpx.HTTPError as error:
            raise (broken_stream() if begun else transport_problem(self.url, error)) from error
        raise broken_stream()

    async def close(self) -> None:
        """Drop the connections."""
        await self._client.aclose()
