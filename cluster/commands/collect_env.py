"""`penstock collect-env`: what a report of a problem should say about the machine. Text, or JSON for a script.

Everything is read without importing torch or Ray, and everything may be missing: then its place says so.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from penstock.cluster.config import shown_environment

HELP = "Print versions, hardware, limits and settings, for a report of a problem."
PACKAGES = (
    "penstock torch ray transformers tokenizers safetensors triton numpy pydantic fastapi uvicorn grpcio protobuf "
    "msgpack prometheus-client opentelemetry-api typer httpx openai kubernetes-validate"
).split()
CPU_FLAGS = frozenset(
    "avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16 avx512_fp16 avx_vnni amx_bf16 amx_int8 "
    "amx_tile asimd asimdhp asimddp bf16 i8mm sve sve2".split()
)
LIMITS = {"open files": "RLIMIT_NOFILE", "processes": "RLIMIT_NPROC", "locked memory": "RLIMIT_MEMLOCK"}
GPU_QUERY = "name,memory.total,driver_version,compute_cap,mig.mode.current"
COMMAND_TIMEOUT_S = 10.0
MIB = 1 << 20
UNREADABLE = (OSError, ValueError, KeyError, IndexError, SyntaxError, psutil.Error, subprocess.SubprocessError)


def collect_env(
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the report."""
    report = collect()
    if json_output:
        typer.echo(json.dumps(report, indent=2))
        return
    for section, content in report.items():
        typer.echo(f"{section}:{'' if content else ' none seen'}")
        for name, value in content.items() if isinstance(content, dict) else enumerate(content):
            typer.echo(f"  {name}: {value}")


def collect() -> dict[str, Any]:
    """The report, by section."""
    sections: dict[str, Callable[[], Any]] = {
        "versions": _versions,
        "system": _system,
        "cpu": _cpu,
        "memory": _memory,
        "limits": _limits,
        "gpus": _gpus,
        "environment": shown_environment,
    }
    return {name: _attempt(read) for name, read in sections.items()}


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except UNREADABLE as error:
        return {"cannot be read": str(error) or type(error).__name__}


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch built for"] = str(_attempt(_torch_build))
    return found


def _torch_build() -> str:
    """CUDA or ROCm version that torch was built for, from its version file; importing it takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "not installed"
    tree = ast.parse((Path(found.origin).parent / "version.py").read_text(encoding="utf-8"))
    values: dict[str, object] = {}
    for node in tree.body:
        target: ast.expr | None = node.target if isinstance(node, ast.AnnAssign) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else target
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value
    built = [f"{name.upper()} {values[name]}" for name in ("cuda", "hip", "xpu") if values.get(name)]
    return ", ".join(built) or "CPU only"


def _system() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "python": sys.executable,
        "container": _container(),
    }


def _container() -> str:
    if Path("/var/run/secrets/kubernetes.io").exists():
        return "Kubernetes pod"
    return "yes" if Path("/.dockerenv").exists() or Path("/run/.containerenv").exists() else "not seen"


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set()
    for line in _text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = set(value.split())
    return {
        "model": model,
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "quota": _text("/sys/fs/cgroup/cpu.max").strip() or "none seen",
        "load": " ".join(f"{one:.2f}" for one in os.getloadavg()),
        "instructions": " ".join(sorted(flags & CPU_FLAGS)) or "none of those looked for",
    }


def _memory() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    limit = _text("/sys/fs/cgroup/memory.max").strip()
    found: dict[str, Any] = {
        "total MiB": memory.total // MIB,
        "available MiB": memory.available // MIB,
        "cgroup limit MiB": int(limit) // MIB if limit.isdigit() else "none",
    }
    for place in ("/dev/shm", "/tmp"):
        found[f"{place} free MiB"] = shutil.disk_usage(place).free // MIB if Path(place).is_dir() else "not there"
    return found


def _limits() -> dict[str, str]:
    found = {}
    for name, constant in LIMITS.items():
        soft, hard = resource.getrlimit(getattr(resource, constant))
        shown = ["unlimited" if one == resource.RLIM_INFINITY else str(one) for one in (soft, hard)]
        found[name] = f"{shown[0]} (at most {shown[1]})"
    return found


def _gpus() -> list[str]:
    """One line per NVIDIA GPU, by its own tool; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if answer.returncode:
        return [f"nvidia-smi failed: {(answer.stderr or answer.stdout).strip()[:200]}"]
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def _text(path: str) -> str:
    """A file of the kernel's, '' where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
