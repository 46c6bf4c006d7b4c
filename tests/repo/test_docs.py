"""What the README says is there: its paths exist, its commands parse, its Python runs on the real handle."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from repo.source_tree import ROOT

from penstock.cluster.client import Handle
from penstock.cluster.client_calls import Options

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(body for kind, body in BLOCKS if kind == "bash").replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if line.strip()]


def test_the_two_commands_stand_there() -> None:
    said = [" ".join(words) for words in commands()]
    assert "bash deploy/quickstart.sh" in said
    assert "bash tests/run.sh" in said
    assert (ROOT / ".ci" / "run").read_text().strip().endswith("exec bash tests/run.sh")


def test_every_path_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:deploy|tests|cluster|router|workers|kernels)/[\w./-]*)`", README))
    named |= {word for words in commands() for word in words if re.match(r"(deploy|tests)/", word)}
    assert len(named) > 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("verb", ["serve", "status", "bench"])
def test_every_flag_that_is_named_is_known(verb: str) -> None:
    flags = {w for words in commands() if words[:2] == ["penstock", verb] for w in words if w.startswith("--")}
    command = [str(Path(sys.executable).parent / "penstock"), verb, "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert [flag for flag in sorted(flags) if flag not in shown] == []


def test_python_examples_call_what_exists() -> None:
    sources = [body for kind, body in BLOCKS if kind == "python"]
    assert sources
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("penstock."):
                method = getattr(Handle, ast.unparse(node.func).removeprefix("penstock."))
                accepted = {*inspect.signature(method).parameters, *Options.__annotations__}
                assert {word.arg for word in node.keywords} <= accepted, ast.unparse(node)


def test_every_committed_result_says_where_it_was_taken() -> None:
    results = sorted((ROOT / "tests" / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        assert {"device", "versions", "commit"} <= set(json.loads(path.read_text())), path.name
        assert path.name in README, f"{path.name} stands in no table of the README"
