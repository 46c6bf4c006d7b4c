"""Where the bytes of offered blocks go: views for TCP, a checked copy out of the peer's segment for shared memory.

Used by `receiver.py`. Knows blocks and generations; what a digest says and a session's fate are the receiver's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import numpy as np

from penstock.workers.errors import WireError
from penstock.workers.kv.storage import KVStorage
from penstock.workers.transfer.endpoint import Endpoint
from penstock.workers.transfer.incoming import IncomingSession
from penstock.workers.transfer.messages import Hello, Offer

Entry = tuple[int, int, int, int, int, int]  # one row of OFFER_DTYPE
Verify = Callable[[Entry, int], bool]  # (entry, block): the block holds what the entry says
_SEGMENT_PATH = re.compile(r"/proc/[1-9][0-9]*/fd/[0-9]+")
_log = logging.getLogger(__name__)


class BlockLanding:
    """Where the blocks of one offer go; None where the bytes are not wanted."""

    __slots__ = ("_scratch", "_storage", "intact", "offer", "session", "targets")

    def __init__(self, endpoint: Endpoint, scratch: memoryview, offer: Offer, session: IncomingSession | None) -> None:
        self.offer = offer
        self.session = session
        self.targets: list[int | None] = [None] * len(offer.entries)
        self.intact: list[bool] = []  # per wanted entry, once its bytes are there: they are the offered ones
        self._storage = endpoint.storage
        self._scratch = scratch

    @property
    def open(self) -> bool:
        """The session lives: its blocks may be written."""
        return self.session is not None and self.session.open

    def wanted(self) -> list[tuple[Entry, int]]:
        """(entry, target block) of the entries whose bytes are wanted."""
        pairs = zip(self.offer.entries.tolist(), self.targets, strict=True)
        return [(entry, target) for entry, target in pairs if target is not None]

    def views(self) -> list[memoryview]:
        """One writable view of a block per entry."""
        data = self._storage.data
        return [self._scratch if target is None else memoryview(data[target]) for target in self.targets]


def attach_segment(endpoint: Endpoint, hello: Hello) -> KVStorage | None:
    """The peer's storage, read-only; None where it offers none or this process cannot see it.

    Raises WireError when what is there is not what the peer says.
    """
    if endpoint.settings.transport == "tcp" or hello.host_id != endpoint.host_id:
        return None
    if not _SEGMENT_PATH.fullmatch(hello.segment):
        return None
    try:
        segment = KVStorage.attach(hello.segment)
    except (OSError, WireError) as error:
        _log.warning("cannot attach the KV storage of %s: %s", hello.worker_id, error)
        return None
    if segment.data.shape != (hello.num_blocks, hello.block_bytes):
        segment.close()
        raise WireError("transfer: the peer's KV storage is not what it says")
    return segment


def copy_blocks(landing: BlockLanding, segment: KVStorage, storage: KVStorage, verify: Verify) -> bool:
    """Copy and verify the wanted blocks. False: the sender has meanwhile reused one, so the copies are worth nothing.

    The owner raises a block's generation before it writes new content, so equal numbers before and after the copy
    mean that the content was the offered one all the while (the loads and stores stay in order on x86; elsewhere the
    digest has the last word). Each block is verified right after its copy, while it is still in the cache.
    """
    wanted = [place for place, target in enumerate(landing.targets) if target is not None]
    sources = landing.offer.entries["source_block"][wanted]
    offered = landing.offer.entries["source_generation"][wanted]
    if not np.array_equal(segment.generations[sources], offered):
        return False
    for (entry, target), source in zip(landing.wanted(), sources.tolist(), strict=True):
        np.copyto(storage.data[target], segment.data[source])
        landing.intact.append(verify(entry, target))
    return bool(np.array_equal(segment.generations[sources], offered))
