"""What the router is told, as frozen values composed into one tree; `cluster/config.py` builds it.

Every room file takes the smallest piece that serves. Units are in the names. Knows no files, flags or environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """How candidates are scored; costs are in prefill tokens, so the numbers below compare with prompt lengths."""

    policy: str = "prefix_load"  # a key of placement.POLICIES
    local_prefill_tokens: int | None = (
        None  # most uncached tokens prefilled where they decode; None = one step's budget
    )
    local_penalty: float = 2.0  # a token prefilled on a decode worker also holds up its decodes
    handover_tokens: int = 32  # what a transfer costs beyond the prefill itself
    queue_weight: float = 0.1  # a token waited for, against a token computed twice: waiting passes, work adds up
    balance: float = 0.02  # weight of recently placed work, which keeps long-run load even
    balance_window_s: float = 60.0  # half-life of "recently"
    sample: int = 0  # consider the best prefix owner and this many random others; 0 = everybody


@dataclass(frozen=True, slots=True)
class AdmissionSettings:
    """How many requests may be inside, who waits, and how long."""

    ttft_target_s: float = 10.0  # what would wait longer for its first token is refused at once; callers may ask less
    tpot_target_s: float = 0.0  # batches are kept so small that a decode step takes no longer; 0 = as they come
    max_waiting: int = 4096
    max_waiting_per_tenant: int = 1024
    admit_ratio: float = 1.25  # requests let in per place in the fleet: a short queue at the workers keeps them busy
    prefill_backlog_s: float = 4.0  # prefill work let in ahead, at most a quarter of the target for the first token
    input_weight: float = 1.0  # service charged per computed prompt token
    output_weight: float = 2.0  # and per generated token
    tenant_weights: Mapping[str, float] = field(default_factory=dict)  # share of the service; 1 where not named


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """When a worker counts as gone, stuck, or not to be trusted for a while."""

    heartbeat_timeout_s: float = 2.0
    step_factor: float = 3.0  # a step may take this many times its prediction
    step_floor_s: float = 5.0  # but never counts as stuck before this
    first_step_s: float = 60.0  # the same, while no step has been predicted yet
    breaker_failures: int = 3  # failures in a row that open the breaker
    breaker_open_s: float = 1.0  # first pause; doubles up to breaker_max_s
    breaker_max_s: float = 30.0
    quarantine_mismatches: int = 3  # transfers with damaged blocks until their sender gets no prompts
    quarantine_window_s: float = 60.0  # within so long; for breaker_max_s


@dataclass(frozen=True, slots=True)
class RetrySettings:
    """When an attempt is given up, and what follows."""

    request_timeout_s: float = 600.0  # from arrival to the last token
    no_worker_timeout_s: float = 15.0  # longest wait for a phase that no living worker serves
    grant_patience_s: float = 1.0  # wait at one worker before looking for another that has room
    handover_grace_s: float = 2.0  # wait for decode to show life after its prefill worker was lost
    sibling_wait_s: float = 0.25  # wait for a prefix that is just being handed over
    first_backoff_s: float = 0.01
    max_backoff_s: float = 1.0
    budget_share: float = 0.1  # retries after failures and refusals per first attempt; more of them wait
    budget_per_s: float = 2.0  # and so many per second at least
    budget_burst: float = 32.0  # saved up at most
    max_attempts: int = 32  # that failed; refusals and moves do not count
    max_internal_failures: int = 2  # a defect that strikes so often belongs to the request
    poison_deaths: int = 2  # worker deaths in a row, without progress between, that make a request a suspect
    poison_clear_tokens: int = 4  # so much progress clears it
    alone_wait_s: float = 2.0  # wait for a worker to run empty for a suspect


@dataclass(frozen=True, slots=True)
class MoveSettings:
    """When running sequences go on at another worker with their KV, and how many at a time.

    Rebalancing is on by default: it begins where a worker preempts, or queues without KV, for a while, so what a move
    costs, one copy of the KV, stands against computing all of it again.
    """

    at_once: int = 8  # leaving a worker that drains
    patience_s: float = 10.0  # a move that is not done by then is given up; the sequence goes on where it is
    rebalance: bool = True  # also from workers whose KV is short to workers with room
    short_share: float = 0.05  # of blocks free, below which a worker with a queue is short; above twice that it is not
    short_s: float = 1.0  # so long, or preempting so long, before anything moves
    room_share: float = 0.3  # of the destination's blocks that stay free
    rebalance_at_once: int = 2
    rest_s: float = 10.0  # a sequence that was moved stays so long


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """The table of prefix blocks."""

    max_entries: int = 1 << 22  # per 64 workers; 16 to 32 bytes each at the usual fill
    assume_s: float = 10.0  # how long placements count as cached before the worker's own events must say so


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """The router of one ingress process."""

    placement: PlacementSettings = field(default_factory=PlacementSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    retry: RetrySettings = field(default_factory=RetrySettings)
    moves: MoveSettings = field(default_factory=MoveSettings)
    index: IndexSettings = field(default_factory=IndexSettings)
