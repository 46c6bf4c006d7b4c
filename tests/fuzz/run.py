"""Feeds readers N damaged inputs and fails at the first that crashes one, costs too much, or is half understood.

    python tests/fuzz/run.py wire [safetensors ...] --inputs 10000000 [--seed 1] [--json FILE]

`targets.py` names the readers. Memory is bounded by the system (address space: what was taken at the start and
`SPARE_BYTES`), so that an allocation that an input asked for is an error and not a number; the growth of the resident
set is told beside it. The time of every input is the processor's, so other load does not count. A failure names seed
and number of the input and prints it; the same seed and target repeat it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.targets import TARGETS, Target

SPARE_BYTES = 256 << 20
GROWTH_BYTES = 64 << 20  # of the resident set over a whole run: nothing is kept of an input
SLOWEST_S = 1.0
HANG_S = 60
COMPLAINT_CHARS = 8192  # of a refusal: it goes into logs and answers
WARM = 1000
SLOW = {"key-files": 20, "grammars": 10, "adapters": 10}  # so many times fewer inputs: YAML, a compiler, files
CHUNK = 1000


def main(arguments: list[str] | None = None) -> int:
    """Run the targets one after the other; 0 when all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="+", choices=sorted(TARGETS), metavar="target", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args(arguments)
    every = []
    for name in options.targets:
        every.append(_run(name, options.inputs // SLOW.get(name, 1), options.seed))
        print(json.dumps(every[-1]))
    if options.json is not None:
        options.json.write_text(json.dumps(every, indent=1) + "\n")
    dear = [one for one in every if one["resident_growth_bytes"] > GROWTH_BYTES or one["slowest_input_s"] > SLOWEST_S]
    for one in dear:
        print(f"{one['target']}: inputs cost more than they may", file=sys.stderr)
    return 1 if dear else 0


def _run(name: str, inputs: int, seed: int) -> dict[str, Any]:
    target = TARGETS[name](random.Random(0))
    _feed(target, random.Random(seed + 1), min(WARM, inputs), name)
    before = _resident()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, hard))
    figures = _feed(target, random.Random(seed), inputs, name)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    return {"target": name, "seed": seed, **figures, "resident_growth_bytes": _resident() - before}


def _feed(target: Target, rng: random.Random, inputs: int, name: str) -> dict[str, Any]:
    accepted, slowest, longest = 0, 0.0, 0
    began = time.process_time()
    for number in range(inputs):
        if number % CHUNK == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True)
        made = target.make(rng)
        start = time.thread_time()
        try:
            target.feed(made)
            accepted += 1
        except target.refusals as refusal:
            longest = max(longest, len(str(refusal)))
        except BaseException:
            print(f"{name}: input {number} broke the reader: {made!r:.4000}", file=sys.stderr)
            raise
        slowest = max(slowest, time.thread_time() - start)
        if longest > COMPLAINT_CHARS:
            raise AssertionError(f"{name}: input {number} is complained of in {longest} characters")
    faulthandler.cancel_dump_traceback_later()
    spent = time.process_time() - began
    return {
        "inputs": inputs,
        "accepted": accepted,
        "inputs_per_cpu_s": round(inputs / spent),
        "slowest_input_s": round(slowest, 4),
        "longest_complaint": longest,
    }


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    sys.exit(main())
