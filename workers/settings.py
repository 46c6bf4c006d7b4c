"""Everything a worker process is told at start, as one tree of frozen values; `cluster/config.py` builds it.

Workers read no files, flags or environment for their configuration: the tree arrives as JSON (`to_json`) and is
passed down in the smallest piece that serves. Units are in the names.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role

PLAN_AHEAD = ("auto", "always", "never")
LOST_EXPERTS = ("refuse", "degrade")
WEIGHT_SOURCES = ("auto", "disk", "peer")
MOST_ADAPTERS = 256  # at a time
MOST_ADAPTER_RANKS = 256  # what the kernels take
DEVICE_NAME = re.compile(r"cpu|auto|cuda(:[0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """Limits of one step and of the queue before it."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 512
    long_prefill_token_threshold: int = 0  # most tokens of one prompt per step; 0 = only the budget limits
    max_model_len: int = 4096
    max_waiting: int = 1024  # bound of the waiting queue
    reserve_tokens: int = 256  # growth reserved beyond the context at admission
    max_preemptions: int = 3  # after so many a sequence gets its whole remainder reserved
    watermark: float = 0.01  # share of blocks kept for sequences already running
    plan_ahead: str = "auto"  # auto | always | never: plan a step while one runs; auto = on a GPU, with one rank


@dataclass(frozen=True, slots=True)
class KVSettings:
    """The block pool."""

    block_size: int = 16
    num_blocks: int = 0  # 0 = as many as fit in memory_bytes
    memory_bytes: int = 1 << 30  # on the CPU; a GPU's pool follows from gpu_memory_utilization
    gpu_memory_utilization: float = 0.9  # share of a GPU's whole memory that one worker may take
    prefix_caching: bool = True
    host_bytes: int = 0  # host memory for blocks that the pool had to let go; 0 = none
    disk_path: str = ""  # directory for what host memory has to let go, kept over restarts; empty = none
    disk_bytes: int = 0  # most that a worker keeps there

    def check_tiers(self) -> None:
        """Raises ConfigError, naming the key, where the tiers below the pool cannot be as told."""
        if self.host_bytes and not self.prefix_caching:
            raise ConfigError("the tiers hold what the prefix cache lets go: it must be on", "kv.prefix_caching")
        if self.disk_path and not self.host_bytes:
            raise ConfigError("the disk tier takes what host memory lets go: give some of that too", "kv.host_bytes")
        if self.disk_path and not os.path.isabs(self.disk_path):
            raise ConfigError(f"{self.disk_path!r} must be absolute: each worker has its own place", "kv.disk_path")
        if bool(self.disk_path) != bool(self.disk_bytes):
            raise ConfigError("kv.disk_path and kv.disk_bytes go together", "kv.disk_bytes")


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """KV transfer between workers."""

    # auto | shared_memory | tcp | nccl (between GPUs, both ends alike); auto = shared memory within a host, else tcp
    transport: str = "auto"
    host: str = "127.0.0.1"
    lease_s: float = 10.0
    digest: str = "auto"  # auto | full | sampled | off: of each block's bytes; auto = full over TCP, else sampled
    digest_sample: float = 0.03125  # share of each block that a sampled digest covers
    max_frame_bytes: int = 64 << 20
    socket_buffer_bytes: int = 0  # of each connection; 0 = small to a peer on this host, else the system's choice


@dataclass(frozen=True, slots=True)
class WeightSettings:
    """Where a starting worker's weights come from, and what it gives to others that start."""

    source: str = "auto"  # auto | disk | peer; auto = a running peer where that was measured to beat our own disk
    config_from_peer: bool = False  # a worker without config.json may take it from a peer as well
    copy_dir: str = ""  # keep what peers gave in unnamed files in this directory, and serve it on; empty = keep nothing
    serve: bool = True  # give weights to others that start
    max_takers: int = 2  # loads served at a time; others are sent on to those who have a copy
    serve_bytes_per_s: int = 1 << 30  # of all takers together; a quarter of it while KV blocks move
    stall_s: float = 5.0  # a peer that gives nothing for so long is left
    patience_s: float = 120.0  # without a disk of our own: wait so long for a peer that gives something


@dataclass(frozen=True, slots=True)
class RunnerSettings:
    """What computes: a model directory, or the oracle whose next token is a keyed hash of its KV blocks."""

    kind: str = "model"  # model | oracle
    model_dir: str = ""
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    model_impl: str = "auto"  # auto | penstock | transformers: our own decoder, or transformers' module
    device: str = "cpu"  # cpu | cuda | cuda:N | auto: the first GPU seen, else the CPU
    graphs: bool = True  # on a GPU: capture steps that only decode, by batch size, while serving
    graph_sizes: tuple[int, ...] = ()  # rows of such steps; empty = 1, 2, 4, 8, then multiples of 8 up to 256
    record_dir: str = ""  # where a worker on a GPU keeps what its next start can use; empty = nowhere
    threads: int = 1
    cpus: tuple[int, ...] = ()  # cores of this host that the process keeps to; empty = all it was given
    oracle_vocab: int = 32000
    oracle_step_s: float = 0.0  # least duration of an oracle step, to pace tests
    oracle_token_s: float = 0.0  # added per token computed in an oracle step
    oracle_block_bytes: int = 0  # oracle KV bytes per block; 0 = just what it needs
    oracle_kv_heads: int = 0  # of the oracle's KV, shared out among the ranks of a group; 0 = one per rank


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """The ranks that serve as one worker. All ranks of a group get the same worker settings but for `rank`.

    Times watch over the group: a rank that says nothing for `silence_s`, or that has not done a step within
    `slow_factor` × the time it should take (with a floor, and an allowance for the first steps), is ended, and the
    whole group with it where the others cannot go on (see `may_outlive_ranks`).
    """

    tensor_parallel_size: int = 1
    expert_parallel_size: int = 1  # expert ranks have data-parallel attention
    context_parallel_size: int = 1  # ranks that attend for sequences of their own, and for long prompts together
    context_parallel_threshold: int = 1024  # tokens of one prompt in one step from which on they do
    redundant_experts: int = 0  # slots of each rank and layer beyond those that hold every expert once
    expert_rebalance_steps: int = 256  # experts may move so often, in steps; 0 = only after a rank was lost
    lost_experts: str = "refuse"  # refuse | degrade: steps whose tokens chose an expert that went with its rank
    rank: int = 0  # rank 0 plans and serves; the others follow
    host: str = "127.0.0.1"  # where this rank listens and connects from; the collectives bind to it
    leader: str = ""  # host:port on which rank 0 gathers the group; for ranks above 0
    start_timeout_s: float = 300.0  # from the first rank's start until all have loaded
    heartbeat_s: float = 0.5
    silence_s: float = 2.0
    slow_factor: float = 3.0

    @property
    def width(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel_size * self.attention_ranks

    @property
    def attention_ranks(self) -> int:
        """Copies of the attention layers, each over `tensor_parallel_size` ranks with sequences of their own."""
        return max(self.expert_parallel_size, self.context_parallel_size)

    @property
    def may_outlive_ranks(self) -> bool:
        """Rank 0 decides what becomes of the group when another rank ends; else all ranks end together.

        Each rank above 0 is a copy of the attention by itself: without it the others have all they need.
        """
        return self.tensor_parallel_size == 1 and self.attention_ranks > 1

    def check(self) -> None:
        """Raises ConfigError, naming the key and the numbers."""
        for key in ("tensor_parallel_size", "expert_parallel_size", "context_parallel_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key} {getattr(self, key)} is below 1", f"group.{key}")
        if not 0 <= self.rank < self.width:
            raise ConfigError(f"rank {self.rank} of a group of {self.width} ranks", "group.rank")
        if self.rank and not self.leader:
            raise ConfigError(f"rank {self.rank} needs the address of rank 0", "group.leader")
        for key in ("start_timeout_s", "heartbeat_s", "silence_s"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"{key} {getattr(self, key)} is no positive number of seconds", f"group.{key}")
        if 1 not in (self.expert_parallel_size, self.context_parallel_size) and (
            self.expert_parallel_size != self.context_parallel_size
        ):
            raise ConfigError(
                f"context_parallel_size {self.context_parallel_size} and expert_parallel_size "
                f"{self.expert_parallel_size} speak of the same ranks: equal, or one of them 1",
                "group.context_parallel_size",
            )
        for key in ("redundant_experts", "expert_rebalance_steps", "context_parallel_threshold"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} {getattr(self, key)} is below 0", f"group.{key}")
        if self.lost_experts not in LOST_EXPERTS:
            raise ConfigError(f"lost_experts is one of {', '.join(LOST_EXPERTS)}", "group.lost_experts")
        if self.silence_s <= self.heartbeat_s:
            raise ConfigError(
                f"silence_s {self.silence_s} would pass between two heartbeats {self.heartbeat_s} s apart",
                "group.silence_s",
            )
        if self.slow_factor <= 1:
            raise ConfigError(f"slow_factor {self.slow_factor} is not above 1", "group.slow_factor")


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """Where spans go. One part of requests is traced; who comes in with a trace of its own decides for itself."""

    endpoint: str = ""  # OTLP over HTTP, like http://127.0.0.1:4318; empty = no tracing at all
    sample_ratio: float = 1.0  # of the requests that bring no trace context
    service_name: str = "penstock"
    max_queue: int = 2048  # spans waiting to be sent; more are dropped
    export_interval_s: float = 2.0


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    """The second account of what became of requests, which finds what was lost."""

    share: float = 0.0  # of the requests, chosen by their ids; 0 = no ledger at all


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """PEM files, the same paths on every host. Callers get the certificate; with `internal` so do processes of ours."""

    cert_file: str = ""  # certificate and what stands between it and the CA; empty = no TLS at all
    key_file: str = ""  # its private key, without a password
    ca_file: str = ""  # who signed it: what processes of the cluster ask of each other
    internal: bool = False  # between routers and workers too: calls, KV blocks and weights, both sides verified

    def check(self) -> None:
        """Raises ConfigError, naming the key, where files are missing that others need."""
        for name, other in (("cert_file", "key_file"), ("key_file", "cert_file"), ("cert_file", "ca_file")):
            if not getattr(self, name) and getattr(self, other):
                raise ConfigError(f"tls.{other} is no use without tls.{name}", f"tls.{name}")
        if self.internal and not self.ca_file:
            raise ConfigError("tls.internal needs tls.cert_file, tls.key_file and tls.ca_file", "tls.ca_file")


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How every process writes its log."""

    format: str = "text"  # text | json, one line per record either way
    level: str = "info"  # debug | info | warning | error
    access: bool = True  # one line per HTTP request


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Low-rank adapters of the model, served beside it. All of them lie under one directory, at one path everywhere."""

    directory: str = ""  # where adapters lie, a folder each; empty = none are served
    modules: Mapping[str, str] = field(default_factory=dict)  # name -> folder, served from the start
    max_loaded: int = 4  # adapters that one worker computes with at a time; others wait for their turn
    max_rank: int = 16  # of any adapter; room for so much is taken for each of `max_loaded`
    host_bytes: int = 1 << 30  # of a worker's memory for adapters that were loaded before

    def check(self) -> None:
        """Raises ConfigError, naming the key."""
        if self.directory and not os.path.isabs(self.directory):
            raise ConfigError(f"{self.directory!r} must be absolute: every worker reads it", "adapters.directory")
        if self.modules and not self.directory:
            raise ConfigError("adapters need the directory under which they lie", "adapters.directory")
        if not 1 <= self.max_loaded <= MOST_ADAPTERS:
            raise ConfigError(f"max_loaded {self.max_loaded} is not 1 to {MOST_ADAPTERS}", "adapters.max_loaded")
        if not 1 <= self.max_rank <= MOST_ADAPTER_RANKS:
            raise ConfigError(f"max_rank {self.max_rank} is not 1 to {MOST_ADAPTER_RANKS}", "adapters.max_rank")
        if self.host_bytes < 0:
            raise ConfigError(f"host_bytes {self.host_bytes} is below 0", "adapters.host_bytes")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker process."""

    worker_id: str
    role: Role = Role.MIXED
    incarnation: int = 1  # grows with every restart of the same worker id
    cluster_id: str = "local"
    cluster_key: str = field(default="", repr=False)  # hex; authenticates worker-to-worker frames and streams
    host: str = "127.0.0.1"
    port: int = 0  # 0 = any
    heartbeat_s: float = 0.5
    router_lease_s: float = 10.0
    drain_s: float = 30.0  # longest wait for running work after SIGTERM
    parent_pid: int = 0  # end when this process is gone; 0 = nobody watches
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    kv: KVSettings = field(default_factory=KVSettings)
    transfer: TransferSettings = field(default_factory=TransferSettings)
    runner: RunnerSettings = field(default_factory=RunnerSettings)
    group: GroupSettings = field(default_factory=GroupSettings)
    tracing: TracingSettings = field(default_factory=TracingSettings)
    logs: LogSettings = field(default_factory=LogSettings)
    weights: WeightSettings = field(default_factory=WeightSettings)
    ledger: LedgerSettings = field(default_factory=LedgerSettings)
    tls: TlsSettings = field(default_factory=TlsSettings)
    adapters: AdapterSettings = field(default_factory=AdapterSettings)
    weight_peers: tuple[str, ...] = ()  # host:port of running workers that may serve the same weights

    @property
    def title(self) -> str:
        """What a process calls itself in its log: the worker, and which rank of it where it has several."""
        return f"{self.worker_id}/{self.group.rank}" if self.group.width > 1 else self.worker_id

    def to_json(self) -> str:
        """Inverse of `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSettings:
        """Raises ConfigError on unknown keys."""
        raw: dict[str, Any] = json.loads(text)
        try:
            raw["role"] = Role(raw.get("role", "mixed"))
            raw["scheduler"] = SchedulerSettings(**raw.get("scheduler", {}))
            raw["kv"] = KVSettings(**raw.get("kv", {}))
            raw["transfer"] = TransferSettings(**raw.get("transfer", {}))
            runner = raw.get("runner", {})
            tuples = {key: tuple(runner.get(key, ())) for key in ("graph_sizes", "cpus")}  # JSON knows none
            raw["runner"] = RunnerSettings(**{**runner, **tuples})
            raw["group"] = GroupSettings(**raw.get("group", {}))
            raw["tracing"] = TracingSettings(**raw.get("tracing", {}))
            raw["logs"] = LogSettings(**raw.get("logs", {}))
            raw["weights"] = WeightSettings(**raw.get("weights", {}))
            raw["ledger"] = LedgerSettings(**raw.get("ledger", {}))
            raw["tls"] = TlsSettings(**raw.get("tls", {}))
            raw["adapters"] = AdapterSettings(**raw.get("adapters", {}))
            raw["weight_peers"] = tuple(raw.get("weight_peers", ()))
            return WorkerSettings(**raw)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"worker settings: {error}") from error
