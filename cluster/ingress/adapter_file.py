"""`adapters.json` in the directory of adapters: which name stands for which folder, `{"name": "folder", ...}`.

Used by `adapters.py`. Every ingress of every cluster on the directory reads it, operators' calls and editors write it:
a reader sees a whole file or the one before, and two writers never lose each other's entry. Knows nothing of what is in
the folders.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from penstock.workers.adapter_ref import ADAPTER_NAME
from penstock.workers.errors import ConfigError

FILE_NAME, LOCK_NAME = "adapters.json", ".adapters.lock"
MAX_ADAPTERS = 10_000
MAX_FILE_BYTES = 1 << 20
LOCK_PATIENCE_S = 5.0  # others hold the lock for milliseconds
_LOCK_PAUSE_S = 0.01
Entries = dict[str, str]
Identity = tuple[int, int, int, int]


def identity_of(path: Path) -> Identity | None:
    """What tells one content of a file from another without reading it; None where there is no file."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return None
    return about.st_mtime_ns, about.st_ctime_ns, about.st_size, about.st_ino


def read_entries(directory: Path) -> Entries:
    """The file's content, {} where there is no file. Raises ConfigError for one that says nothing sensible."""
    try:
        # A pipe in its place must not hold this thread.
        descriptor = os.open(directory / FILE_NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{FILE_NAME}: is no file")
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigError(f"{FILE_NAME}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{FILE_NAME}: is larger than {MAX_FILE_BYTES} bytes")
    return _entries(text)


def change_entries(directory: Path, change: Callable[[Entries], None]) -> Entries:
    """Read the file, let `change` edit what it says, write it; what it says now. Where `change` raises, it stays.

    Raises OSError where the directory cannot be written, and ConfigError for a file that must be mended first, or that
    would become too large.
    """
    with _locked(directory):
        entries = read_entries(directory)
        change(entries)
        text = json.dumps(entries, indent=2).encode() + b"\n"
        if len(entries) > MAX_ADAPTERS or len(text) > MAX_FILE_BYTES:
            raise ConfigError(f"{FILE_NAME}: is full: it may name {MAX_ADAPTERS} adapters in {MAX_FILE_BYTES} bytes")
        _write(directory, text)
    return entries


def _entries(text: bytes) -> Entries:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{FILE_NAME}: not JSON: {error!s:.200}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{FILE_NAME}: must be an object of names and folders")
    if len(raw) > MAX_ADAPTERS:
        raise ConfigError(f"{FILE_NAME}: names more than {MAX_ADAPTERS} adapters")
    for name, folder in raw.items():
        if not ADAPTER_NAME.match(name):
            raise ConfigError(f"{FILE_NAME}: {name!r:.140} is no name of an adapter")
        if not isinstance(folder, str):
            raise ConfigError(f"{FILE_NAME}: {name}: its folder is not a text")
    return raw


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """The lock is the file's, not its content's: it stays behind, and ends with the process that holds it."""
    descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _write(directory: Path, text: bytes) -> None:
    fresh = directory / f".{FILE_NAME}.{secrets.token_hex(8)}"
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.replace(fresh, directory / FILE_NAME)
    except OSError:
        with suppress(OSError):
            fresh.unlink()
        raise
