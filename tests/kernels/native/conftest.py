"""The C++ kernels as each instruction set that this machine has compiles them."""

import pytest

from penstock.kernels.native import build, library

BEST = build.machine_level()
LEVELS = list(build.LEVELS)
RUNNABLE = LEVELS[LEVELS.index(BEST) :] if BEST != "asimd" else [BEST]
RUNNABLE = [level for level in RUNNABLE if (level == "asimd") == (BEST == "asimd")]


@pytest.fixture(params=RUNNABLE)
def level(request, monkeypatch):
    """Every test with it runs once per instruction set."""
    monkeypatch.setattr(library, "machine_level", lambda: request.param)
    library.load.cache_clear()
    library.function.cache_clear()
    assert library.load() is not None
    yield request.param
    library.load.cache_clear()
    library.function.cache_clear()
