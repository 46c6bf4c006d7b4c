"""Compiles the C++ kernels into a cache, once per source, compiler and instruction set: a few seconds.

Called by `kernels/native/library.py` at the first use, and as `python -m penstock.kernels.native.build [--all]` by
whoever prepares an environment, or an image that serves every machine of this architecture. Knows no tensors. The
library needs a C++17 compiler and nothing else; its threads are those of torch, which brings the OpenMP runtime.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

# Instruction sets, best first, by the flags of /proc/cpuinfo that they need.
LEVELS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512-bf16": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}),
        ("-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"),
    ),
    "avx512": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}),
        ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    ),
    "avx2": (frozenset({"avx2", "fma", "f16c", "bmi2"}), ("-march=x86-64-v3",)),
    "asimd": (frozenset({"asimd"}), ("-march=armv8-a",)),
}
_FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT = 300.0


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def machine_level() -> str:
    """The best instruction set of this machine. Raises BuildError where none of ours fits."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise BuildError(f"the processor's features cannot be read: {error}") from error
    features = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    for level, (needed, _) in LEVELS.items():
        if needed <= features:
            return level
    raise BuildError(f"no instruction set of {', '.join(LEVELS)} fits this {platform.machine()} processor")


def library_path(level: str) -> Path:
    """The compiled kernels for this instruction set, compiled now where the cache has none. Raises BuildError."""
    return compiled(Path(__file__).parent, f"kernels-{level}", (*_FLAGS, *LEVELS[level][1]))


def compiled(sources_in: Path, name: str, flags: tuple[str, ...]) -> Path:
    """The library of a folder's C++ sources, compiled now where the cache has none. Raises BuildError."""
    sources = sorted(path for path in sources_in.iterdir() if path.suffix in {".cpp", ".h"})
    digest = hashlib.sha256("\0".join(flags).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    folder = _cache_folder()
    target = folder / f"{name}-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(target, [str(source) for source in sources if source.suffix == ".cpp"], flags)
    return target


def _cache_folder() -> Path:
    """A folder that only this user writes: the library is run."""
    for folder in (Path.home() / ".cache" / "penstock", Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    raise BuildError("neither the home nor the temporary folder can hold the compiled kernels")


def _compile(target: Path, sources: list[str], flags: tuple[str, ...]) -> None:
    compiler = next((found for found in map(shutil.which, _COMPILERS) if found), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler ({', '.join(_COMPILERS)}) is installed")
    logger.info("compiling %s with %s (once, a few seconds)", target.stem, compiler)
    unfinished = target.with_suffix(f".{os.getpid()}")
    try:
        # Nothing of this machine's environment enters the command: fixed flags and files of this package.
        done = subprocess.run(
            [compiler, *flags, *sources, "-o", str(unfinished)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        if done.returncode:
            raise BuildError(f"{compiler} failed: {done.stderr.strip()[-2000:]}")
        unfinished.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{compiler} could not be run: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def architecture_levels() -> list[str]:
    """Every instruction set that this architecture may have."""
    arm = platform.machine() in {"aarch64", "arm64"}
    return [level for level in LEVELS if (level == "asimd") == arm]


def main() -> None:
    """Compile for this machine, or with --all for its whole architecture."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for level in architecture_levels() if sys.argv[1:] == ["--all"] else [machine_level()]:
            logger.info("%s", library_path(level))
    except BuildError as error:
        sys.exit(f"the CPU kernels were not compiled, torch's operators will serve: {error}")


if __name__ == "__main__":
    main()
