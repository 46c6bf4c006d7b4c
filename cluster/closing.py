"""How an ingress process ends: nobody new, time for the answers under way, a typed error for those that outlast it.

Called by `ingress_replica.py` for its listeners and its gRPC server. At the limit the requests end, not their
connections: so each reader is told, and a stream is never short without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from penstock.cluster.fleet_view import LinkedFleet
from penstock.cluster.generation import Generator
from penstock.cluster.grpc_front.server import GrpcServer
from penstock.cluster.ingress.listener import LAST_WORD_S, Listener


async def close_fronts(
    fleet: LinkedFleet, generator: Generator, listeners: Sequence[Listener], grpc: GrpcServer | None, drain_s: float
) -> None:
    """Return when nothing is answered any more: after `drain_s` and a little at most."""
    fleet.closing = True
    ending = [listener.stop() for listener in listeners]
    if grpc is not None:
        ending.append(grpc.stop(drain_s + LAST_WORD_S))
    limit = asyncio.get_running_loop().call_later(drain_s, generator.cut)
    try:
        await asyncio.gather(*ending)
    finally:
        limit.cancel()
