"""The decoder with adapters on the GPU's kernels, under Triton's interpreter, says what it says on the CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.adapters import make_adapter

PROGRAM = """
import json, sys
from pathlib import Path
from fakes.in_process import InProcessWorker
from penstock.cluster.model_directory import EMBEDDED_MODEL
from penstock.workers.adapter_ref import AdapterRef
from penstock.workers.lora.adapter_files import read_adapter
from penstock.workers.lora.store import AdapterStore
from penstock.workers.model_build import build_model_runner
from penstock.workers.protocol import GenerateRequest, SamplingParams
from penstock.workers.settings import AdapterSettings, KVSettings, RunnerSettings, SchedulerSettings

home = Path(sys.argv[1])
adapters = AdapterSettings(str(home), max_loaded=2, max_rank=5)
scheduler = SchedulerSettings(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=64)
runner = build_model_runner(
    RunnerSettings(model_dir=str(EMBEDDED_MODEL), dtype="float32"), KVSettings(), scheduler, adapters=adapters
)
store = AdapterStore(adapters, runner.adapters.sizes, runner.adapters, lambda: None)
refs = [None] + [
    AdapterRef(name, name, read_adapter(home, name, runner.adapters.sizes, 5).revision) for name in ("a", "b")
]
requests = [
    GenerateRequest(str(n), tuple(range(5 + n, 15 + 2 * n)), SamplingParams(4), adapter=refs[n % 3]) for n in range(4)
]
with InProcessWorker(runner, num_blocks=64, scheduler=scheduler, adapters=store) as worker:
    print(json.dumps([output.tokens for output in worker.generate(requests)]))
store.stop()
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_same_tokens(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, rank=3 + seed * 2, seed=seed)
    found = {}
    for kernels, more in (("cpu", {}), ("reference", {}), ("gpu", {"TRITON_INTERPRET": "1"})):
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **more, "PENSTOCK_KERNELS": kernels, "PYTHONPATH": paths}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found[kernels] = json.loads(done.stdout.splitlines()[-1])
    assert found["cpu"] == found["reference"] == found["gpu"]
    assert len({tuple(tokens) for tokens in found["cpu"]}) > 2  # two of the four are of the model alone
