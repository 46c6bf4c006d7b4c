"""Which processes can share memory: those with the same host id.

Used by worker start-up (`Grant.host_id`, `Welcome.host_id`) and the transfer handshake. Equal ids are a promise
that is still checked by really attaching; different ids mean TCP.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path


def host_id() -> str:
    """Hash of this boot and of the namespaces that decide whether /proc/<pid>/fd of another process can be opened.

    Two containers on one machine see different /proc trees, hence the namespaces. Without /proc the id is unique, so
    that nobody tries.
    """
    try:
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        parts += [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "mnt")]
    except OSError:
        return uuid.uuid4().hex
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]
