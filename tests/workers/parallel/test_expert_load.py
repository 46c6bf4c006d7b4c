"""Load counts, their decay, and which experts follow which."""

import numpy as np
import pytest

from penstock.workers.errors import IntegrityError
from penstock.workers.parallel.expert_load import MOST_TRACED_EXPERTS, ExpertLoad, RouteTrace, skew


def test_load_halves_in_a_half_life_and_forgets_steps_that_failed():
    load = ExpertLoad(2, 3, half_life_steps=4.0)
    load.observe(1, np.array([8, 0, 2]))
    load.end_step()
    assert load.tokens().tolist() == [[0, 0, 0], [8, 0, 2]]
    for _ in range(4):
        load.observe(0, np.array([1, 1, 1]))
        load.drop_step()
        load.end_step()
    assert load.tokens() == pytest.approx(np.array([[0, 0, 0], [4, 0, 1]]))
    assert load.steps == 5
    with pytest.raises(IntegrityError):
        ExpertLoad(1, 1, half_life_steps=0)


def test_transitions_are_weighted_by_the_gates_of_both():
    trace = RouteTrace(3, 4, every=1)
    gates = np.array([[0.75, 0.25]])
    trace.observe(0, np.array([[1, 2]]), gates)
    trace.observe(1, np.array([[3, -1]]), gates)
    trace.end_step()
    trace.observe(1, np.array([[0, 0]]), gates)  # another step's tokens: nothing precedes them
    expected = np.zeros((2, 4, 4))
    expected[0, 1, 3], expected[0, 2, 3] = 0.75 * 0.75, 0.25 * 0.75
    assert trace.transitions() == pytest.approx(expected)
    trace.fade(0.5)
    assert trace.transitions() == pytest.approx(expected / 2)


def test_some_steps_and_some_models_are_not_traced():
    trace = RouteTrace(2, 4, every=3)
    seen = []
    for _ in range(6):
        seen.append(trace.wanted())
        trace.end_step()
    assert seen == [True, False, False, True, False, False]
    assert not RouteTrace(2, MOST_TRACED_EXPERTS + 1).wanted()
    assert RouteTrace(1, 8).transitions().shape == (0, 8, 8)


def test_skew_is_of_the_worst_layer_and_one_without_load():
    assert skew(np.array([[1.0, 1.0], [3.0, 1.0], [0.0, 0.0]])) == 1.5
    assert skew(np.zeros((2, 3))) == 1.0
