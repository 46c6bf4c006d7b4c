"""Compares what pip has fetched with the hashes in `deploy/hashes.lock`; ends with 1 at the first file that differs.

    python deploy/check_hashes.py REPORT ...            reports of `pip install --report`
    python deploy/check_hashes.py --write REPORT ...    make the lock of them

Run by `environment.sh` behind each installation, before anything of it is imported (all are wheels, so installing runs
none of their code). The lock names one file per requirement: those of CPython 3.11 on x86-64 Linux, with torch's CPU
build. Another file of the same version (another platform's) is named and let pass; the same name with other bytes is
not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOCK = Path(__file__).with_name("hashes.lock")
HEAD = "# SHA-256 of every requirement in constraints.txt, for CPython 3.11 on x86-64 Linux; see check_hashes.py.\n"


def read_lock() -> dict[str, str]:
    """SHA-256 by file name."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def fetched(report: Path) -> Iterator[tuple[str, str]]:
    """(file name, SHA-256) of every archive that pip took; what it took from a folder of ours has none."""
    for one in json.loads(report.read_text(encoding="utf-8"))["install"]:
        archive = one["download_info"].get("archive_info")
        if archive is not None:
            yield unquote(urlsplit(one["download_info"]["url"]).path).rpartition("/")[2], archive["hashes"]["sha256"]


def main(arguments: list[str]) -> int:
    """See the module."""
    writing = arguments[:1] == ["--write"]
    found = [pair for report in arguments[writing:] for pair in fetched(Path(report))]
    if writing:
        LOCK.write_text(HEAD + "".join(f"{name} {digest}\n" for name, digest in sorted(set(found))), encoding="utf-8")
        return 0
    lock = read_lock()
    for name, digest in found:
        if lock.get(name, digest) != digest:
            print(f"{name} is not the file that deploy/hashes.lock names: its SHA-256 is {digest}", file=sys.stderr)
            return 1
    unknown = sorted(name for name, _ in found if name not in lock)
    if unknown:
        print(f"not in deploy/hashes.lock, so not compared: {', '.join(unknown)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
