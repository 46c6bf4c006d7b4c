"""A worker process of the wire version before this one: `older_worker.py`, in place of `penstock.workers.process`.

It reads and writes that version's messages and fields only, refuses every other version, and so knows no moves.
"""

from __future__ import annotations

import sys

from penstock.workers import assembly, service, wire
from penstock.workers.process import main
from penstock.workers.protocol import OLDEST_WIRE_VERSION


def forget_newer() -> None:
    """What was added since is unknown from here on."""
    wire._VERSIONS = {OLDEST_WIRE_VERSION: wire._VERSIONS[OLDEST_WIRE_VERSION]}
    service.WIRE_VERSION = OLDEST_WIRE_VERSION
    assembly.WIRE_VERSION = OLDEST_WIRE_VERSION


if __name__ == "__main__":
    forget_newer()
    sys.exit(main())
