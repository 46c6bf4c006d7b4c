"""The tuner's file: defaults claim nothing, one entry a line, measured kernels are kept; searches take turns."""

import json
import math

import pytest

pytest.importorskip("triton")

import tune_kernels
from kernel_bench.search import Search
from kernel_bench.space import SPACES

from penstock.kernels.gpu import tuning


def test_defaults_are_the_committed_table():
    text = tune_kernels.written(tune_kernels.defaults())
    committed = json.loads((tuning.TABLES / "h100.json").read_text())
    if committed["measured"]:
        pytest.skip("the committed table was measured")
    assert committed == json.loads(text)
    assert sum('"key"' in line for line in text.splitlines()) == text.count('"key"')


def test_the_tables_keys_are_those_that_launchers_ask_for():
    keys = {kernel: {tuple(sorted(entry["key"])) for entry in section["entries"]} for kernel, section in
            tune_kernels.defaults()["kernels"].items()}  # fmt: skip
    assert all(len(names) == 1 for names in keys.values())
    assert keys.keys() >= SPACES.keys()


def test_measured_kernels_are_kept_and_defaults_are_not():
    new = {"measured": True, "kernels": {"b": {"entries": [2]}}}
    old = {"measured": True, "kernels": {"a": {"entries": [1]}, "b": {"entries": [0]}}}
    assert tune_kernels.merged(old, new)["kernels"] == {"a": {"entries": [1]}, "b": {"entries": [2]}}
    assert tune_kernels.merged({**old, "measured": False}, new)["kernels"] == new["kernels"]


def task(slow, seed=0):
    space, key = SPACES["rms_norm"], {"rows": 4096, "width": 128}

    def seconds(config):
        return slow * (1 + abs(math.log2(config["ROWS"] / 8)) + abs(math.log2(config["num_warps"] / 4)))

    return tune_kernels.Task("rms_norm", key, Search(space.configs(key), seconds, seed=seed), bound=slow)


def test_searches_take_turns_and_end_with_their_trials():
    tasks = [task(1e-6), task(1e-3)]
    tune_kernels.run_tasks(tasks, 20, math.inf)
    assert [len(each.search.found.trials) for each in tasks] == [20, 20]
    entry = tasks[0].entry()
    assert entry["config"]["ROWS"] == 8
    assert entry["fraction"] == 1.0


def test_turns_waste_less_time_than_round_robin():
    """Total regret: what a workload would lose by the best so far, summed over the rounds."""
    shares = [1e-3, 1e-5, 1e-5, 1e-5]

    def regret(choose):
        tasks, total = [task(share, seed) for seed, share in enumerate(shares)], 0.0
        for number in range(32):
            tasks[choose(number, tasks)].advance(1)
            total += sum(
                share / each.fraction if each.fraction else 20 * share
                for share, each in zip(shares, tasks, strict=True)
            )
        return total

    def promising(number, tasks):
        fractions = [each.fraction for each in tasks]
        return tune_kernels.next_task(shares, fractions, [each.gain for each in tasks])

    assert regret(promising) < regret(lambda number, tasks: number % len(tasks))


@pytest.mark.slow
def test_every_candidate_that_constraints_admit_is_compiled_before_it_runs():
    """Constraint estimates against the compiler: what spills or does not fit is refused here, not on the card."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import tune_kernels\n"
        "from kernel_bench.space import SPACES\n"
        "space = SPACES['linear']\n"
        "configs = space.configs({'T': 64, 'M': 4096, 'K': 4096})[::60]\n"
        "found = [tune_kernels.compiles(space, config, 'sm_90') for config in configs]\n"
        "assert any(found), configs\n"
        "huge = {**configs[0], 'BLOCK_T': 256, 'BLOCK_M': 256, 'BLOCK_K': 128, 'num_stages': 5}\n"
        "assert not tune_kernels.compiles(space, huge, 'sm_90')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_row_is_tuned_from_end_to_end_under_the_interpreter():
    """The card's path with this machine's clock: keys and defaults are heard, candidates reach the kernel, and win."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    program = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import torch, tune_kernels\n"
        "from kernel_bench import rows_attention, rows_elementwise, rows_latent, rows_matrix, shapes\n"
        "from kernel_bench.sol import Rates\n"
        "from kernel_bench.timing import Clock\n"
        "tune_kernels.compiles = lambda space, config, target: config['num_warps'] <= 4\n"
        "clock, device = Clock(torch.device('cpu'), warm_ups=0, runs=2), torch.device('cpu')\n"
        "parts = (rows_attention, rows_latent, rows_matrix, rows_elementwise)\n"
        "rows = [row for part in parts for row in part.rows(shapes.TOY)]\n"
        "done = set()\n"
        "for row in rows:\n"
        "    if row.kernel in tune_kernels.SPACES and row.kernel not in done:\n"
        "        done.add(row.kernel)\n"
        "        task = tune_kernels.make_task(row, device, clock, Rates(1e6, 1e6, 1e6), 'sm_90', 0)\n"
        "        assert task is not None, row.name\n"
        "        tune_kernels.run_tasks([task], 2, time.monotonic() + 60)\n"
        "        entry = task.entry()\n"
        "        assert entry['key'] and entry['config']['num_warps'] <= 4 and entry['fraction'] > 0, entry\n"
        "assert done == tune_kernels.SPACES.keys(), tune_kernels.SPACES.keys() - done\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PENSTOCK_KERNELS": "gpu"}
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", program, folder], env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
