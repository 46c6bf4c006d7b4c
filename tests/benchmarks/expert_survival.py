"""Experts on four ranks as processes: the stall when one is killed, and the skew of load before and after levelling.

Run from the repository's root: `python tests/benchmarks/expert_survival.py`. Compute is paced by sleep, 4 ms a layer,
so that two cores hold four ranks. Prints one JSON object; exits 1 where a bar is missed or a token is wrong.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import itertools

from benchmarks.provenance import provenance
from fakes import expert_rank
from fakes.expert_processes import ExpertProcesses
from fakes.expert_rank import ExpertRun

MOST_STALL_S, MOST_SKEW = 1.0, 1.2


def killed(log: Path) -> dict[str, object]:
    """Two copies of every expert, one rank killed: every stream goes on, with the very tokens."""
    run = ExpertRun(rank=0, num_ranks=4, address="", streams=40, steps=150)
    processes = ExpertProcesses(run, log)
    try:
        processes.until_step(50)
        processes.ranks[2].kill()
        result, lines = processes.result()
    finally:
        processes.close()
    right = expert_rank.undisturbed(run)
    wrong = sum(
        a != b for row, other in zip(result["history"], right, strict=True) for a, b in zip(row, other, strict=True)
    )
    times = [line["at"] for line in lines]
    step_s = statistics.median(b - a for a, b in itertools.pairwise(times))
    stall_s = result["stall_s"]
    return {
        "streams": 40,
        "median_step_s": round(step_s, 4),
        "stall_s": round(stall_s, 3),
        "wrong_tokens": wrong,
        "right": wrong == 0 and stall_s <= MOST_STALL_S,
    }


def levelled(log: Path) -> dict[str, object]:
    """16 experts under a power-law router (1.2), 5 slots on each rank: skew while every rank still has its start."""
    run = ExpertRun(0, 4, "", 120, 300, experts=16, slots=5, least_copies=1, rebalance_steps=60, power=1.2)
    processes = ExpertProcesses(run, log)
    try:
        result, lines = processes.result()
    finally:
        processes.close()
    wrong = result["history"] != expert_rank.undisturbed(run)
    before = next(line["skew"] for line in lines if line.get("step") == 59)
    after = lines[-1]["skew"]
    return {
        "skew_before": round(before, 3),
        "skew_after": round(after, 3),
        "plans": result["generation"],
        "tokens_wrong": wrong,
        "right": not wrong and after <= MOST_SKEW,
    }


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ranks.log"
        found = {"killed": killed(log), "levelled": levelled(log)}
    print(json.dumps({"what": "experts over 4 ranks", **provenance(), **found}, indent=2))
    return 0 if all(case["right"] for case in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
