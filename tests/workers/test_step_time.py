"""The step-time line finds slope and base, follows a change of speed, and is careful before it knows anything."""

import random

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


def test_a_slope_that_may_be_chance_is_none() -> None:
    """Steps of few sizes and one that was held up: the line does not rise to where nobody has looked."""
    model = StepTimeModel()
    for step in range(60):
        model.observe(8 if step % 10 else 64, 0.0102 if step % 2 else 0.01)
    model.observe(64, 0.06)
    base_s, token_s = model.line()
    assert token_s == 0.0
    assert base_s == pytest.approx(0.0115, rel=0.2)


def test_a_slope_in_scatter_is_found() -> None:
    """Steps that differ by a fifth for reasons of their own, and by what they compute."""
    model, drawn = StepTimeModel(), random.Random(3)
    for _ in range(100):
        tokens = drawn.choice((1, 8, 64, 256))
        model.observe(tokens, (0.01 + 0.0001 * tokens) * drawn.uniform(0.9, 1.1))
    assert model.line() == (pytest.approx(0.01, rel=0.2), pytest.approx(0.0001, rel=0.2))
