"""One door per dependency: the table below says which files may import what, and which calls nobody makes."""

import ast

import pytest
from repo.source_tree import imported_modules, parse, relative, source_files

DOORS = {
    "ray": ("cluster/", "workers/actor.py"),
    "triton": ("kernels/gpu/",),
    "torch.distributed": ("workers/parallel/", "workers/transfer/"),
    "fastapi": ("cluster/ingress/",),
    "starlette": ("cluster/ingress/",),
    "grpc": ("workers/rpc.py", "cluster/grpc_front/"),
    "grpc_reflection": ("cluster/grpc_front/server.py",),
    "google.protobuf": ("cluster/grpc_front/",),
    "msgpack": (
        "workers/wire.py",
        "workers/transfer/messages.py",
        "workers/parallel/group_messages.py",
        "workers/weights/messages.py",
    ),
    "opentelemetry": ("workers/span_export.py",),
    "transformers": ("workers/model/", "cluster/text.py"),
}
BANNED_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_CALLS = {"eval", "exec", "print"}
BANNED_ATTRIBUTES = {"torch.load", "yaml.load", "yaml.unsafe_load", "asyncio.wait"}
ENVIRONMENT_READERS = ("cluster/config.py", "kernels/dispatch.py")


@pytest.mark.parametrize("module", DOORS)
def test_dependency_has_one_door(module: str) -> None:
    outside = [
        f"{relative(path)}:{line}"
        for path in source_files()
        for line, name in imported_modules(path)
        if (name == module or name.startswith(module + ".")) and not relative(path).startswith(DOORS[module])
    ]
    assert outside == []


def test_nobody_unpickles_or_evaluates() -> None:
    found = []
    for path in source_files():
        found += [
            f"{relative(path)}:{line} imports {name}"
            for line, name in imported_modules(path)
            if name.split(".")[0] in BANNED_MODULES
        ]
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in BANNED_CALLS:
                found.append(f"{relative(path)}:{node.lineno} calls {node.func.id}")
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in BANNED_ATTRIBUTES:
                found.append(f"{relative(path)}:{node.lineno} calls {ast.unparse(node.func)}")
    assert found == []


def test_environment_is_read_in_one_place() -> None:
    readers = [
        f"{relative(path)}:{node.lineno}"
        for path in source_files()
        if not relative(path).startswith(ENVIRONMENT_READERS)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in ("environ", "getenv")
    ]
    assert readers == []


def test_no_resource_check_by_assert() -> None:
    asserts = [
        f"{relative(path)}:{node.lineno}"
        for path in source_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []


def test_no_global_statement_and_single_inheritance() -> None:
    found = []
    for path in source_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Global):
                found.append(f"{relative(path)}:{node.lineno} global")
            # A protocol may ask for what several others ask for: nothing is inherited but demands.
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if len(bases) > 1 and not any(base.startswith("Protocol") for base in bases):
                found.append(f"{relative(path)}:{node.lineno} {node.name} has several bases")
    assert found == []
