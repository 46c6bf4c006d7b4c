"""Serve's own gRPC proxy with our handlers: wherever a relayed call stands, its request ends when the caller leaves.

The proxy, its server and its reader of answers are Serve's; only the replica's answer is a fake, which tells what the
proxy does with it.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from penstock.cluster.grpc_front.relay import written
from penstock.cluster.grpc_front.rpcs import SERVICE, add_GenerationServicer_to_server

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Serve's own, about its pydantic models
    from ray.serve._private.grpc_util import gRPCGenericServer
    from ray.serve._private.proxy import gRPCProxy
    from ray.serve.handle import DeploymentResponse, DeploymentResponseGenerator

pytestmark = pytest.mark.timeout(60)
MESSAGE = bytes(1 << 20)
# A caller that takes in nothing before it reads: a message to it stays in the proxy's hands.
NARROW = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))


class Answer:
    """What a replica answers: these messages, and then nothing more."""

    def __init__(self, *messages: bytes, ends: bool = False) -> None:
        self._messages = list(messages)
        self._ends = ends
        self.asked = 0
        self.cancelled = asyncio.Event()

    async def next(self) -> tuple[Any, bytes]:
        self.asked += 1
        if not self._messages and not self._ends:
            await asyncio.Event().wait()
        if not self._messages:
            raise StopAsyncIteration
        return SimpleNamespace(_set_on_grpc_context=lambda context: None), self._messages.pop(0)


class Cancellable:
    """What Serve's two kinds of responses have in common."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def cancel(self) -> None:
        self.answer.cancelled.set()

    def cancelled(self) -> bool:
        return self.answer.cancelled.is_set()


class Streamed(Cancellable, DeploymentResponseGenerator):  # type: ignore[misc]
    async def __anext__(self) -> Any:
        return await self.answer.next()


class Whole(Cancellable, DeploymentResponse):  # type: ignore[misc]
    def __await__(self) -> Generator[Any, None, Any]:
        return self.answer.next().__await__()


class Handle:
    """As the proxy finds it for an application."""

    deployment_id = SimpleNamespace(app_name="front", name="ingress")
    deployment_name, app_name = "ingress", "front"

    def __init__(self, answer: Answer, stream: bool = False) -> None:
        self._answer, self._stream = answer, stream

    def options(self, *, stream: bool, **_: Any) -> Handle:
        return Handle(self._answer, stream)

    def remote(self, _: bytes) -> Cancellable:
        return Streamed(self._answer) if self._stream else Whole(self._answer)


@asynccontextmanager
async def proxied(answer: Answer) -> AsyncIterator[grpc.aio.Channel]:
    """A caller's channel to Serve's proxy, behind which every request has this answer."""
    routes = SimpleNamespace(get_handle_for_endpoint=lambda application: ("/", Handle(answer), False))
    server = gRPCGenericServer(gRPCProxy("node", "127.0.0.1", True, routes).service_handler_factory)
    add_GenerationServicer_to_server(SimpleNamespace(**{method.name: None for method in SERVICE.methods}), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=NARROW) as channel:
            yield channel
    finally:
        await server.stop(None)


def call(channel: grpc.aio.Channel, rpc: str, timeout_s: float | None = None) -> Any:
    kind = channel.unary_stream if SERVICE.methods_by_name[rpc].server_streaming else channel.unary_unary
    return kind(f"/{SERVICE.full_name}/{rpc}")(b"", timeout=timeout_s)


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def by_cancelling(channel: grpc.aio.Channel, pending: Any) -> None:
    pending.cancel()


async def by_closing(channel: grpc.aio.Channel, pending: Any) -> None:
    await channel.close()


async def by_deadline(channel: grpc.aio.Channel, pending: Any) -> None:
    assert await pending.code() is grpc.StatusCode.DEADLINE_EXCEEDED


LEAVING = (by_cancelling, by_closing, by_deadline)
Leave = Callable[[grpc.aio.Channel, Any], Awaitable[None]]


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize(
    ("given", "read", "asked"),
    [
        pytest.param(0, 0, 1, id="before the first message"),
        pytest.param(1, 1, 2, id="between messages"),
        pytest.param(1, 0, 1, id="while a message is sent"),
        pytest.param(4, 1, 2, id="while a message is sent, with more to come"),
    ],
)
def test_a_stream_left_anywhere_is_cancelled_at_the_replica(leave: Leave, given: int, read: int, asked: int) -> None:
    async def main() -> None:
        answer = Answer(*[MESSAGE] * given)
        async with proxied(answer) as channel:
            pending = call(channel, "Stream", 1.0 if leave is by_deadline else None)
            for _ in range(read):
                assert await pending.read() == MESSAGE
            await until(lambda: answer.asked == asked)
            await asyncio.sleep(0.3)
            assert answer.asked == asked  # it stands where it shall
            assert not answer.cancelled.is_set()
            await leave(channel, pending)
            await until(answer.cancelled.is_set)

    asyncio.run(main())


@pytest.mark.parametrize("leave", LEAVING)
def test_a_call_left_is_cancelled_at_the_replica(leave: Leave) -> None:
    async def main() -> None:
        answer = Answer()
        async with proxied(answer) as channel:
            pending = call(channel, "Generate", 1.0 if leave is by_deadline else None)
            await until(lambda: answer.asked == 1)
            await leave(channel, pending)
            await until(answer.cancelled.is_set)

    asyncio.run(main())


def test_who_stays_has_everything_and_nothing_is_cancelled() -> None:
    async def main() -> None:
        answer = Answer(b"a", MESSAGE, b"b", ends=True)
        async with proxied(answer) as channel:
            pending = call(channel, "Stream")
            assert [message async for message in pending] == [b"a", MESSAGE, b"b"]
            assert await pending.code() is grpc.StatusCode.OK
            assert not answer.cancelled.is_set()

    asyncio.run(main())


def test_the_end_of_a_stream_is_awaited_even_by_a_task_that_is_cancelled_again() -> None:
    """A generator that ends after its call reads what grpcio has freed; the process dies of it."""
    events: list[str] = []

    async def generate(request: None, context: None) -> AsyncIterator[str]:
        try:
            while True:
                yield "a"
                await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0.01)
            events.append("the generator")

    async def main() -> None:
        writing = asyncio.Event()

        async def write(message: str) -> None:
            writing.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(written(generate, "")(None, SimpleNamespace(write=write)))
        await writing.wait()
        for _ in range(4):
            task.cancel()
            await asyncio.sleep(0.005)
        with pytest.raises(asyncio.CancelledError):
            await task
        events.append("the call")

    asyncio.run(main())
    assert events == ["the generator", "the call"]
