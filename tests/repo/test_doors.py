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
BANNED_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "print", "__import__"}
BANNED_ATTRIBUTES = {
    *{"torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "asyncio.wait"},
    *{"os.system", "os.popen", "tempfile.mktemp", "jinja2.Environment"},
}
BANNED_METHODS = {"recv_pyobj", "send_pyobj"}  # of any object
BANNED_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code"}  # said to be true, or anything not plainly false
SECRET_WORDS = {"mac", "proof", "secret", "signature", "password", "token_digest", "cluster_key", "api_key"}
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
            if isinstance(node.func, ast.Attribute) and node.func.attr in BANNED_METHODS:
                found.append(f"{relative(path)}:{node.lineno} calls {node.func.attr}")
            found += [
                f"{relative(path)}:{node.lineno} says {word.arg}"
                for word in node.keywords
                if word.arg in BANNED_ARGUMENTS
                and not (isinstance(word.value, ast.Constant) and word.value.value is False)
            ]
    assert found == []


def names_in(node: ast.AST) -> set[str]:
    found = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return found | {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}


def is_secret(name: str, *more: str) -> bool:
    return any(name.strip("_") == word or name.endswith(f"_{word}") for word in (*SECRET_WORDS, *more))


def test_secrets_are_compared_in_constant_time() -> None:
    """`==` on a mac tells by its time how much of a guess was right; an empty one may be asked for."""
    found = []
    for path in source_files("workers", "router", "cluster"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Compare) and any(isinstance(one, ast.Eq | ast.NotEq) for one in node.ops):
                sides = [node.left, *node.comparators]
                plain = any(isinstance(side, ast.Constant) for side in sides)
                if not plain and any(is_secret(name) for side in sides for name in names_in(side)):
                    found.append(f"{relative(path)}:{node.lineno} {ast.unparse(node)}")
    assert found == []


def test_secrets_are_not_drawn_from_a_generator_that_can_be_guessed() -> None:
    found = []
    for path in source_files("workers", "router", "cluster"):
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            drawn = any(ast.unparse(one).startswith(("random.", "np.random.")) for one in ast.walk(node.value))
            if drawn and any(is_secret(name, "nonce") for target in targets for name in names_in(target)):
                found.append(f"{relative(path)}:{node.lineno}")
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
