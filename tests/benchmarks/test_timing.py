"""The clock: every run has inputs of its own, warm-ups are not counted, and the result is that of the last run."""

import pytest
import torch
from kernel_bench.correctness import Bound
from kernel_bench.problem import Problem
from kernel_bench.sol import Cost
from kernel_bench.timing import Clock, Timed


def test_runs_and_warm_ups():
    asked = []
    clock = Clock(torch.device("cpu"), warm_ups=3, runs=5)
    timed = clock.time(lambda inputs: inputs["n"] * 2, lambda n: asked.append(n) or {"n": torch.tensor(n)})
    assert asked == [0, 1, 2, 0, 1, 2, 3, 4]
    assert len(timed.runs_us) == 5
    assert int(timed.result) == 8
    assert timed.median_us > 0


def test_median_and_spread():
    timed = Timed([1.0, 2.0, 3.0, 4.0, 100.0], None)
    assert timed.median_us == 3.0
    assert timed.spread > 0


def problem(call):
    x, w = torch.randn(4, 8), torch.randn(3, 8)
    return Problem(
        {"x": x, "w": w},
        ("x",),
        call,
        lambda each: each["x"].double() @ each["w"].double().t(),
        lambda _: Bound(1e-4, 0.0),
        Cost(1, 1, 1),
        (4, 3),
        torch.float32,
    )


def test_inputs_differ_between_runs_in_value_and_address():
    made = problem(lambda each: each["x"] @ each["w"].t())
    first, second = made.fresh(1), made.fresh(2)
    assert not torch.equal(first["x"], second["x"])
    assert torch.equal(first["w"], second["w"])
    assert first["w"].data_ptr() != second["w"].data_ptr() != made.inputs["w"].data_ptr()
    assert torch.equal(made.fresh(2)["x"], second["x"])
    assert not made.fresh(0, "zeros")["x"].any()


def test_a_candidate_that_remembers_its_first_answer_is_caught():
    kept = {}
    honest = problem(lambda each: each["x"] @ each["w"].t())
    lazy = problem(lambda each: kept.setdefault("y", each["x"] @ each["w"].t()))
    clock = Clock(torch.device("cpu"), warm_ups=2, runs=3)
    honest.check(clock.time(honest.call, honest.fresh).result, clock.runs - 1)
    result = clock.time(lazy.call, lazy.fresh).result
    with pytest.raises(AssertionError, match="beyond the bound"):
        lazy.check(result, clock.runs - 1)
