"""The Dockerfile, read as text: pinned bases, no root, every path it copies is there and passes .dockerignore."""

from __future__ import annotations

import json
import re
import tomllib
from fnmatch import fnmatch

import pytest
from repo.source_tree import ROOMS, ROOT

from penstock.cluster.commands.flags import SERVE_FLAGS
from penstock.cluster.validate.image_rules import check_image, parse_image

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Instruction and argument, comments gone and continued lines joined."""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def arguments(name: str) -> list[str]:
    return [argument for instruction, argument in instructions() if instruction == name]


def last_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]


def test_every_instruction_is_one() -> None:
    known = "FROM RUN COPY ENV WORKDIR USER EXPOSE HEALTHCHECK ENTRYPOINT CMD".split()
    assert {name for name, _ in instructions()} <= set(known)


def test_the_bases_are_pinned_and_the_same() -> None:
    images = [argument.split()[0] for argument in arguments("FROM")]
    assert len(images) == 2
    for image in images:
        assert not list(check_image(image, ()))
        assert re.match(r"\d+\.\d+\.\d+", parse_image(image).tag), f"{image}: name a patch release"
    assert images[0] == images[1], "a virtual environment works with the Python it was made by"
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert parse_image(images[0]).tag.startswith(oldest)


def test_it_runs_as_nobody_in_particular() -> None:
    names = [name for name, _ in last_stage()]
    (user,) = [argument for name, argument in last_stage() if name == "USER"]
    assert user == "1000:1000", "the manifests run it as 1000"
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    for manifest in (ROOT / "deploy" / "kuberay").glob("rayservice-*.yaml"):
        assert "runAsUser: 1000" in manifest.read_text()


def test_everything_it_copies_is_there_and_sent_along() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line]
    sources = [word for argument in arguments("COPY") if "--from" not in argument for word in argument.split()[:-1]]
    assert {*ROOMS, "pyproject.toml", "deploy/constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        sent = False
        for rule in rules:  # the last that fits decides
            if fnmatch(source, rule.lstrip("!").replace("**", "*")) or source.startswith(rule.lstrip("!") + "/"):
                sent = rule.startswith("!")
        assert sent, f"{source} is kept back by .dockerignore"


def test_the_wheel_is_what_is_installed() -> None:
    runs = " && ".join(arguments("RUN"))
    assert "pip wheel" in runs
    assert "--no-deps" in runs
    assert runs.count("-c deploy/constraints.txt") == 2
    assert "/opt/penstock" in " ".join(argument for argument in arguments("COPY") if "--from=build" in argument)
    built = {name for name in ("README.md", "LICENSE") if name in " ".join(arguments("COPY"))}
    assert built == {"README.md", "LICENSE"}, "the build needs what pyproject.toml names"


def test_the_command_is_one_of_ours() -> None:
    (command,) = [json.loads(argument) for name, argument in last_stage() if name == "CMD"]
    assert command[:2] == ["penstock", "serve"]
    assert {word for word in command if word.startswith("--")} <= {flag.spelling for flag in SERVE_FLAGS}
    port = command[command.index("--port") + 1]
    assert arguments("EXPOSE") == [port]
    assert f":{port}/health" in arguments("HEALTHCHECK")[0]


@pytest.mark.parametrize("word", [":latest", "sudo", "chmod 777", "curl |", "API_KEY=", "TOKEN="])
def test_what_is_not_in_it(word: str) -> None:
    assert word not in DOCKERFILE


def test_its_tag_names_the_versions_that_are_in_it() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    pins = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    (ray,) = [line.removeprefix("ray==") for line in pins if line.startswith("ray==")]
    assert DOCKERFILE.count(f"penstock:{version}-ray{ray}") == 2
