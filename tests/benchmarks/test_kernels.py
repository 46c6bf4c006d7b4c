"""The kernel benchmark: every operation has a row, every row runs at toy size and is right, and no speed is claimed."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernel_bench import cpu_table, rows_attention, rows_elementwise, rows_latent, rows_matrix, shapes
from kernel_bench.space import SPACES

from penstock.kernels import ops

HERE = Path(__file__).parent
# Once at load, or part of another operation's row.
NOT_TIMED = {
    "pack_weight",
    "quantize_weight",
    "pack_experts",
    "plan_lora",
    "plan_attention",
    "attention_workspace",
    "paged_attention_with_lse",
    "merge_states",
}


def rows(plan):
    return [row for part in (rows_attention, rows_latent, rows_matrix, rows_elementwise) for row in part.rows(plan)]


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(HERE / "kernels.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_operation_is_timed():
    names = {
        name for name, each in inspect.getmembers(ops, inspect.isfunction) if "Semantics:" in (each.__doc__ or "")
    } - NOT_TIMED
    assert names <= {row.group for row in rows(shapes.REAL)}
    assert {row.group for row in rows(shapes.REAL)} == {row.group for row in rows(shapes.TOY)}


def test_rows_are_named_once_and_cover_what_is_asked():
    names = [row.name for row in rows(shapes.REAL)]
    assert len(set(names)) == len(names)
    for wanted in (
        "decode 8B 64x8K",
        "decode 8B 128x4K",
        "decode 8B 32x1K",
        "prefill 8B 16K",
        "shared prefix 8B 16Kx256",
        "unshared prefix 8B 16Kx256",
        "linear bf16 8B down m1",
        "linear int4_group 8B qkv m16",
        "linear fp8_channel 8B gate_up m4096",
        "fused_moe 30B-A3B T16384",
    ):
        assert wanted in names
    assert {row.kernel for row in rows(shapes.REAL)} >= SPACES.keys()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_toy_rows_are_right_and_claim_nothing():
    found = run("--toy")
    assert found["device"] == "interpreter"
    assert found["rows"].keys() == {row.name for row in rows(shapes.TOY)}
    for name, row in found["rows"].items():
        assert "failed" not in row, name
        assert max(row["error_of_bound"].values()) <= 1, name
        assert not {"us", "fraction", "tflops", "peers"} & row.keys()


def test_the_cpu_table_has_every_backend_of_this_machine():
    import torch

    torch.manual_seed(0)
    found = cpu_table.table(2, 40, torch.float32, repeats=2)
    names = {backend.name for backend in cpu_table.backends(torch.float32)[:-1]}
    assert all(found[f"{name}_us"].keys() == names for name in ("linear", "paged_attention", "sample_tokens"))
    assert found["linear_share_of_copy"] > 0


def test_without_a_gpu_the_full_run_says_what_else_there_is():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, str(HERE / "kernels.py")], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "--toy" in done.stderr


def test_a_timed_row_has_its_fraction_its_peers_and_no_excuse():
    """The same path as on a card, with this machine's clock and made-up rates."""
    import dataclasses
    import importlib.util

    import torch
    from kernel_bench.sol import Rates
    from kernel_bench.timing import Clock

    spec = importlib.util.spec_from_file_location("kernels_benchmark", HERE / "kernels.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    row = next(row for row in rows(shapes.TOY) if row.group == "linear")
    problem = row.make(torch.device("cpu"))
    problem = dataclasses.replace(
        problem,
        peers={
            "same": problem.call,
            "wrong": lambda each: problem.call(each) * 2,
            "broken": lambda each: each["nothing"],
        },
    )
    clock = Clock(torch.device("cpu"), warm_ups=1, runs=3)
    with torch.inference_mode():
        found = benchmark.timed_row(row, problem, clock, Rates(1e6, 1e6, 1e6))
    assert found["us"] > 0
    assert found["fraction"] == pytest.approx(found["bound_us"] / found["us"], rel=0.02)
    assert found["suspicious"]
    assert found["error_of_bound"].keys() == {*problem.kinds, "timed"}
    assert found["peers"]["same"]["ratio"] > 0
    assert "beyond the bound" in found["peers"]["wrong"]["differs"]
    assert "KeyError" in found["peers"]["broken"]["failed"]
