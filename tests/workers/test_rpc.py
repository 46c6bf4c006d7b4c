"""Client and server of the data plane on one loop: order, refusals, a lost peer, and a reader that stops reading."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from fakes.echo_worker import WELCOME, echo

from penstock.workers import rpc
from penstock.workers.call_seal import WorkerName
from penstock.workers.errors import ConfigError, RefusedError
from penstock.workers.protocol import WIRE_VERSION, Cancel, FailureCode, Hello, KeepAlive, Queued
from penstock.workers.rpc import Conversation, RpcServer, WorkerClient
from penstock.workers.wire import encode

HELLO = Hello(WIRE_VERSION, "router", 1, 5.0)


async def serve(
    handler: Callable[[Conversation], Awaitable[None]] = echo,
    key: str = "",
    status: Callable[[], dict[str, Any]] = dict,
    name: WorkerName = WorkerName("w", 1),  # noqa: B008 - frozen
) -> tuple[RpcServer, str]:
    server = RpcServer(handler, status, key, name)
    return server, await server.start("127.0.0.1", 0)


async def test_messages_arrive_in_order() -> None:
    server, address = await serve()
    client = WorkerClient(address)
    stream = await client.attach(HELLO)
    assert stream.welcome == WELCOME
    for slot in range(500):
        assert stream.send(Cancel(slot, 1))
    answers = [await stream.read() for _ in range(500)]
    assert answers == [Queued(slot, 1, 0) for slot in range(500)]
    await stream.close()
    assert not stream.send(KeepAlive())
    assert [message async for message in stream] == []
    await client.close()
    await server.stop()


async def test_wrong_key_is_refused_and_the_right_one_is_not() -> None:
    server, address = await serve(key="secret", status=lambda: {"state": "ready"})
    stranger = WorkerClient(address, "guess")
    with pytest.raises(RefusedError, match="wrong cluster key") as refusal:
        await stranger.attach(HELLO)
    assert refusal.value.code is FailureCode.INCOMPATIBLE
    with pytest.raises(RefusedError, match="wrong cluster key"):
        await stranger.status()
    friend = WorkerClient(address, "secret")
    assert await friend.status() == {"state": "ready"}
    await (await friend.attach(HELLO)).close()
    await stranger.close()
    await friend.close()
    await server.stop()


async def test_a_call_that_was_recorded_opens_nothing() -> None:
    server, address = await serve(key="secret", status=lambda: {"state": "ready"})
    client = WorkerClient(address, "secret")
    shown, _ = await client._prove(rpc._STATUS, 2.0)
    assert await client._unary[rpc._STATUS](b"", metadata=shown) == b'{"state": "ready"}'
    for metadata in (shown, (), (("penstock-proof-bin", b"x" * 64),)):
        with pytest.raises(grpc.aio.AioRpcError, match="UNAUTHENTICATED"):
            await client._unary[rpc._STATUS](b"", metadata=metadata)
    await client.close()
    await server.stop()


async def test_another_worker_at_the_address_is_not_taken_for_the_one_asked() -> None:
    server, address = await serve(key="secret")
    for expected in (WorkerName("w", 2), WorkerName("v", 1)):
        client = WorkerClient(address, "secret", expected)
        with pytest.raises(RefusedError, match="is w, incarnation 1") as refusal:
            await client.attach(HELLO)
        assert refusal.value.code is FailureCode.WORKER_LOST
        await client.close()
    client = WorkerClient(address, "secret", WorkerName("w", 1))
    await (await client.attach(HELLO)).close()
    await client.close()
    await server.stop()


async def test_a_message_without_its_seal_ends_the_stream() -> None:
    server, address = await serve(key="secret")
    client = WorkerClient(address, "secret")
    stream = await client.attach(HELLO)
    assert stream.send(Cancel(1, 1))
    assert await stream.read() == Queued(1, 1, 0)
    await stream._call.write(encode(Cancel(2, 1)))
    with pytest.raises(RefusedError, match="not authentic"):
        await asyncio.wait_for(stream.read(), 5)
    await stream.close()
    await client.close()
    await server.stop()


async def test_refusal_by_the_handler_is_typed() -> None:
    async def refuse(conversation: Conversation) -> None:
        await conversation.read()
        raise RefusedError(FailureCode.INCOMPATIBLE, "wire version 9")

    server, address = await serve(refuse)
    client = WorkerClient(address)
    with pytest.raises(RefusedError, match="wire version 9") as refusal:
        await client.attach(HELLO)
    assert refusal.value.code is FailureCode.INCOMPATIBLE
    await client.close()
    await server.stop()


async def test_a_stranger_is_heard_out_before_he_is_refused() -> None:
    """Else grpc may tell a caller who is still sending that something broke, instead of what."""
    server, address = await serve(key="secret")
    client = WorkerClient(address)
    silent = client._attach(None)
    reading = asyncio.ensure_future(silent.read())
    assert not (await asyncio.wait([reading], timeout=0.3))[0], "he has not said anything yet"
    with pytest.raises(RefusedError, match="wrong cluster key"):
        await client.attach(HELLO)
    with pytest.raises(grpc.aio.AioRpcError, match="wrong cluster key"):
        await asyncio.wait_for(reading, 10)  # but he cannot stay
    await client.close()
    await server.stop()


async def test_bytes_that_are_no_message_end_the_stream() -> None:
    server, address = await serve()
    client = WorkerClient(address)
    stream = await client.attach(HELLO)
    stream._unsent.append(b"\xc1 nonsense")
    stream._wake.set()
    with pytest.raises(RefusedError, match="not a message"):
        await asyncio.wait_for(stream.read(), 5)
    await stream.close()
    await client.close()
    await server.stop()


@pytest.mark.parametrize("ending", ["stop", "return"])
async def test_a_worker_that_goes_away_is_noticed_at_once(ending: str) -> None:
    leave = asyncio.Event()

    async def handler(conversation: Conversation) -> None:
        await conversation.read()
        await conversation.write(encode(WELCOME))
        await leave.wait()

    server, address = await serve(handler)
    client = WorkerClient(address)
    stream = await client.attach(HELLO)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0.05)
    if ending == "return":
        leave.set()
    else:
        await server.stop()
    with pytest.raises(RefusedError) as lost:
        await asyncio.wait_for(reading, 1)
    assert lost.value.code is FailureCode.WORKER_LOST
    assert stream.closed
    assert not stream.send(KeepAlive())
    await stream.close()
    await client.close()
    await server.stop()


async def test_nobody_listens() -> None:
    server, address = await serve()
    await server.stop()
    client = WorkerClient(address)
    with pytest.raises(RefusedError) as lost:
        await client.attach(HELLO)
    assert lost.value.code is FailureCode.WORKER_LOST
    with pytest.raises(RefusedError):
        await client.status()
    await client.close()


async def test_a_worker_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "_MAX_UNSENT_BYTES", 1000)

    async def handler(conversation: Conversation) -> None:
        await conversation.read()
        await conversation.write(encode(WELCOME))
        await asyncio.sleep(30)

    server, address = await serve(handler)
    client = WorkerClient(address)
    stream = await client.attach(HELLO)
    sent = [stream.send(Cancel(slot, 1)) for slot in range(1000)]
    assert sent[0]
    assert not sent[-1]
    with pytest.raises(RefusedError):
        await asyncio.wait_for(stream.read(), 5)
    await stream.close()
    await client.close()
    await server.stop()


async def test_a_taken_port_is_a_config_error() -> None:
    server, address = await serve()
    host, port = address.rsplit(":", 1)
    with pytest.raises(ConfigError, match="cannot listen"):
        await RpcServer(echo, dict).start(host, int(port))
    await server.stop()


async def test_an_account_is_asked_for_from_a_number_on() -> None:
    asked: list[int] = []

    async def account(ended_after: int) -> dict[str, Any]:
        asked.append(ended_after)
        return {"after": ended_after}

    server = RpcServer(echo, dict, on_audit=account)
    address = await server.start("127.0.0.1", 0)
    client = WorkerClient(address)
    assert [await client.audit(), await client.audit(70_000)] == [{"after": 0}, {"after": 70_000}]
    async with grpc.aio.insecure_channel(address) as channel:
        ask = channel.unary_unary(rpc._AUDIT, bytes, bytes)
        for nonsense in (b"x", b"\xff", b"9" * 5000):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await ask(nonsense, timeout=5)
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert asked == [0, 70_000]
    await client.close()
    await server.stop()
