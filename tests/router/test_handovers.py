"""Prompts in transit: who comes meanwhile waits a little, and is woken."""

import numpy as np

from penstock.router.handovers import Handovers

PROMPT = np.array([3, 4, 5], np.uint64)


def test_the_same_prompt_waits_until_it_is_there() -> None:
    woken: list[str] = []
    handovers = Handovers(0.25)
    handovers.begin(PROMPT, 10.0)
    wake = lambda: woken.append("x")  # noqa: E731 - the very same callable comes twice
    assert handovers.wait(PROMPT, wake, 10.0) == 0.25
    assert handovers.wait(PROMPT, wake, 10.1) > 0
    handovers.done(PROMPT)
    assert woken == ["x"]
    assert handovers.wait(PROMPT, wake, 10.1) == 0


def test_other_prompts_do_not_wait() -> None:
    handovers = Handovers(0.25)
    handovers.begin(PROMPT, 10.0)
    assert handovers.wait(PROMPT[:2], lambda: None, 10.0) == 0
    assert handovers.wait(PROMPT[:0], lambda: None, 10.0) == 0
    handovers.begin(PROMPT[:0], 10.0)
    assert len(handovers) == 1


def test_an_unfinished_one_expires() -> None:
    woken: list[str] = []
    handovers = Handovers(0.25)
    handovers.begin(PROMPT, 10.0)
    handovers.wait(PROMPT, lambda: woken.append("first"), 10.0)
    assert handovers.wait(PROMPT, lambda: woken.append("second"), 10.3) == 0
    assert woken == ["first"]
    assert len(handovers) == 0
