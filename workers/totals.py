"""What a worker has counted since it started: a part of the heartbeat (`protocol.Load`), shown as metrics.

Filled by `observation.py`, read by `cluster/fleet_metrics.py`. Plain data; knows nothing of either.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

STEP_TOKENS_UP_TO = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRANSFER_S_UP_TO = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class TransferCause(StrEnum):
    """Why a KV transfer ended before it was whole; a closed set, in the order of `WorkerTotals.transfer_failures`."""

    LEASE_EXPIRED = "lease_expired"  # the other side gave no sign of life for the lease
    PEER_LOST = "peer_lost"  # its connection broke
    UNREACHABLE = "unreachable"
    INCOMPATIBLE = "incompatible"
    REFUSED = "refused"  # the receiver said no, or ended the session
    DAMAGED = "damaged"  # blocks lost or reused, also after asking again
    ABANDONED = "abandoned"  # given up on purpose: cancelled, or nothing left to hand over
    STOPPED = "stopped"  # this worker is going down
    MISMATCHED = "mismatched"  # blocks with a wrong digest, also after asking again


@dataclass(frozen=True, slots=True)
class GrammarTotals:
    """What became of the grammars that requests brought; only ever grows."""

    compiled: int = 0
    found: int = 0  # in the cache of compiled ones
    evicted: int = 0  # from it


@dataclass(frozen=True, slots=True)
class AdapterTotals:
    """What became of the adapters that requests asked for; only ever grows."""

    loaded: int = 0  # from files
    found: int = 0  # in host memory
    evicted: int = 0  # from there
    failed: int = 0  # files missing, exchanged, or not for this model
    placed: int = 0  # times an adapter was brought to the device


@dataclass(frozen=True, slots=True)
class TierFigures:
    """What one tier below the block pool did with KV blocks; all but `held` only ever grow."""

    held: int = 0  # blocks, now
    hits: int = 0  # blocks brought back into the pool
    misses: int = 0  # blocks asked for that it did not hold
    loaded: int = 0  # bytes brought back
    stored: int = 0  # bytes taken in
    evictions: int = 0  # blocks that gave way to others
    dropped: int = 0  # blocks not taken in: a queue was full, or they were evicted from the pool first
    errors: int = 0  # failed reads and writes, damaged blocks


@dataclass(frozen=True, slots=True)
class TierTotals:
    """Host memory and disk below the block pool."""

    host: TierFigures = field(default_factory=TierFigures)
    disk: TierFigures = field(default_factory=TierFigures)
    slow: int = 0  # loads given up because computing was quicker


@dataclass(frozen=True, slots=True)
class GroupTotals:
    """What became of the ranks of a worker that has several."""

    ranks_lost: int = 0  # without which it goes on
    experts_gone: int = 0  # of all layers, that no rank holds now
    expert_skew: float = 0.0  # rows of the fullest rank over the mean, in the worst layer; 0: no experts are shared


@dataclass(frozen=True, slots=True)
class WeightFigures:
    """Where a rank's weights came from, and what it has given to others."""

    from_peers: int = 0  # bytes
    from_disk: int = 0
    load_s: float = 0.0
    served: int = 0  # bytes


@dataclass(frozen=True, slots=True)
class WorkerTotals:
    """What a worker has done since it started; only ever grows, but for `reserved` and what is said of its ranks.

    Counts by size have one entry per bound of `STEP_TOKENS_UP_TO` or `TRANSFER_S_UP_TO` and one for what is larger.
    """

    reserved: int = 0  # sequences with blocks that wait for their KV now
    steps_by_tokens: tuple[int, ...] = ()
    step_tokens: int = 0  # computed in all steps
    step_s: float = 0.0  # spent in all steps
    generated_tokens: int = 0
    prompt_tokens: int = 0  # contexts whose computation began
    cached_tokens: int = 0  # of them, found in the prefix cache
    transfers_by_s: tuple[int, ...] = ()  # sessions sent whole, by duration
    transfer_s: float = 0.0
    transfer_bytes: int = 0  # sent, in sessions that ended whole
    transfers_received: int = 0
    transfer_failures: tuple[int, ...] = ()  # sessions of both directions, one entry per `TransferCause`
    router_leases_expired: int = 0
    grammars: GrammarTotals = field(default_factory=GrammarTotals)
    tiers: TierTotals = field(default_factory=TierTotals)
    blocks_lost: int = 0  # KV blocks that went with ranks
    ranks_lost: int = 0  # see `GroupTotals`, as the next two
    experts_gone: int = 0
    expert_skew: float = 0.0
    weights_from_peers: int = 0  # bytes; these four are rank 0's, see `WeightFigures`
    weights_from_disk: int = 0
    weights_load_s: float = 0.0
    weights_served: int = 0
    spans_dropped: int = 0  # that the trace collector did not take, or that found the queue full
    adapters: AdapterTotals = field(default_factory=AdapterTotals)
