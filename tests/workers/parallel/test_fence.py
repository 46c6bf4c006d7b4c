"""Ranks that do not end are ended: the culprit at once, the others after their grace, and nobody else."""

import subprocess
import sys
import time

import pytest

from penstock.workers.parallel.fence import RankProcess, end_ranks

SLEEPS = "import time; time.sleep(60)"
ENDS = "import time; time.sleep(0.1)"


def process(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-E", "-c", code])


@pytest.mark.timeout(20)
def test_culprit_first_then_who_is_left() -> None:
    with process(SLEEPS) as culprit, process(ENDS) as obedient, process(SLEEPS) as stuck, process(SLEEPS) as bystander:
        ranks = [RankProcess(rank, each.pid) for rank, each in ((1, culprit), (2, obedient), (3, stuck))]
        began = time.monotonic()
        end_ranks(ranks, 1, 1.0)
        assert time.monotonic() - began < 5.0
        assert culprit.wait(5) == -9
        assert obedient.wait(5) == 0
        assert stuck.wait(5) == -9
        assert bystander.poll() is None
        bystander.kill()
        assert all(rank.gone for rank in ranks)
        for rank in ranks:
            rank.close()


def test_a_process_that_is_long_gone_is_no_other() -> None:
    with process("") as gone:
        gone.wait(5)
        rank = RankProcess(1, gone.pid)
        assert rank.gone
        rank.kill()
        rank.close()
