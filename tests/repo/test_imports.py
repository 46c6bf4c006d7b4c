"""Arrows go one way: cluster -> router -> workers -> kernels; and what must import light does."""

import subprocess
import sys

import pytest
from repo.source_tree import ROOMS, imported_modules, relative, source_files

PURE_ROUTER_BANS = {"torch", "ray", "asyncio", "fastapi", "starlette", "time", "random", "threading", "grpc"}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "penstock" and len(parts) > 1 else None


def upward_imports(room: str) -> list[str]:
    rank = ROOMS.index(room)
    return [
        f"{relative(path)}:{line} imports {module}"
        for path in source_files(room)
        for line, module in imported_modules(path)
        if (target := room_of(module)) in ROOMS and ROOMS.index(str(target)) > rank
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_no_import_points_up(room: str) -> None:
    assert upward_imports(room) == []


def test_imports_name_only_the_four_rooms() -> None:
    strangers = [
        f"{relative(path)}:{line} imports {module}"
        for path in source_files()
        for line, module in imported_modules(path)
        if room_of(module) not in (None, *ROOMS)
    ]
    assert strangers == []


def test_router_decides_without_io() -> None:
    banned = [
        f"{relative(path)}:{line} imports {module}"
        for path in source_files("router")
        for line, module in imported_modules(path)
        if module.split(".")[0] in PURE_ROUTER_BANS
    ]
    assert banned == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("penstock.router.request_path", ["torch", "ray", "grpc", "fastapi"]),
        ("penstock.cluster.client", ["torch", "ray"]),
        ("penstock.workers.scheduler.scheduler", ["torch", "ray"]),
        ("penstock.workers.engine", ["torch", "ray"]),
        ("penstock.workers.process", ["torch", "ray"]),
        ("penstock.cluster.cli", ["torch"]),
    ],
)
def test_light_imports_stay_light(module: str, unwanted: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_transformers_imports_beside_penstock(tmp_path: object) -> None:
    code = "import penstock.workers.protocol, transformers, penstock.kernels.ops; print('ok')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=str(tmp_path), check=True)
    assert done.stdout.strip() == "ok"
