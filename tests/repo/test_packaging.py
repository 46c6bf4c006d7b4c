"""The package list equals the tree, and a wheel works away from the checkout."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from repo.source_tree import ROOMS, ROOT


def declared_packages() -> set[str]:
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def test_package_list_equals_the_tree() -> None:
    folders = {path.parent.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert declared_packages() == {"penstock." + folder.replace("/", ".") for folder in folders}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True, timeout=60)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, timeout=120)
    return next(out.glob("penstock-*.whl"))


def test_wheel_is_whole(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "penstock/cluster/embedded_model/config.json" in names
    assert "penstock/cluster/embedded_model/model.safetensors" in names
    assert not [name for name in names if name.startswith(("tests/", "deploy/"))]


def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    # the wheel stands first on the path, and the checkout's editable finder is taken out of the way
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path.insert(0, {str(target)!r})
import penstock.cluster.cli, penstock.kernels.ops, penstock.workers.engine, transformers
import penstock.router.request_path as request_path
print(request_path.__file__.startswith({str(target)!r}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=100, check=True)
    assert done.stdout.strip() == "True"
