"""Opens the KV tiers that a worker's settings ask for, over the pool it computes with.

Called by `assembly.py`. The tiers' threads read and write the pool beside the transfer's: on a device through staging
buffers of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from penstock.workers.errors import ConfigError
from penstock.workers.kv.disk_tier import DiskTier
from penstock.workers.kv.host_tier import HostTier
from penstock.workers.kv.layout import KVLayout
from penstock.workers.kv.storage import KVStorage
from penstock.workers.kv.tier_feed import TierChanges, TieredCache
from penstock.workers.kv.tiers import KVTiers
from penstock.workers.kv_feed import CacheEvents
from penstock.workers.settings import WorkerSettings
from penstock.workers.transfer.port import BlockMover, BlockStorage


class OpenedTiers:
    """The tiers of one worker, and what it tells routers with them."""

    def __init__(self, tiers: KVTiers, changes: TierChanges) -> None:
        self.tiers = tiers
        self._changes = changes

    def over(self, cache: CacheEvents) -> CacheEvents:
        """The cache's events with those of the tiers below it."""
        return TieredCache(cache, self.tiers.holds, self._changes)


def open_tiers(
    settings: WorkerSettings, storage: BlockStorage, layout: KVLayout, wake: Callable[[], None]
) -> OpenedTiers | None:
    """None where the settings ask for none. Raises ConfigError where they do not fit this worker."""
    kv = settings.kv
    kv.check_tiers()
    if not kv.host_bytes:
        return None
    if settings.group.width > 1:
        raise ConfigError(
            f"a KV host tier is for workers of one rank, this one has {settings.group.width}: set kv.host_bytes to 0",
            key="kv.host_bytes",
        )
    changes = TierChanges()
    host = HostTier(kv.host_bytes, storage.block_bytes)
    disk = None
    if kv.disk_path:
        disk = DiskTier(Path(kv.disk_path), layout.compatibility, storage.block_bytes, kv.disk_bytes, changes.note)
    return OpenedTiers(KVTiers(_for_tiers(storage), host, disk, changes, wake), changes)


def _for_tiers(storage: BlockStorage) -> BlockMover:
    if isinstance(storage, KVStorage):
        return storage
    from penstock.workers.device_transfer import CardStorage  # late: torch, which workers without a device lack

    if not isinstance(storage, CardStorage):
        raise ConfigError(f"no KV tiers below a pool of {type(storage).__name__}", key="kv.host_bytes")
    return storage.beside()
