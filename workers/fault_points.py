"""Named places where a test may break the product: what they are called, and the one check that each of them is.

A module reaches a point like this, and pays one look at a module's attribute when no plan is armed:

    if fault_points.plan is not None:
        fault_points.plan.reach(Point.STEP_BEGIN, self._name)

The plan itself, and everything that kills, stalls or damages, is in tests (`tests/fakes/fault_plan.py`). No setting,
variable, argument or message arms one: only code that sets `plan` before it starts a worker, which nothing of the
product does. Knows no files, no settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, StrEnum
from typing import Protocol


class Point(StrEnum):
    """Every place that can be broken; a plan that names another is refused. `item` is what the place counts by."""

    WORKER_START = "worker.start"  # a worker process has its settings and builds nothing yet
    CLOCK = "clock"  # the engine's and the transfer's clock is made; a jump applies from its time on
    SUBMIT_TAKE = "submit.take"  # a request has reached the engine: drop it, or take it twice
    SUBMIT_REPLY = "submit.reply"  # an answer to a request (granted, started, queued) leaves: drop, double, delay
    STEP_BEGIN = "step.begin"  # a step is about to be computed; what is raised costs that step
    STEP_END = "step.end"  # its tokens are committed, none has left the worker
    FIRST_TOKEN = "first_token"  # a frame with the first token of some choice leaves
    FRAME_OUT = "frame.out"  # a frame of tokens leaves for one router: drop, double, delay
    FRAME_SENT = "frame.sent"  # it is in the router's outbox
    HEARTBEAT = "heartbeat"  # a heartbeat leaves: drop, delay
    KV_PUBLISH = "kv.publish"  # changes of the prefix cache leave: drop, double, delay
    TRANSFER_SEND = "transfer.send"  # a block (its item: the fragment) is about to leave: drop, double, delay
    TRANSFER_SENT = "transfer.sent"  # it was given to the connection
    TRANSFER_OFFER = "transfer.offer"  # blocks offered in shared memory are about to be read by their receiver: delay
    TRANSFER_LAND = "transfer.land"  # a block (its item: the fragment) is here, not verified yet: damage a byte
    TRANSFER_ACK = "transfer.ack"  # the receiver has everything and is about to say so: drop, double, delay
    GRAMMAR_COMPILE = "grammar.compile"  # a worker compiles a grammar
    ADAPTER_READ = "adapter.read"  # the files of an adapter are about to be read
    WEIGHTS_READ = "weights.read"  # a tensor of a checkpoint is about to be read
    DISK_WRITE = "disk.write"  # bytes are about to be written to a file that a worker keeps


class Verdict(Enum):
    """What the place itself must do; everything else (delay, kill, stop, raise) has happened when it is told."""

    PASS = "pass"
    DROP = "drop"
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"


class FaultPlan(Protocol):
    """What a place asks."""

    def reach(self, point: Point, where: str, item: int | None = None) -> Verdict:
        """Worker `where` has come to this point. May not return, may take its time, may raise."""
        ...

    def watches(self, where: str, *points: Point) -> bool:
        """Something may yet happen at one of them: a place that does many at once does them one by one."""
        ...

    def byte(self, size: int) -> int:
        """Which byte of so many is to be damaged after a CORRUPT verdict."""
        ...

    def clock(self, where: str, clock: Callable[[], float]) -> Callable[[], float]:
        """The clock as this worker sees it."""
        ...


plan: FaultPlan | None = None  # of this process; tests set it before they start a worker
_TIMES = {Verdict.DROP: 0, Verdict.DUPLICATE: 2}


def times(point: Point, where: str, item: int | None = None) -> int:
    """How often a place that passes something on is to do so: once, unless an armed plan drops or doubles it."""
    return 1 if plan is None else _TIMES.get(plan.reach(point, where, item), 1)


def clock_of(where: str) -> Callable[[], float]:
    """The monotonic clock, as an armed plan lets this worker see it."""
    return time.monotonic if plan is None else plan.clock(where, time.monotonic)
