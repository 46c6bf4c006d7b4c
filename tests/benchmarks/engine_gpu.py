"""The whole engine on a GPU, without Ray: scheduler, runner, recorded steps, hand-over; random weights, no files.

    python tests/benchmarks/engine_gpu.py --json results.json          # on an H100 or H200, less than 8 minutes
    python tests/benchmarks/engine_gpu.py --toy [--kernels gpu|cpu]    # toy shapes on the CPU, to try the script

Each model runs in a process of its own, which also gives the time from its start to its first token. Every row stands
beside the limit of the hardware (`gpu_limits.py`) from rates measured in the same process. A row that cannot be had
says why. `--toy` runs the GPU's kernels under Triton's interpreter (`--kernels cpu`: the CPU's own, in seconds), with
steps that are recorded by running them again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.provenance import provenance

BUDGET_S = 460.0
# Share of what is left that a model may take, in this order: the large ones must not starve those behind them.
SHARES = {"llama-3.1-8b": 0.42, "qwen3-0.6b": 0.42, "qwen3-30b-a3b": 0.75}
HANDOVER_SHARE = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there, besides printing it")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--kernels", choices=("gpu", "cpu"), default="gpu", help="of --toy")
    parser.add_argument("--model", action="append", choices=[*SHARES, "qwen3-8b"], help="only these")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--no-handover", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    deadline = began + args.budget_s
    result: dict[str, Any] = {"benchmark": "engine_gpu", "toy": args.toy, **provenance(), "models": {}}
    for model in args.model or list(SHARES):
        share = SHARES.get(model, 0.5)
        until = time.monotonic() + share * max(0.0, deadline - time.monotonic())
        result["models"][model] = run_part(args, "gpu_model.py", until, "--name", model)
    if not args.no_handover:
        result["handover"] = run_part(args, "gpu_handover.py", deadline)
    result["took_s"] = round(time.monotonic() - began, 1)
    text = json.dumps(result, indent=1)
    if args.json is not None:
        args.json.write_text(text + "\n")
    print(text)


def run_part(args: argparse.Namespace, script: str, until: float, *more: str) -> dict[str, Any]:
    """One part in its own process; what it wrote, or why it wrote nothing."""
    left = until - time.monotonic()
    if left < 5:
        return {"skipped": "no time left"}
    environment = dict(os.environ)
    if args.toy:
        kernels = {"PENSTOCK_KERNELS": args.kernels}
        environment |= kernels if args.kernels == "cpu" else {**kernels, "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory(prefix="penstock-engine-gpu-") as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, str(Path(__file__).parent / script), "--out", str(out), *more]
        command += ["--spawned-at", str(time.monotonic()), "--deadline", str(until), *(["--toy"] if args.toy else [])]
        try:
            done = subprocess.run(
                command,
                env=environment,
                timeout=left + 20,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            output, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            output, code = error.stdout or b"", -1
        # A part writes after every row, so that what was measured survives an end in the middle.
        found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if code:
        tail = output.decode(errors="replace").splitlines()[-12:]
        found["ended"] = {"exit_code": code, "output": tail}
    return found


if __name__ == "__main__":
    main()
