"""Nothing that protects goes with `python -O`: a part of the suite passes there, too."""

import subprocess
import sys

from repo.source_tree import ROOT

PART = [
    "tests/workers/test_call_seal.py",
    "tests/workers/test_wire.py",
    "tests/workers/transfer/test_messages.py",
    "tests/workers/transfer/test_frames.py",
    "tests/workers/weights/test_messages.py",
    "tests/workers/kv/test_block_pool.py",
    "tests/workers/scheduler/test_integrity.py",
    "tests/cluster/test_key_file.py",
    "tests/cluster/ingress/test_keys.py",
    "tests/cluster/ingress/test_json_body.py",
]


def test_checks_hold_without_assertions() -> None:
    # pytest warns that assertions outside of test modules go; those of the tests themselves it rewrites and keeps.
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    command = [sys.executable, "-O", "-m", "pytest", *options, "-m", "not slow", *PART]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
