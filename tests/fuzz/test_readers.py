"""A few thousand damaged inputs for every reader of foreign bytes, in a process of their own; `run.py` takes more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from fuzz.targets import TARGETS

RUN = Path(__file__).with_name("run.py")


def test_no_input_breaks_a_reader(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), *TARGETS, "--inputs", "6000", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = {one["target"]: one for one in json.loads((tmp_path / "figures.json").read_text())}
    assert set(figures) == set(TARGETS)
    # Both kinds came: a fuzzer whose inputs are all refused, or all accepted, looks at nothing behind the first check.
    assert [name for name, one in figures.items() if not 0.01 < one["accepted"] / one["inputs"] < 0.99] == []
