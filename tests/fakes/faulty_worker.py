"""A worker process whose first incarnation breaks its transfers: `faulty_worker.py WORKER_ID die_after=3 ...`."""

from __future__ import annotations

import io
import json
import sys

from penstock.workers.process import main
from penstock.workers.transfer.faults import TransferFaults


def faults_for(line: str, worker_id: str, words: list[str]) -> TransferFaults | None:
    settings = json.loads(line)
    if settings["worker_id"] != worker_id or settings["incarnation"] != 1:
        return None
    numbers = {name: int(value) for name, value in (word.split("=") for word in words)}
    die_after = numbers.pop("die_after", None)
    return TransferFaults(die_after=die_after, **{name: frozenset([value]) for name, value in numbers.items()})


if __name__ == "__main__":
    first_line = sys.stdin.readline()
    sys.stdin = io.StringIO(first_line)
    sys.exit(main(faults_for(first_line, sys.argv[1], sys.argv[2:])))
