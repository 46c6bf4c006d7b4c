"""The step-time line finds slope and base, follows a change of speed, and is careful before it knows anything."""

import pytest

from penstock.workers.step_time import StepTimeModel


def test_before_measurements_it_is_patient() -> None:
    model = StepTimeModel()
    model.observe(10, 0.001)
    assert model.predict(10) >= 1.0


def test_it_finds_the_line_and_follows_a_change() -> None:
    model = StepTimeModel()
    for step in range(100):
        tokens = 1 + step * 37 % 300
        model.observe(tokens, 0.01 + 0.0002 * tokens)
    assert model.predict(1) == pytest.approx(0.0102, rel=1e-3)
    assert model.predict(512) == pytest.approx(0.1124, rel=1e-3)
    for step in range(400):
        tokens = 1 + step * 37 % 300
        model.observe(tokens, 0.02 + 0.0004 * tokens)
    assert model.predict(512) == pytest.approx(0.2248, rel=0.02)


def test_steps_of_one_size_and_odd_timings_give_no_nonsense() -> None:
    model = StepTimeModel()
    for _ in range(12):
        model.observe(32, 0.05)
    assert model.predict(500) == pytest.approx(0.05)
    for tokens, seconds in ((1, 0.5), (500, 0.001)) * 5:
        model.observe(tokens, seconds)
    assert 0 <= model.predict(5000) < 1


def test_the_first_steps_are_not_its_pace() -> None:
    model = StepTimeModel()
    for step in range(11):
        assert model.line() == (0.0, 0.0)
        model.observe(32, 3.0 if step < 3 else 0.05)
    assert model.predict(32) == pytest.approx(0.05)
