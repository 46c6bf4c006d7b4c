"""Sampled tokens on their way back: one asynchronous copy per step into page-locked memory, and the wait for it.

Used by `runner.py` on a GPU. Two buffers alternate, so a step may be started before the last one's tokens were taken.
Knows tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.workers.errors import IntegrityError
from penstock.workers.static_memory import StaticMemory

_NUM_BUFFERS = 2


@dataclass(frozen=True, slots=True, eq=False)
class PendingTokens:
    """Tokens that are being copied; `take` waits for them."""

    host: Tensor  # [S] int32
    arrived: torch.cuda.Event

    def take(self) -> NDArray[np.int32]:
        """[S] int32, in memory of their own."""
        self.arrived.synchronize()
        tokens: NDArray[np.int32] = self.host.numpy().copy()
        return tokens


class StepOutputs:
    """Buffers for `max_rows` tokens each. At most two steps may be on their way."""

    def __init__(self, max_rows: int, memory: StaticMemory) -> None:
        self._buffers = [
            memory.on_host(f"step outputs, host {number}", (max_rows,), torch.int32) for number in range(_NUM_BUFFERS)
        ]
        self._events = [torch.cuda.Event() for _ in range(_NUM_BUFFERS)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def send(self, tokens: Tensor) -> PendingTokens:
        """Start the copy of tokens [S] on the current stream. Raises IntegrityError for more than fit."""
        if len(tokens) > len(self._buffers[0]):
            raise IntegrityError(f"{len(tokens)} tokens were sampled; the runner holds {len(self._buffers[0])}")
        self._turn = (self._turn + 1) % _NUM_BUFFERS
        host, event = self._buffers[self._turn][: len(tokens)], self._events[self._turn]
        host.copy_(tokens.to(torch.int32), non_blocking=True)
        event.record()
        return PendingTokens(host, event)
