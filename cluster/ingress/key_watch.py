"""Follows the file of API keys: what it says counts a moment after it was written, without a restart.

One per ingress process, run by `ingress_replica.py` beside its other work. All keys change at once or not at all: a
file that is gone, cut short or wrong leaves the keys as they were, and its fault is logged once for as long as the file
stays as it is. Editors and Kubernetes replace files, so the file is known by what `stat` says of its path.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from penstock.cluster.ingress.keys import Access
from penstock.cluster.key_file import read_key_file
from penstock.workers.errors import ConfigError

log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0


class KeyWatch:
    """Looks at one file and tells one `Access`."""

    def __init__(self, path: Path, access: Access) -> None:
        """The file's present content is taken to be what `access` has."""
        self._path = path
        self._access = access
        self._seen = self._look()

    async def follow(self, every_s: float = LOOK_EVERY_S) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(self.check)

    def check(self) -> bool:
        """Look once; True where the keys were exchanged."""
        found = self._look()
        if found == self._seen:
            return False
        self._seen = found
        try:
            entries = read_key_file(self._path)
        except ConfigError as error:
            log.warning("the keys stay as they are: %s", error)
            return False
        self._access.replace(entries)
        log.info("%s: %d keys are in force", self._path.name, len(entries))
        return True

    def _look(self) -> tuple[int, int, int] | None:
        try:
            about = self._path.stat()
        except OSError:
            return None
        return about.st_mtime_ns, about.st_size, about.st_ino
