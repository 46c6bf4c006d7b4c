#!/usr/bin/env bash
# Make .venv at the repository's root hold Penstock and what it stands on. Sourced by quickstart.sh and tests/run.sh:
#
#   penstock_environment ROOT [dev]     dev: with what the tests need; it serves those who do without, too
#
# The environment is reused only while the hash of everything that decides its content (Python's version, the pinned
# versions, the project's requirements and package map, its place) equals the one written when it was finished.

penstock_environment() {
    local root=$1 extra=${2:-} python=${PYTHON:-python3.11} stamp wanted
    command -v "$python" >/dev/null || python=python3
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "Penstock needs Python 3.11 or newer (set PYTHON to one)" >&2; return 1; }
    # An active environment may be the one that is about to be made anew: what it was made of stays.
    python=$("$python" -c 'import os, sys; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))')
    stamp=$root/.venv/penstock-environment
    wanted=$("$python" - "$root" <<'PY'
import hashlib, platform, sys, tomllib
from pathlib import Path
root = Path(sys.argv[1])
project = tomllib.loads((root / "pyproject.toml").read_text())
parts = [sys.version, platform.machine(), str(root), (root / "deploy/constraints.txt").read_text()]
parts += [repr(project[key]) for key in ("build-system", "project")] + [repr(project["tool"]["setuptools"])]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
    )
    if [ -f "$stamp" ] && grep -qx -e "$wanted $extra" -e "$wanted dev" "$stamp" && "$root/.venv/bin/python" -c 'import torch, ray' 2>/dev/null; then
        return 0
    fi
    echo "installing into $root/.venv (a few minutes the first time)" >&2
    rm -rf "$root/.venv"
    "$python" -m venv "$root/.venv"
    # torch first and by exact version: an open range would bring the CUDA build
    "$root/.venv/bin/pip" install -q --report "$root/.venv/torch.json" -c "$root/deploy/constraints.txt" \
        "$(grep '^torch==' "$root/deploy/constraints.txt")"
    "$root/.venv/bin/pip" install -q --report "$root/.venv/rest.json" -c "$root/deploy/constraints.txt" \
        -e "$root${extra:+[$extra]}"
    "$root/.venv/bin/python" "$root/deploy/check_hashes.py" "$root/.venv/torch.json" "$root/.venv/rest.json" || return 1
    # The CPU's kernels in C++: compiled here, so that the first start need not; without a compiler torch serves.
    "$root/.venv/bin/python" -m penstock.kernels.native.build >&2 || true
    "$root/.venv/bin/python" -m penstock.workers.native.library >&2 || true
    echo "$wanted $extra" > "$stamp"
}
