"""What a compiled kernel takes of a multiprocessor: registers, spilled bytes, shared memory; read from the binary.

Called by the ahead-of-time test and by the tuner, on machines with or without a GPU, never while serving. CUDA's
figures are those of `cuobjdump --dump-resource-usage`, which ships with Triton; AMD's stand in the assembly's metadata.
Must run without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from penstock.kernels.gpu.aot import ALIGNMENT, AotCase
from penstock.kernels.gpu.tuning import MOST_STAGES_ON_AMD

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What one program may have, in bytes.
SHARED_LIMITS = {"sm_90": 227 << 10, "sm_80": 163 << 10, "gfx942": 64 << 10}
# gfx942 has 512 vector registers a lane, half of them reachable only as accumulators.
REGISTER_LIMITS = {"sm_90": 255, "sm_80": 255, "gfx942": 512}


@dataclass(frozen=True, slots=True)
class ResourceUsage:
    """Registers a thread (vector registers on AMD), bytes a thread that spill to memory, shared bytes a program."""

    registers: int
    spilled_bytes: int
    shared_bytes: int

    def over(self, target: str) -> list[str]:
        """What of it the hardware of `target` does not have."""
        found = []
        if self.registers > REGISTER_LIMITS[target]:
            found.append(f"{self.registers} registers, at most {REGISTER_LIMITS[target]}")
        if self.shared_bytes > SHARED_LIMITS[target]:
            found.append(f"{self.shared_bytes} bytes of shared memory, at most {SHARED_LIMITS[target]}")
        return found


def compile_case(case: AotCase, target: str) -> ResourceUsage:
    """Compile one configuration for one of TARGETS. Errors of Triton's compiler pass through."""
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in case.aligned()}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), divisible)
    most_stages = MOST_STAGES_ON_AMD if TARGETS[target].backend == "hip" else case.num_stages
    options = {"num_warps": case.num_warps, "num_stages": min(case.num_stages, most_stages)}
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return _read_cuda(compiled) if TARGETS[target].backend == "cuda" else _read_amd(compiled)


def _read_cuda(compiled: Any) -> ResourceUsage:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [str(triton.knobs.nvidia.cuobjdump.path), "--dump-resource-usage", str(binary)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return parse_cuobjdump(text, compiled.metadata.shared)


def parse_cuobjdump(text: str, dynamic_shared: int) -> ResourceUsage:
    """Of the one kernel in the listing. Raises ValueError when a figure is missing."""
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    if figures.keys() != {"REG", "STACK", "SHARED", "LOCAL"}:
        raise ValueError(f"cuobjdump lists no resource usage: {text!r}")
    return ResourceUsage(figures["REG"], figures["STACK"] + figures["LOCAL"], max(figures["SHARED"], dynamic_shared))


def _read_amd(compiled: Any) -> ResourceUsage:
    return parse_amdgcn(compiled.asm["amdgcn"], compiled.metadata.shared)


def parse_amdgcn(text: str, dynamic_shared: int) -> ResourceUsage:
    """Of the one kernel in the assembly. Raises ValueError when a figure is missing."""
    names = ("vgpr_count", "vgpr_spill_count", "group_segment_fixed_size")
    figures = {}
    for name in names:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly has no .{name}")
        figures[name] = int(found.group(1))
    # Scalar registers spill to lanes of vector registers, which takes no memory and shows in the vectors' count.
    spilled = 4 * figures["vgpr_spill_count"]
    return ResourceUsage(figures["vgpr_count"], spilled, max(figures["group_segment_fixed_size"], dynamic_shared))
