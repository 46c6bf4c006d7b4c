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
    code = (
        "import sys, penstock.router.request_path as r, penstock.cluster.cli, penstock.workers.engine, penstock.kernels.ops\n"
        "import transformers\n"
        f"print(r.__file__.startswith({str(target)!r}))"
    )
    # -I -S would hide site-packages too: putting the wheel first and blocking the editable finder is what matters
    script = f"import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; sys.path.insert(0, {str(target)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", script + code], capture_output=True, text=True, cwd=tmp_path, timeout=100, check=True
    )
    assert done.stdout.strip() == "True"
