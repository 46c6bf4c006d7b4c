"""When requests arrive: seeded processes with a stated mean rate, as sorted seconds from the start.

Used by `commands/bench.py` through `SHAPES`. Pure. Every process is given the same way: N arrivals at a mean of `rate`
per second; `inf` means all at once. `gamma` rescales its last arrival to N / rate, as vLLM's bench does; the others
follow a rate that changes with time, by thinning a unit process through its integral (time-rescaling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
_STEP_FACTOR, _STEP_S = 3.0, 60.0  # three times the rate for a minute
_DIURNAL_SWING = 0.8  # the rate goes from 0.2 to 1.8 times its mean
_ON_SHARE = 0.25  # on-off sources send in a quarter of the time
_PERIODS = 4  # of the diurnal and on-off shapes over one run
_GRID = 4096


def gamma(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Gaps of a Gamma distribution with the given shape (Poisson at 1, CV = 1 / sqrt(burstiness))."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1.0 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    return [float(t) for t in times * (count / rate / times[-1])]


def step(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """A burst of three times the rate for a minute (a third of a shorter run) in the middle; mean rate kept."""
    span = count / rate if not math.isinf(rate) else 0.0
    burst = min(_STEP_S, span / 3)
    share = burst / span if span else 0.0
    quiet = 1.0 / (1.0 + (_STEP_FACTOR - 1.0) * share)

    def level(x: F64) -> F64:
        return np.where(np.abs(x - 0.5) <= share / 2, _STEP_FACTOR * quiet, quiet)

    return _modulated(count, rate, burstiness, seed, level)


def diurnal(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """A sine around the mean rate."""
    return _modulated(count, rate, burstiness, seed, lambda x: 1.0 + _DIURNAL_SWING * np.sin(2 * np.pi * _PERIODS * x))


def onoff(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Silence, then all of it: four times the rate in a quarter of the time."""
    return _modulated(count, rate, burstiness, seed, lambda x: ((x * _PERIODS) % 1.0 < _ON_SHARE) / _ON_SHARE)


SHAPES: Mapping[str, Callable[[int, float, float, int], list[float]]] = MappingProxyType(
    {"gamma": gamma, "step": step, "diurnal": diurnal, "onoff": onoff}
)


def _modulated(count: int, rate: float, burstiness: float, seed: int, level: Callable[[F64], F64]) -> list[float]:
    """Arrivals of unit-mean `level` over the run's span [0, 1]: a stationary process read through its integral."""
    if math.isinf(rate):
        return [0.0] * count
    span = count / rate
    grid = np.linspace(0.0, 1.0, _GRID + 1)
    mass = np.concatenate([[0.0], np.cumsum(level((grid[1:] + grid[:-1]) / 2))])
    unit = np.array(gamma(count, float(count), burstiness, seed))  # within [0, 1]
    return [float(t) for t in np.interp(unit * mass[-1], mass, grid) * span]
