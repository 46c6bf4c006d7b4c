"""What Serve's gRPC proxy does with a call, mended so that the call's request ends when its caller leaves.

`rpcs.py` registers every service through `ServiceHandlers`, in our own server and in Serve's gRPC proxy, which puts
its relaying handlers in place of the given ones. Knows grpcio's asyncio server, and of Serve what is said here;
nothing of what the messages are.

Why: grpcio cancels the task of a call whose caller has left, be it by cancelling, by a deadline or by a lost
connection. Of a generator handler that task either waits inside the generator, which then learns of it and cancels the
request at the replica, or in grpcio's own sending of a message, where the generator learns of nothing but its disposal:
Serve's then leaves the request running at the replica, for nobody, to its last token (Ray 2.60, `proxy.py`,
`gRPCProxy.send_request_to_replica`). And when the proxy dies, nobody cancels anything: `proxy_watch.py` sees to that,
by the signature that calls get here.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import grpc

SIGNATURE = "penstock-proxy"  # metadata: the proxy actor's name, a slash, and what tells it from its predecessors

log = logging.getLogger(__name__)

_NO_MORE = object()


class ServiceHandlers(grpc.ServiceRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """The handlers of one service, as they are given or as Serve replaces them."""

    def __init__(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._service = service
        # By full name, under the name that grpcio's own class has: Serve's proxy reads and replaces it.
        self._method_handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}

    def service_name(self) -> str:
        """See grpcio."""
        return self._service

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call that has arrived; None for a method that the service does not have."""
        handler = self._method_handlers.get(handler_call_details.method)
        if handler is None or handler.response_serializer is not None:
            return handler
        kind = "unary_stream" if handler.response_streaming else "unary_unary"  # of Serve's, which has replicas' bytes
        serve = getattr(handler, kind)
        relay = written if inspect.isasyncgenfunction(serve) else signed
        return handler._replace(**{kind: relay(serve, self._signature)})

    @cached_property
    def _signature(self) -> str:
        """Of this process; empty outside of Ray's actors."""
        import ray

        name = ray.get_runtime_context().get_actor_name() if ray.is_initialized() else None
        return f"{name}/{secrets.token_hex(8)}" if name else ""


class Signed:
    """grpcio's context of a call. Behind the caller's metadata stands the signature."""

    def __init__(self, context: Any, signature: str) -> None:
        self._context = context
        self._signature = signature

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """See grpcio."""
        stated = self._context.invocation_metadata() or ()
        return (*((key, value) for key, value in stated if key != SIGNATURE), (SIGNATURE, self._signature))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def signed(answer: Callable[[Any, Any], Awaitable[Any]], signature: str) -> Callable[[Any, Any], Awaitable[Any]]:
    """The same handler, whose calls carry the signature."""

    async def sign(request: Any, context: Any) -> Any:
        return await answer(request, Signed(context, signature))

    return sign


def written(
    generate: Callable[[Any, Any], AsyncGenerator[Any, None]], signature: str
) -> Callable[[Any, Any], Awaitable[None]]:
    """The coroutine handler that writes what a generator handler gives, and ends it with the call."""

    async def write(request: Any, context: Any) -> None:
        messages = generate(request, Signed(context, signature))
        try:
            async for message in messages:
                await context.write(message)
        except BaseException:
            ending = asyncio.ensure_future(end_stream(messages))
            # Within the call, whatever else befalls its task: Serve's generator asks for the caller's address at its
            # end, and of a call that is over grpcio reads it from freed memory.
            while not ending.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.shield(asyncio.gather(ending, return_exceptions=True))
            raise

    return write


async def end_stream(messages: AsyncGenerator[Any, None]) -> None:
    """Have a generator cancelled where it waits for its next message, wherever it stands now; nothing if it has ended.

    Closing it where it stands would not do: see the module's docstring. What it still gives is dropped.
    """
    while True:
        asking = asyncio.ensure_future(_ask(messages))
        await asyncio.sleep(0)  # until it waits
        asking.cancel()
        try:
            if await asking is _NO_MORE:
                return
        except asyncio.CancelledError:
            return
        except Exception:
            log.exception("a stream whose caller had left ended badly")
            return


async def _ask(messages: AsyncGenerator[Any, None]) -> Any:
    return await anext(messages, _NO_MORE)
