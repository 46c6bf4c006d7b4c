"""The ranks of one `expert_rank.py` run as processes, for tests that kill them and the benchmark that times it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fakes import expert_rank
from fakes.expert_rank import ExpertRun

PROGRAM = Path(expert_rank.__file__)


class ExpertProcesses:
    """The ranks of one run; ended by `close` whatever happened."""

    def __init__(self, run: ExpertRun, log: Path) -> None:
        self.run = run
        self._log = log.open("wb")
        self.ranks = [self._start()]
        self._begin(0, "")
        address = self.line()["address"]
        for rank in range(1, run.num_ranks):
            self.ranks.append(self._start())
            self._begin(rank, address)

    def _start(self) -> subprocess.Popen[str]:
        command = (sys.executable, str(PROGRAM))
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)

    def _begin(self, rank: int, address: str) -> None:
        fields = {**dataclasses.asdict(self.run), "rank": rank, "address": address}
        self.ranks[rank].stdin.write(json.dumps(fields) + "\n")
        self.ranks[rank].stdin.close()

    def line(self) -> dict[str, Any]:
        text = self.ranks[0].stdout.readline()
        assert text, "rank 0 ended"
        return json.loads(text)

    def until_step(self, step: int) -> dict[str, Any]:
        while True:
            line = self.line()
            if line.get("step", -1) >= step:
                return line

    def result(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The last line, and those of the steps before it."""
        lines = []
        while "history" not in (line := self.line()):
            lines.append(line)
        return line, lines

    def close(self) -> None:
        for process in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait(10)
            process.stdout.close()
        self._log.close()
