"""Arrival processes: the mean rate and variation that were asked for, the same for the same seed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from penstock.cluster.bench.arrivals import SHAPES


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0.5, 10.0])
def test_rate_order_and_seed(shape: str, rate: float) -> None:
    times = SHAPES[shape](5000, rate, 1.0, 3)
    assert times == sorted(times)
    assert 5000 / times[-1] == pytest.approx(rate, rel=0.02)
    assert times == SHAPES[shape](5000, rate, 1.0, 3)
    assert times != SHAPES[shape](5000, rate, 1.0, 4)
    assert SHAPES[shape](3, math.inf, 1.0, 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_variation_of_gamma(burstiness: float) -> None:
    gaps = np.diff(SHAPES["gamma"](100_000, 10.0, burstiness, 1))
    assert gaps.mean() == pytest.approx(0.1, rel=0.02)
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_a_step_is_three_times_the_rest_for_a_minute() -> None:
    times = np.array(SHAPES["step"](20_000, 20.0, 1.0, 1))
    middle = (times > 470) & (times < 530)
    before = times < 400
    assert (middle.sum() / 60) / (before.sum() / 400) == pytest.approx(3.0, rel=0.1)


def test_onoff_is_silent_between() -> None:
    times = np.array(SHAPES["onoff"](8000, 10.0, 1.0, 1))
    phase = (times / 800.0 * 4) % 1.0
    assert np.histogram(phase, bins=4, range=(0, 1))[0][1:].sum() < 10


def test_diurnal_swings() -> None:
    times = np.array(SHAPES["diurnal"](20_000, 20.0, 1.0, 1))
    per_bin = np.histogram(times, bins=40, range=(0, 1000))[0]
    assert per_bin.max() / max(1, per_bin.min()) > 4
