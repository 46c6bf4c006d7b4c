#!/usr/bin/env python3
"""Compile every kernel configuration in use for GPUs that need not be here, and read what each one takes.

    python tests/kernels/gpu/ahead_of_time.py --write      rewrite resource_usage.json (all targets)
    python tests/kernels/gpu/ahead_of_time.py --target sm_90 [--every 3] [--out FILE]      print or store as JSON

Compiled results are kept in Triton's own cache, by source: an unchanged kernel is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton reads it: the interpreter has no compiler

import triton

from penstock.kernels.gpu.aot import all_cases
from penstock.kernels.gpu.resource_usage import TARGETS, compile_case

TABLE = Path(__file__).with_name("resource_usage.json")


def figures(targets: list[str], every: int = 1) -> dict[str, object]:
    """Of all cases, or of the first and every so manieth after it.

    {"triton": version, "cases": {case: {target: usage}}, "refused": {case: {target: message}}}.
    """
    found: dict[str, dict[str, object]] = {}
    refused: dict[str, dict[str, str]] = {}
    for name, case in list(all_cases().items())[::every]:
        found[name] = {}
        for target in filter(case.serves, targets):
            try:
                found[name][target] = asdict(compile_case(case, target))
            except Exception as problem:  # noqa: BLE001  # whatever the compiler says is the figure
                refused.setdefault(name, {})[target] = f"{type(problem).__name__}: {problem}"[:500]
    may_spill = sorted(name for name, case in all_cases().items() if case.may_spill)
    return {"triton": triton.__version__, "may_spill": may_spill, "cases": found, "refused": refused}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.write and args.every != 1:
        parser.error("the table is of every case")
    text = json.dumps(figures(args.target or list(TARGETS), args.every), indent=1, sort_keys=True) + "\n"
    if args.write or args.out:
        (TABLE if args.write else args.out).write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
