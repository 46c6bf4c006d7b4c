"""Everything a worker process is told at start, as one tree of frozen values; `cluster/config.py` builds it.

Workers read no files, flags or environment for their configuration: the tree arrives as JSON (`to_json`) and is
passed down in the smallest piece that serves. Units are in the names.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from penstock.workers.errors import ConfigError
from penstock.workers.protocol import Role

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


@dataclass(frozen=True, slots=True)
class KVSettings:
    """The block pool."""

    block_size: int = 16
    num_blocks: int = 0  # 0 = as many as fit in memory_bytes
    memory_bytes: int = 1 << 30  # on the CPU; a GPU's pool follows from gpu_memory_utilization
    gpu_memory_utilization: float = 0.9  # share of a GPU's whole memory that one worker may take
    prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class TransferSettings:
    """KV transfer between workers."""

    transport: str = "auto"  # auto | shared_memory | tcp; auto = shared memory when both ends share a host
    host: str = "127.0.0.1"
    lease_s: float = 10.0
    digest: str = "auto"  # auto | full | sampled | off: of each block's bytes; auto = full over TCP, else sampled
    digest_sample: float = 0.03125  # share of each block that a sampled digest covers
    max_frame_bytes: int = 64 << 20
    socket_buffer_bytes: int = 0  # of each connection; 0 = small to a peer on this host, else the system's choice


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


@dataclass(frozen=True, slots=True)
class TracingSettings:
    """Where spans go. One part of requests is traced; who comes in with a trace of its own decides for itself."""

    endpoint: str = ""  # OTLP over HTTP, like http://127.0.0.1:4318; empty = no tracing at all
    sample_ratio: float = 1.0  # of the requests that bring no trace context
    service_name: str = "penstock"
    max_queue: int = 2048  # spans waiting to be sent; more are dropped
    export_interval_s: float = 2.0


@dataclass(frozen=True, slots=True)
class LogSettings:
    """How every process writes its log."""

    format: str = "text"  # text | json, one line per record either way
    level: str = "info"  # debug | info | warning | error
    access: bool = True  # one line per HTTP request


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One worker process."""

    worker_id: str
    role: Role = Role.MIXED
    incarnation: int = 1  # grows with every restart of the same worker id
    cluster_id: str = "local"
    cluster_key: str = ""  # hex; authenticates worker-to-worker frames and streams
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
    tracing: TracingSettings = field(default_factory=TracingSettings)
    logs: LogSettings = field(default_factory=LogSettings)

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
            raw["tracing"] = TracingSettings(**raw.get("tracing", {}))
            raw["logs"] = LogSettings(**raw.get("logs", {}))
            return WorkerSettings(**raw)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"worker settings: {error}") from error
