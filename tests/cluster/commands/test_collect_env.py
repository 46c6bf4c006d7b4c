"""The report of the machine: all sections, no secret, no crash where something is missing, no heavy import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cluster.commands import collect_env
from penstock.cluster.config import shown_environment

pytestmark = pytest.mark.timeout(60)
PENSTOCK = str(Path(sys.executable).parent / "penstock")


def test_json_and_text() -> None:
    done = subprocess.run([PENSTOCK, "collect-env", "--json"], capture_output=True, text=True, timeout=50, check=True)
    report = json.loads(done.stdout)
    assert list(report) == ["versions", "system", "cpu", "memory", "limits", "gpus", "environment"]
    for name in ("python", "penstock", "torch", "ray", "transformers", "triton"):
        assert report["versions"][name]
    assert report["memory"]["total MiB"] > 0
    assert "/dev/shm free MiB" in report["memory"]
    assert set(report["limits"]) == set(collect_env.LIMITS)
    text = subprocess.run([PENSTOCK, "collect-env"], capture_output=True, text=True, timeout=50, check=True).stdout
    assert "versions:\n  python: 3." in text


def test_torch_and_ray_are_not_imported() -> None:
    code = "import sys; from penstock.cluster.commands.collect_env import collect; collect(); "
    code += "sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == 0


def test_nothing_has_to_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise OSError("not on this machine")

    for module, name in (("psutil", "virtual_memory"), ("os", "getloadavg"), ("resource", "getrlimit")):
        monkeypatch.setattr(f"penstock.cluster.commands.collect_env.{module}.{name}", fail)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    report = collect_env.collect()
    for section in ("cpu", "memory", "limits"):
        assert report[section] == {"cannot be read": "not on this machine"}
    assert report["versions"]["torch built for"] == "not installed"


@pytest.mark.parametrize(
    ("script", "shown"),
    [
        ("echo 'NVIDIA X, 80000 MiB, 600.1, 9.0, Disabled'", ["NVIDIA X, 80000 MiB, 600.1, 9.0, Disabled"]),
        ("echo no driver >&2; exit 9", ["nvidia-smi failed: no driver"]),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, shown: list[str]) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert collect_env.collect()["gpus"] == shown


def test_secrets_are_not_shown() -> None:
    variables = {
        "PENSTOCK_API_KEY": "one",
        "PENSTOCK_URL": "http://x",
        "RAY_AUTH_TOKEN": "two",
        "HF_TOKEN": "three",
        "HTTPS_PROXY": "http://me:four@proxy",
        "OMP_NUM_THREADS": "2",
        "HOME": "/home/me",
    }
    shown = shown_environment(variables)
    assert set(shown) == set(variables) - {"HOME"}
    assert not {"one", "two", "three", "http://me:four@proxy"} & set(shown.values())
    assert (shown["OMP_NUM_THREADS"], shown["PENSTOCK_URL"]) == ("2", "http://x")
