"""A worker's end of a stream that greets, and answers every Cancel with a Queued; for tests of what lies in between."""

from __future__ import annotations

from penstock.workers.protocol import WIRE_VERSION, Cancel, Hello, Queued, Role, Welcome
from penstock.workers.rpc import Conversation
from penstock.workers.wire import encode

WELCOME = Welcome(WIRE_VERSION, "w", 1, Role.MIXED, 1, 1, 16, 8, 4, 128, 64, "127.0.0.1:1", "host", "same")


async def echo(conversation: Conversation) -> None:
    """Until the router leaves."""
    while (message := await conversation.read()) is not None:
        if isinstance(message, Hello):
            await conversation.write(encode(WELCOME))
        elif isinstance(message, Cancel):
            await conversation.write(encode(Queued(message.slot, message.attempt, 0)))
