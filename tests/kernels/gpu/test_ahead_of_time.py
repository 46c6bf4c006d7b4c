"""Every kernel configuration in use compiles for every target, fits it, and takes no more than the table says.

A worse figure fails with both numbers. Where it is meant, `python tests/kernels/gpu/ahead_of_time.py --write` states it
anew, and the change of the table is reviewed with the change of the kernel.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from penstock.kernels.gpu.aot import all_cases
from penstock.kernels.gpu.resource_usage import ResourceUsage

HERE = Path(__file__).parent
TABLE = json.loads((HERE / "resource_usage.json").read_text())
FIGURES = ("registers", "spilled_bytes", "shared_bytes")
# A compile takes long: CI does every eighth case of one target, the hand-over all of all.
IN_CI = {"sm_90": 8}
# Where nothing may spill. On the others some of the largest attention tiles do, by what the table says and no more.
NO_SPILLS = ("sm_90",)


def compiled(target, folder, every):
    """What ahead_of_time.py reads, in a process of its own without the interpreter."""
    out = folder / f"{target}.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        str(HERE / "ahead_of_time.py"),
        "--target",
        target,
        "--every",
        str(every),
        "--out",
        str(out),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def worse(table, found, target):
    """One line for every figure that is above the table's, and for every case that the table lacks."""
    lines = []
    for name, usages in found.items():
        if target not in usages:
            continue
        recorded = table.get(name, {}).get(target)
        if recorded is None:
            lines.append(f"{name} for {target} is not in resource_usage.json: {usages[target]}")
            continue
        lines += [
            f"{name} for {target}: {usages[target][figure]} {figure}, was {recorded[figure]}"
            for figure in FIGURES
            if usages[target][figure] > recorded[figure]
        ]
    return lines


def unfit(found, target, may_spill=()):
    """One line for every case that the hardware cannot hold or that spills where it must not."""
    lines = []
    for name, usages in found.items():
        if target in usages:
            usage = ResourceUsage(**usages[target])
            lines += [f"{name} for {target}: {problem}" for problem in usage.over(target)]
            if target in NO_SPILLS and usage.spilled_bytes and name not in may_spill:
                lines.append(f"{name} for {target}: {usage.spilled_bytes} bytes spilled")
    return lines


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("target", "every"),
    [*IN_CI.items(), *(pytest.param(each, 1, marks=pytest.mark.slow) for each in ("sm_90", "sm_80", "gfx942"))],
)
def test_configurations_compile_and_take_no_more_than_the_table(target, every, tmp_path):
    found = compiled(target, tmp_path, every)
    assert found["refused"] == {}
    assert unfit(found["cases"], target, found["may_spill"]) == []
    if found["triton"] != TABLE["triton"]:
        pytest.skip(
            f"the table is of Triton {TABLE['triton']}, this is {found['triton']}: only the limits were checked"
        )
    assert worse(TABLE["cases"], found["cases"], target) == []
    assert len(found["cases"]) >= len(TABLE["cases"]) // every


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942"])
def test_the_table_is_of_all_targets_and_within_their_limits(target):
    assert TABLE["refused"] == {}
    assert TABLE["cases"].keys() == all_cases().keys(), "not the cases in use: rewrite the table"
    serving = {name for name, case in all_cases().items() if case.serves(target)}
    assert {name for name, usages in TABLE["cases"].items() if target in usages} == serving
    assert unfit(TABLE["cases"], target, TABLE["may_spill"]) == []


def test_attention_and_matrix_kernels_may_not_spill():
    kinds = ("attention", "linear", "quantized_linear", "int4_gemm", "moe_gemm", "lora")
    assert [name for name in TABLE["may_spill"] if name.startswith(kinds)] == []


def test_a_worse_figure_is_told_with_both_numbers():
    table = {"a/b": {"sm_90": {"registers": 64, "spilled_bytes": 0, "shared_bytes": 1024}}}
    grown = {"a/b": {"sm_90": {"registers": 72, "spilled_bytes": 8, "shared_bytes": 1000}}}
    assert worse(table, grown, "sm_90") == [
        "a/b for sm_90: 72 registers, was 64",
        "a/b for sm_90: 8 spilled_bytes, was 0",
    ]
    assert worse({}, grown, "sm_90")[0].startswith("a/b for sm_90 is not in resource_usage.json")
    assert unfit(grown, "sm_90") == ["a/b for sm_90: 8 bytes spilled"]
    assert unfit(grown, "sm_90", ["a/b"]) == []


def test_more_than_the_hardware_has_is_told():
    assert ResourceUsage(300, 0, 228 << 10).over("sm_90") == [
        "300 registers, at most 255",
        f"{228 << 10} bytes of shared memory, at most {227 << 10}",
    ]
    assert ResourceUsage(255, 0, 163 << 10).over("sm_80") == []
    assert ResourceUsage(0, 0, (64 << 10) + 1).over("gfx942") != []
