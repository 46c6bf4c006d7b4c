"""Which bucket is worth recording: traffic x gain, guesses before measurements, and when it is due under load."""

import pytest

from penstock.workers.graphs.traffic import BucketFigures, BucketTraffic


def seen(steps):
    """{bucket: (steps, eager seconds)}"""
    traffic = BucketTraffic()
    for bucket, (count, seconds) in steps.items():
        for _ in range(count):
            traffic.saw(bucket, seconds, replayed=False)
    return traffic


def test_the_hottest_has_the_largest_traffic_times_gain():
    traffic = seen({1: (100, 0.010), 8: (30, 0.012), 64: (10, 0.080)})
    assert traffic.hottest([1, 8, 64]) == 1
    assert traffic.hottest([8, 64]) == 64
    assert traffic.hottest([]) is None
    assert traffic.hottest([2, 4]) is None  # never used


def test_a_measured_gain_replaces_the_guess_and_informs_the_neighbours():
    traffic = seen({4: (10, 0.010), 8: (10, 0.011), 64: (10, 0.080)})
    assert traffic.gain_s(8) == pytest.approx(0.25 * 0.011)
    traffic.saw(4, 0.002, replayed=True)
    assert traffic.gain_s(4) == pytest.approx(0.008)
    assert traffic.gain_s(8) == pytest.approx(0.008)  # launching takes as long
    traffic.saw(64, 0.081, replayed=True)
    assert traffic.gain_s(64) == 0.0  # slower than before
    assert traffic.hottest([64]) is None
    assert traffic.gain_s(100) == 0.0


def test_a_guess_is_never_more_than_the_step():
    traffic = BucketTraffic({4: BucketFigures(5, 0.010, 0.002)})
    traffic.saw(8, 0.001, replayed=False)
    assert traffic.gain_s(8) == 0.001


def test_under_load_a_bucket_is_due_when_it_has_cost_as_much_as_a_capture():
    traffic = BucketTraffic()
    traffic.captured(1, 0.1)
    steps = 0
    while not traffic.is_due(8):
        traffic.saw(8, 0.010, replayed=False)
        steps += 1
    assert steps == pytest.approx((0.9 * 0.5 + 0.1 * 0.1) / 0.0025, abs=1)
    traffic.captured(8, 0.1)
    assert not traffic.is_due(8)
    assert not traffic.is_due(16)


def test_former_figures_count():
    traffic = BucketTraffic({8: BucketFigures(1000, 0.01, 0.002), 16: BucketFigures(3, 0.01, None)})
    assert traffic.hottest([8, 16]) == 8
    assert traffic.figures[8].steps == 1000
