"""Whether a worker still moves: its step counter against the time its step should take, and whether it answers at all.

The supervisor watches every running worker so, whatever hosts it: a process that lives but does nothing is ended, and
started again like one that died. Routers have taken their requests elsewhere long before (`router/fleet.py`), so this
is patient. It asks over the worker's own RPC port, a few bytes every other second; knows neither Ray nor processes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.workers.errors import RefusedError
from penstock.workers.rpc import WorkerClient
from penstock.workers.settings import WorkerSettings
from penstock.workers.tls import open_peer_tls


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may stand still."""

    look_s: float = 2.0
    silent_s: float = 20.0  # without an answer
    step_factor: float = 3.0  # a step may take this many times its prediction
    step_floor_s: float = 20.0  # but never counts as stuck before this
    first_steps: int = 8  # of which nothing is known yet: memory is touched, code is loaded
    first_step_s: float = 120.0


async def until_stuck(settings: WorkerSettings, address: str, patience: Patience | None = None) -> str:
    """Returns once the worker at this address moves no more, with the reason; never while it does."""
    patience = patience or Patience()
    loop, client = (
        asyncio.get_running_loop(),
        WorkerClient(address, settings.cluster_key, tls=open_peer_tls(settings.tls)),
    )
    heard = loop.time()
    try:
        while True:
            asleep = loop.time()
            await asyncio.sleep(patience.look_s)
            if loop.time() - asleep > 2 * patience.look_s:
                heard = loop.time()  # this process stood still itself
            try:
                status = await client.status(patience.look_s)
            except RefusedError:
                if loop.time() - heard > patience.silent_s:
                    return f"it has not answered for {loop.time() - heard:.0f} s"
                continue
            heard = loop.time()
            reason = standstill(status["load"], patience)
            if reason:
                return reason
    finally:
        await client.close()


def standstill(load: Mapping[str, Any], patience: Patience) -> str:
    """Why a worker that answers with this load is stuck; empty where it is not."""
    step, age_s = load["step"], load["step_age_s"]
    if step <= patience.first_steps:
        allowed_s = patience.first_step_s
    else:
        allowed_s = max(patience.step_floor_s, patience.step_factor * load["predicted_step_s"])
    return f"its step {step} has not moved for {age_s:.0f} s" if age_s > allowed_s else ""
