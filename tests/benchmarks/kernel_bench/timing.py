"""How long a call takes: warm-ups, many runs, median, cold L2, inputs of its own in every run, the device's clock.

On a GPU: events around the call; before each run the L2 is overwritten (twice its size) and the stream is kept busy
for a moment, so that the host has queued the whole call before the first event and launch latency stays outside. On a
CPU: perf_counter, for exercise only; no bound is claimed there. After SOL-ExecBench's timing protocol.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sol import Rates

WARM_UPS, RUNS = 10, 50
# Cycles that the stream sleeps while the host queues a call of several launches: about a millisecond.
QUEUE_CYCLES = 1_500_000
Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Timed:
    """Microseconds of each run, and the last run's result, which the caller must look at."""

    runs_us: list[float]
    result: object

    @property
    def median_us(self) -> float:
        return statistics.median(self.runs_us)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(self.runs_us, n=4) if len(self.runs_us) > 1 else (0.0, 0.0, 0.0)
        return (high - low) / self.median_us


@dataclass(slots=True)
class Clock:
    """Times calls on one device."""

    device: torch.device
    warm_ups: int = WARM_UPS
    runs: int = RUNS
    _flush: Tensor | None = field(default=None)

    def time(self, call: Callable[[Inputs], object], fresh: Callable[[int], Inputs]) -> Timed:
        """`fresh(n)` gives the inputs of run n, in memory that run n - 1 did not use for tensors that are copied."""
        for number in range(self.warm_ups):
            call(fresh(number))
        return self._on_gpu(call, fresh) if self.device.type == "cuda" else self._on_cpu(call, fresh)

    def _on_cpu(self, call: Callable[[Inputs], object], fresh: Callable[[int], Inputs]) -> Timed:
        runs, result = [], None
        for number in range(self.runs):
            inputs = fresh(number)
            begin = time.perf_counter()
            result = call(inputs)
            runs.append((time.perf_counter() - begin) * 1e6)
        return Timed(runs, result)

    def _on_gpu(self, call: Callable[[Inputs], object], fresh: Callable[[int], Inputs]) -> Timed:
        runs, result = [], None
        for number in range(self.runs):
            inputs = fresh(number)
            self._overwrite_l2()
            torch.cuda._sleep(QUEUE_CYCLES)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call(inputs)
            end.record()
            # Of the whole device: work on another stream would otherwise go untimed and unnoticed.
            torch.cuda.synchronize()
            runs.append(begin.elapsed_time(end) * 1e3)
        return Timed(runs, result)

    def _overwrite_l2(self) -> None:
        if self._flush is None:
            size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._flush.zero_()


def measured_rates(clock: Clock, size: int = 2 << 30, matrix: int = 8192) -> Rates:
    """This device's rates, now: of a sum over `size` bytes, of a copy of them, and of a square bf16 product."""
    device = clock.device
    data, target = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    read = clock.time(lambda each: each["data"].sum(), _always({"data": data}))
    copy = clock.time(lambda each: each["target"].copy_(each["data"]), _always({"data": data, "target": target}))
    left, right = (torch.randn(matrix, matrix, device=device).bfloat16() for _ in range(2))
    product = clock.time(lambda each: each["left"] @ each["right"], _always({"left": left, "right": right}))
    return Rates(
        read=size / (min(read.runs_us) * 1e-6),
        copy=2 * size / (min(copy.runs_us) * 1e-6),
        bf16_flops=2.0 * matrix**3 / (product.median_us * 1e-6),
    )


def _always(inputs: Inputs) -> Callable[[int], Inputs]:
    """The same inputs in every run: nothing of them fits the cache."""
    return lambda _: inputs
