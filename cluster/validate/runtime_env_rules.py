"""Rules for runtime environments: of Serve applications, of replicas, of jobs.

Used by `serve_rules.py` and `job_rules.py`. Ray lets unknown keys pass in silence; a test compares the names here with
Ray's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from penstock.cluster.validate.environment_rules import is_secret
from penstock.cluster.validate.findings import Path, Problem, nearest, warning
from penstock.cluster.validate.loose import at, mapping

KEYS = frozenset(
    "conda config container env_vars excludes image_uri java_jars pip py_executable py_modules uv "
    "worker_process_setup_hook working_dir".split()
)
REMOTE = ("http", "https", "s3", "gs", "gcs", "hdfs", "azure", "abfss", "file", "pip")


def check_runtime_env(raw: object, path: Path, remote: bool = True) -> Iterator[Problem]:
    """Everything wrong with one. `remote`: it is for another machine, so that code must lie at a URI."""
    if raw is None:
        return
    if not isinstance(raw, dict):
        yield Problem(path, f"expected the keys of a runtime environment, not {raw!r}")
        return
    for name in raw:
        if name not in KEYS and not name.startswith("_"):
            yield Problem((*path, name), f"unknown key {name!r}, which Ray would ignore", nearest(name, KEYS))
    yield from _variables(raw, path)
    if raw.get("pip") and raw.get("conda"):
        yield Problem((*path, "pip"), "pip and conda exclude each other; list pip's packages within conda")
    for name in ("pip", "uv"):
        if isinstance(raw.get(name), (int, float, bool)):
            yield Problem((*path, name), f"{raw[name]!r} is no list of packages")
    places: list[tuple[Path, Any]] = [((*path, "working_dir"), raw.get("working_dir"))]
    modules = at(raw, "py_modules")
    if isinstance(modules, list):
        places += [((*path, "py_modules", i), one) for i, one in enumerate(modules)]
    for place, stated in places:
        if isinstance(stated, str) and remote and urlsplit(stated).scheme not in REMOTE:
            yield Problem(place, f"{stated!r} is no URI; what lies on another machine is not there")


def _variables(raw: dict[str, Any], path: Path) -> Iterator[Problem]:
    variables = raw.get("env_vars")
    if variables is not None and not isinstance(variables, dict):
        yield Problem((*path, "env_vars"), f"expected names and values, not {variables!r}")
    for name, value in mapping(raw, "env_vars").items():
        if not isinstance(value, str):
            yield Problem((*path, "env_vars", name), f"{value!r} is not text; quote it")
        elif is_secret(name, value):
            reason = f"{name} in plain text; set it in the pods from a secret"
            yield warning((*path, "env_vars", name), reason)
