"""Whether processes are still there, for tests that must leave none."""

import os


def alive(pid: int) -> bool:
    """A process that has ended and was not waited for counts as alive."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
