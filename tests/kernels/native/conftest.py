"""The C++ kernels as each instruction set that this machine has compiles them."""

import pytest

from penstock.kernels.native import build, library

BEST = build.machine_level()
LEVELS = list(build.LEVELS)
RUNNABLE = LEVELS[LEVELS.index(BEST) :] if BEST != "asimd" else [BEST]
RUNNABLE = [level for level in RUNNABLE if (level == "asimd") == (BEST == "asimd")]


def in_ci(level):
    """The best and the plainest of this machine; what lies between is compiled for the hand-over only."""
    return level in (RUNNABLE[0], RUNNABLE[-1])


@pytest.fixture(params=[pytest.param(each, marks=[] if in_ci(each) else [pytest.mark.slow]) for each in RUNNABLE])
def level(request, monkeypatch):
    """Every test with it runs once per instruction set."""
    monkeypatch.setattr(library, "machine_level", lambda: request.param)
    library.load.cache_clear()
    library.function.cache_clear()
    assert library.load() is not None
    yield request.param
    library.load.cache_clear()
    library.function.cache_clear()
