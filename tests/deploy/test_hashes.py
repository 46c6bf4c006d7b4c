"""The lock names every requirement once, is what is installed, and a file with other bytes stops an installation."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from repo.source_tree import ROOT

from deploy.check_hashes import read_lock

SCRIPT = ROOT / "deploy" / "check_hashes.py"


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked_versions() -> dict[str, str]:
    """Version by name, without a local build's mark, as the file names say."""
    parts = [name.split("-") for name in read_lock()]
    return {plain(part[0]): part[1].partition("+")[0] for part in parts}


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {plain(name): version for name, version in pins}


def test_every_pinned_requirement_is_locked_once() -> None:
    assert locked_versions() == pinned_versions()
    assert len(read_lock()) == len(pinned_versions())
    assert all(name.endswith(".whl") for name in read_lock())  # installing runs nobody's code
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in read_lock().values())


def test_what_is_installed_is_what_is_locked() -> None:
    locked = locked_versions()
    installed = {plain(one.metadata["Name"]): one.version.partition("+")[0] for one in metadata.distributions()}
    differing = {
        name: (installed[name], locked[name]) for name in installed.keys() & locked if installed[name] != locked[name]
    }
    assert differing == {}
    assert len(installed.keys() & locked) > 100


def test_other_bytes_under_a_known_name_are_refused(tmp_path: Path) -> None:
    name, digest = next(iter(read_lock().items()))

    def run(name: str, digest: str) -> subprocess.CompletedProcess[str]:
        url = f"https://index.invalid/files/{name.replace('+', '%2B')}"
        archive = {"url": url, "archive_info": {"hashes": {"sha256": digest}}}
        ours = {"url": "file:///somewhere", "dir_info": {"editable": True}}
        report = tmp_path / "report.json"
        report.write_text(json.dumps({"install": [{"download_info": ours}, {"download_info": archive}]}))
        command = [sys.executable, str(SCRIPT), str(report)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    assert run(name, digest).returncode == 0
    assert run(name, "0" * 64).returncode == 1
    other = run("unheard-of-1.0-py3-none-any.whl", "0" * 64)
    assert (other.returncode, "not compared: unheard-of" in other.stderr) == (0, True)


def test_the_environment_script_asks_for_it() -> None:
    script = (ROOT / "deploy" / "environment.sh").read_text()
    assert script.count("--report") == script.count('pip" install') == 2
    assert "check_hashes.py" in script
    assert shutil.which("bash") is None or subprocess.run(["bash", "-n", ROOT / "deploy/environment.sh"], check=True)
